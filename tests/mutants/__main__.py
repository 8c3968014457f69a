"""`make mutants`: change one token of a core file at a time and see whether its tests notice.

Two workers have a copy of the tree each. Every mutant is written into it and tried by its tests, in a process forked
from one that has loaded the large libraries already. A mutant that no test notices has survived; `equivalent.toml`
lists those that compute the same, with the reason. Leaves with 1 where less than 95 % of the others are noticed.
"""

import argparse
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mutants.trial import HERE, REPOSITORY, Outcome, try_file

SHARE = 0.95


def main() -> None:
    """Try the files that are named, or all of targets.toml, and print the survivors."""
    targets: dict[str, list[str]] = tomllib.loads((HERE / "targets.toml").read_text("utf-8"))["files"]
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("files", nargs="*", help="files of targets.toml; all of them where none is named")
    parser.add_argument("--count", type=int, default=60, help="mutants of a file")
    parser.add_argument("--seed", type=int, default=0, help="which mutants are drawn")
    parser.add_argument("--workers", type=int, default=2, help="files that are tried at once")
    parser.add_argument("--again", action="store_true", help="try only those that survived the last time")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "runs" / "mutants", help="where the outcomes go")
    options = parser.parse_args()
    if unknown := set(options.files) - set(targets):
        parser.error(f"{sorted(unknown)} are not files of {HERE / 'targets.toml'}")
    options.output.mkdir(parents=True, exist_ok=True)
    files = options.files or sorted(targets)
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(options.workers) as pool:
        for made in pool.map(try_file, files, [targets[file] for file in files], [options] * len(files)):
            outcomes += made
    sys.exit(0 if _report(files, outcomes) else 1)


def _report(files: list[str], outcomes: list[Outcome]) -> bool:
    """Print a line a file and every survivor -> whether enough were noticed."""
    enough = True
    for file in files:
        tried = [outcome for outcome in outcomes if outcome.file == file]
        counted = [outcome for outcome in tried if outcome.noticed or not outcome.equivalent]
        noticed = sum(outcome.noticed for outcome in counted)
        enough &= noticed >= SHARE * len(counted)
        spared = len(tried) - len(counted)
        print(f"{file}: {noticed} of {len(counted)} noticed, {spared} equivalent")
        for outcome in counted:
            if not outcome.noticed:
                print(f"  {file}:{outcome.line} survived\n    - {outcome.before}\n    + {outcome.after}")
    return enough


if __name__ == "__main__":
    main()
