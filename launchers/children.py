"""Child processes that die with their parent. Imports almost nothing, so that any module can use it."""

import ctypes
import os
import signal
import sys
from typing import Any

from data_pipeline.errors import NodeFault

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> Any:
    """Return a `preexec_fn` that has the child killed with SIGKILL once `parent` exits; None except on Linux."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)

    def arm() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent exited before the line above
            os._exit(NodeFault.exit_code)

    return arm
