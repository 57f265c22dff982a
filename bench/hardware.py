"""Which machine were the figures measured on, and how busy was it?"""

import os
import platform
from pathlib import Path
from typing import Any


def hardware() -> dict[str, Any]:
    """The processor's name and cores, the load of the last minute, and the version of Python."""
    models = [line.partition(":")[2].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
