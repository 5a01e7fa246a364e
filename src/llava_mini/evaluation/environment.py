"""What a measurement ran on: device, number format, threads, versions and commit."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

LIBRARIES = ("torch", "transformers", "tokenizers", "pillow")


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """Return plain values for a line of JSON.

    Args:
        device: Where the model runs.
        dtype: The number format of its weights.
    """
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {_processor()}",
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
        "commit": _commit(),
    }


def _processor() -> str:
    """The name of the processor; on Linux the one in /proc, which platform does not know."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of the source folder, with a plus sign if files were changed since; empty where there is none."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        # Without locks: a status that is killed would leave its own, and the next commit would be refused.
        command = ["git", "--no-optional-locks", "-C", str(folder), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short=10", "HEAD")
        tracked = commit and git("ls-files", "--error-unmatch", Path(__file__).name)
        return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "") if tracked else ""
    except FileNotFoundError:  # no git
        return ""
