"""Child processes that must not outlive who started them; imports next to nothing, for whoever starts processes."""

import ctypes
import os
import signal
import sys
from typing import Any

from data_pipeline.errors import NodeFault

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> Any:
    """What a child runs before its program: SIGKILL for it as soon as the launcher is gone (Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)

    def arm() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before the line above
            os._exit(NodeFault.exit_code)

    return arm
