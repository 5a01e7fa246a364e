"""What torchrun starts on each of two hosts: the small model of ``tuning.py``, six steps.

Arguments: a folder that both share, the strategy, and perhaps the number of the micro-batch at which a process dies. It
dies once only.
"""

import os
import sys
from pathlib import Path

import torch

from llava_mini.training.interruption import Interruption
from llava_mini.training.world import World
from tests.training.tuning import train


def main(folder, strategy, killed_at=-1):
    torch.set_num_threads(1)
    world = World.from_environment(os.environ, device=torch.device("cpu"), minutes=1)
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    task = {"faults": ((int(killed_at), "killed"),)} if first and int(killed_at) >= 0 else None
    with world, world.speaking_once("llava-mini"), Interruption() as interruption:
        train(world, Path(folder), {"strategy": strategy}, task, interruption=interruption)


if __name__ == "__main__":
    main(*sys.argv[1:])
