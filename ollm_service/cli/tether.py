"""How does a process of `up` die with it? It ties itself to its parent before it becomes the command.

Run as a program in between: `python -I -S tether.py PARENT COMMAND…` asks the kernel to kill this process when its parent ends,
however that ends, and then becomes the command. Standard library only: it is in the way of every start.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def tie_to(parent: int) -> None:
    """Die by SIGKILL when `parent` does. Ends this process at once where the parent is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the service was gone before this part of it started")


if __name__ == "__main__":
    tie_to(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
