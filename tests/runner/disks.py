"""On what does a test's folder lie?"""

import os
from pathlib import Path


def is_on_a_disk(folder: Path) -> bool:
    """Whether a device of its own holds the folder, so that the kernel counts what moves; none holds memory or overlays."""
    return os.major(folder.stat().st_dev) != 0
