"""What a number was made with and on: versions, system, processor. Kept beside every result."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def versions() -> dict[str, str]:
    """Of wellcond, PyTorch and Python, with the system and the threads that PyTorch uses."""
    import torch

    import wellcond

    return {
        "wellcond": wellcond.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
    }


def processor() -> str:
    """The name of the CPU as the system has it, and its cores."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or 'CPU'}, {os.cpu_count()} cores"
