"""Try one file: its mutants are written into a copy of the tree, and its tests run on each."""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from tests.mutants.mutations import Mutant, mutants_of

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
LOADED = ["numpy", "torch", "transformers", "hypothesis", "pyarrow", "pydantic", "tests.mutants.trial"]


@dataclass(frozen=True)
class Outcome:
    """What came of one mutant."""

    file: str
    line: int
    before: str
    after: str
    noticed: bool
    equivalent: str
    seconds: float


def try_file(file: str, tests: list[str], options: argparse.Namespace) -> list[Outcome]:
    """Try one file's mutants in a copy of the tree -> their outcomes, which are written to OUTPUT too."""
    kept = options.output / f"{file.replace('/', '.')}.json"
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = _copy_of_the_tree(Path(folder))
        source = (copy / file).read_text("utf-8")
        mutants = mutants_of(source, options.count, options.seed)
        if options.again:
            survived = {
                (found["before"], found["after"]) for found in json.loads(kept.read_text()) if not found["noticed"]
            }
            mutants = [mutant for mutant in mutants if (mutant.before, mutant.after) in survived]
        began = time.monotonic()
        if _notices(copy, tests, 3600):
            raise SystemExit(f"{file}: its tests fail without a mutant; run them: {' '.join(tests)}")
        limit = 3 * (time.monotonic() - began) + 30
        reasons = _reasons(file)
        outcomes = []
        for mutant in mutants:
            began = time.monotonic()
            (copy / file).write_text(mutant.source, "utf-8")
            noticed = _notices(copy, tests, limit)
            outcomes.append(_outcome(file, mutant, noticed, reasons, time.monotonic() - began))
            print(f"{file}:{mutant.line}: {'noticed' if noticed else 'SURVIVED'}: {mutant.after}", flush=True)
    if not options.again:
        kept.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1), "utf-8")
    return outcomes


def _outcome(file: str, mutant: Mutant, noticed: bool, reasons: dict[tuple[str, str], str], seconds: float) -> Outcome:
    reason = reasons.get((mutant.before, mutant.after), "")
    return Outcome(file, mutant.line, mutant.before, mutant.after, noticed, reason, round(seconds, 1))


def _reasons(file: str) -> dict[tuple[str, str], str]:
    """Read which mutants of a file compute the same: (line before, line after) -> why."""
    listed = tomllib.loads((HERE / "equivalent.toml").read_text("utf-8"))["mutant"]
    return {(one["before"], one["after"]): one["reason"] for one in listed if one["file"] == file}


def _copy_of_the_tree(folder: Path) -> Path:
    """Copy what git tracks or would, with `shared` beside it, as a clone has them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60).stdout
    copy = folder / "tree"
    for name in names.splitlines():
        if (REPOSITORY / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, copy / name)
    if (shared := REPOSITORY.parent / "shared").is_dir():
        (folder / "shared").symlink_to(shared)
    return copy


def _notices(copy: Path, tests: list[str], limit_s: float) -> bool:
    """Run the tests in a fresh process -> whether one failed or the time ran out."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    process = context.Process(target=_run_tests, args=(copy, tests))
    process.start()
    process.join(limit_s)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join(60)
        return True
    return process.exitcode != 0


def _run_tests(copy: Path, tests: list[str]) -> None:
    """Run in the process of one mutant. The seed of hypothesis is fixed, so that no mutant is noticed by chance."""
    os.setsid()
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True
    os.chdir(copy)
    sys.path[:] = [str(copy), *(path for path in sys.path if Path(path).resolve() != REPOSITORY)]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", "-m", "not real"]
    os._exit(int(pytest.main([*options, *tests])))
