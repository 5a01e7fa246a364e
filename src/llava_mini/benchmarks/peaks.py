"""The most memory that a call needs, beside what was held before it.

On a GPU it is what torch allocated. On the host it is how much the largest resident size of the process grew, so it is
measured in a new process, and it also holds what libraries keep for themselves.
"""

import gc
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from llava_mini.benchmarks.processes import fresh_result

_CHILD = """
from llava_mini.benchmarks.processes import end_with_parent
end_with_parent()
import json
from llava_mini.benchmarks.{bench} import peak_here
print(json.dumps(peak_here(json.loads(sys.argv[1]))))
"""


def peak_in_process(bench: str, request: Mapping[str, Any]) -> Any:
    """What ``peak_here`` of a benchmark finds in a new process, which ends with this one.

    Args:
        bench: the module.
        request: for ``peak_here``; it goes there as JSON, and so comes what is found.
    """
    return fresh_result(_CHILD.format(bench=bench), json.dumps(request))[0]


def peak_of(call: Callable[[], object], device: torch.device) -> dict[str, int] | None:
    """Bytes that a call adds at most to the memory of the ``host``, and to that of the ``device`` if it is a GPU.

    None: the GPU's memory was not enough.
    """
    host, held = largest_resident(), 0
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    try:
        call()
    except torch.OutOfMemoryError:
        return None
    peak = {"host": largest_resident() - host}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device) - held
    return peak


def largest_resident() -> int:
    """Bytes of memory that this process held at most."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would also count the process that started this one
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
