"""Processes that train stand still at a step that a test names, so that it has time to strike: see commands.held.

Python imports a module of this name from PYTHONPATH before the program. The loop is replaced when it is imported.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

VARIABLE = "TESSERA_TEST_HELD"


def hold(run: Any, stop: Any, step: int, go_on: Path) -> None:
    """Of this run the row of `step` is written when what was saved before is committed; nothing follows it for now."""
    log, agree = run.log, run.agree

    def log_late(*told: Any) -> None:
        if run.step == step:
            run.checkpoints.finish()
        log(*told)

    def agree_late(asked: int) -> bool:
        while run.step >= step and not go_on.exists():
            if stop.count:  # who is asked to stop asks the others
                go_on.touch()
            time.sleep(0.01)
        return bool(agree(max(asked, stop.count)))

    run.log, run.agree = log_late, agree_late


class AtTheImport(importlib.abc.MetaPathFinder):
    """Lets a run be held once its loop is there."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """Of pretrain.train alone; nothing else is imported for it."""
        if name != "pretrain.train":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            loop, told = module.train, json.loads(os.environ[VARIABLE])

            def train(run: Any, stop: Any) -> None:
                if Path(run.config.run).resolve() == Path(told["run"]):
                    hold(run, stop, told["step"], Path(told["go_on"]))
                loop(run, stop)

            module.train = train

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if VARIABLE in os.environ:
    sys.meta_path.insert(0, AtTheImport())
