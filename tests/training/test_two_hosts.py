"""Two machines meet through torchrun and learn as one process does.

Each is a network namespace of its own, joined by a virtual cable, where the kernel lets us make them (Linux, root);
elsewhere both are this machine.
"""

import os
import subprocess
import sys
import uuid
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

import llava_mini
from llava_mini.training.world import World
from tests.training.ranks import SECONDS, free_port
from tests.training.tuning import measured, train

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


ON_HOST = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
"""A name of its own, and the addresses of both."""


@contextmanager
def hosts(folder):
    """Give for two hosts: what comes before a command there, the address, the network interface."""
    name = f"lm{uuid.uuid4().hex[:6]}"
    spaces = [f"{name}a", f"{name}b"]
    with ExitStack() as stack:
        try:
            for space in spaces:
                ip("netns", "add", space)
                stack.callback(ip, "netns", "delete", space)
            ip("link", "add", spaces[0], "netns", spaces[0], "type", "veth", "peer", spaces[1], "netns", spaces[1])
            for number, space in enumerate(spaces, start=1):
                ip("-n", space, "address", "add", f"10.77.0.{number}/24", "dev", space)
                ip("-n", space, "link", "set", space, "up")
                ip("-n", space, "link", "set", "lo", "up")
        except (FileNotFoundError, subprocess.CalledProcessError):
            yield [([], "127.0.0.1", "lo")] * 2
            return
        names = folder / "hosts"
        names.write_text("".join(f"10.77.0.{number} {space}\n" for number, space in enumerate(spaces, start=1)))
        yield [
            (
                ["ip", "netns", "exec", space, "unshare", "--uts", "--mount", "sh", "-c", ON_HOST, space, str(names)],
                f"10.77.0.{number}",
                space,
            )
            for number, space in enumerate(spaces, start=1)
        ]


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def environment_of_tests():
    path = os.pathsep.join([str(ROOT), str(Path(llava_mini.__file__).parents[1])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run_on_two_hosts(folder, *arguments):
    """Return exit code and standard error of ``torchrun`` on each host."""
    with hosts(folder) as both:
        meeting = f"{both[0][1]}:{free_port()}"
        agents = []
        for before, address, interface in both:
            command = [
                *before,
                *TORCHRUN,
                "--nnodes",
                "2",
                "--nproc-per-node",
                "1",
                "--rdzv-backend",
                "c10d",
                "--rdzv-endpoint",
                meeting,
                "--rdzv-id",
                "tests",
                "--local-addr",
                address,
                "-m",
                "tests.training.two_hosts",
                *map(str, arguments),
            ]
            environment = {**environment_of_tests(), "GLOO_SOCKET_IFNAME": interface}
            agents.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT))
        try:
            told = [agent.communicate(timeout=SECONDS)[1] for agent in agents]
        finally:
            for agent in agents:
                agent.kill()
        return [(agent.returncode, text) for agent, text in zip(agents, told, strict=True)]


def test_two_hosts_learn_as_one_process(tmp_path):
    ends = run_on_two_hosts(tmp_path, tmp_path / "run", "fsdp")
    assert [code for code, _ in ends] == [0, 0], ends
    expected = train(World(), tmp_path / "alone", accumulate=2)
    torch.testing.assert_close(torch.tensor(measured(tmp_path / "run")), torch.tensor(expected), rtol=2e-5, atol=1e-6)


def test_a_process_that_is_killed_on_one_host_ends_the_other(tmp_path):
    ends = run_on_two_hosts(tmp_path, tmp_path / "run", "fsdp", 5)
    assert all(code != 0 for code, _ in ends), ends
    lines = [line for _, text in ends for line in text.splitlines() if line.startswith("llava-mini: ")]
    assert len(lines) == 1
    assert "ended without a word" in lines[0]


def test_torchrun_starts_killed_processes_again_and_the_run_goes_on_by_itself(tmp_path):
    flags = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "tests.training.two_hosts"]
    command = [*TORCHRUN, *flags, str(tmp_path / "run"), "fsdp", "7"]
    ended = subprocess.run(
        command, env=environment_of_tests(), capture_output=True, text=True, cwd=ROOT, timeout=SECONDS
    )
    assert ended.returncode == 0, ended.stderr
    assert "ended without a word: killed" in ended.stderr
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 6  # no step was taken twice
    expected = train(World(), tmp_path / "alone", accumulate=2)
    torch.testing.assert_close(torch.tensor(measured(tmp_path / "run")), torch.tensor(expected), rtol=2e-5, atol=1e-6)
