"""Prints the table of docs/training.md: losses and lengths of gradients of six steps, however they are computed.

PYTHONPATH=src:. python -m tests.training.table
"""

import tempfile
from pathlib import Path

import torch

from llava_mini.training.world import World
from tests.training.ranks import run_ranks
from tests.training.test_two_hosts import run_on_two_hosts
from tests.training.tuning import measured, train

FSDP, DDP = {"strategy": "fsdp"}, {"strategy": "ddp"}


def spread(folder, name, engine):
    [end, _] = run_ranks(2, train, folder, folder / name, engine)
    return end.value


def rows(folder):
    """Name and log of each way."""
    yield "1 process, 1 micro-batch of 4 prompts", train(World(), folder / "one", None, {"joined": 2})
    yield "1 process, 2 micro-batches of 2", train(World(), folder / "two", accumulate=2)
    yield "2 processes, ddp", spread(folder, "ddp", DDP)
    yield "2 processes, fsdp", spread(folder, "fsdp", FSDP)
    yield (
        "2 processes, fsdp, activations recomputed",
        spread(folder, "recomputed", {**FSDP, "checkpoint_activations": True}),
    )
    run_on_two_hosts(folder, folder / "both", "fsdp")
    yield "2 hosts, torchrun, fsdp", measured(folder / "both")


def main():
    torch.set_num_threads(1)
    steps = (1, 2, 3, 6)
    print("| | " + " | ".join(f"step {step}" for step in steps) + " | largest difference |")
    print("|---" * (len(steps) + 2) + "|")
    with tempfile.TemporaryDirectory() as folder:
        first = None
        for name, log in rows(Path(folder)):
            first = first or log
            far = max(
                abs(a / b - 1)
                for found, wanted in zip(log, first, strict=True)
                for a, b in zip(found, wanted, strict=True)
            )
            cells = [f"{log[step - 1][0]:.6f} / {log[step - 1][1]:.5f}" for step in steps]
            print(f"| {name} | {' | '.join(cells)} | {far:.0e} |")


if __name__ == "__main__":
    main()
