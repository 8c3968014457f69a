"""Processes whose PNG decoder ends them, or never ends, on images that a test names: see test_lethal.py.

Python imports a module of this name from PYTHONPATH before the program.
"""

import hashlib
import json
import os
import resource
import signal
from typing import Any

VARIABLE = "TESSERA_TEST_LETHAL"


def deadly(decode: Any, ends: dict[str, str]) -> Any:
    """`decode` with a fault; ends: sha256 of an image -> what it does to the process."""

    def imdecode(data: Any, *rest: Any) -> Any:
        end = ends.get(hashlib.sha256(bytes(data)).hexdigest())
        if end == "abort":
            os.abort()
        if end == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if end == "leave":
            os._exit(1)
        while end == "spin":
            pass
        return decode(data, *rest)

    return imdecode


if VARIABLE in os.environ:
    import cv2

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    cv2.imdecode = deadly(cv2.imdecode, json.loads(os.environ[VARIABLE]))
