"""How does a runner die with its worker, and first of all when memory runs out? It ties itself before it becomes the runner.

Run as a program between the two: `python -I -S tether.py PARENT COMMAND…` asks the kernel to kill this process when the thread
that started it ends, offers itself to the out-of-memory killer, and then becomes the command. Doing this here and not between
fork and exec keeps Python code out of that gap, where a threaded process must not run any. Imports the standard library only,
and little of it: this is in the way of every start.
"""

import contextlib
import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
OOM_SCORE_ADJUSTMENT = 800  # of 1000: a runner goes before everything else on the machine, and is started again


def tie_to(parent: int) -> None:
    """Die by SIGKILL when `parent` does. Ends this process at once where the parent is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        # A refusal leaves the machine's default, which is no reason not to run.
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write(str(OOM_SCORE_ADJUSTMENT))
    if os.getppid() != parent:
        sys.exit("the worker was gone before its runner started")


if __name__ == "__main__":
    tie_to(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
