"""`python -m tests.golden FOLDER...`: compare ours with what reference implementations computed.

Prints every array with its largest difference. Leaves with 1 where one is above the tolerance or missing, else with 2
where a fixture is claimed by no family yet, else with 0.
"""

import argparse
import sys
from pathlib import Path

import torch

from tests.golden.claims import DIFFERENCES, claim_of
from tests.golden.fixture import Golden


def main() -> None:
    """Compare the folders that are named."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a fixture in the format of golden/")
    parser.add_argument("--quiet", action="store_true", help="print the arrays that differ, and a line a folder")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as the references ran
    unclaimed = off = 0
    for folder in options.folders:
        name = folder.resolve().name
        claim = claim_of(name)
        if claim is None:
            print(f"{name}: no family claims it yet")
            unclaimed += 1
            continue
        compared = claim(Golden(folder))
        for array in compared:
            if not (options.quiet and array.agrees):
                verdict = "" if array.agrees else "  DIFFERS"
                print(f"{name}: {array.name}: {array.difference:.3g} (at most {array.allowed:.3g}){verdict}")
        wrong = sum(not array.agrees for array in compared)
        worst = max((array.difference for array in compared), default=0.0)
        print(f"{name}: {len(compared) - wrong} of {len(compared)} arrays agree, the largest difference is {worst:.3g}")
        print("".join(f"  {told}\n" for prefix, told in DIFFERENCES.items() if name.startswith(prefix)), end="")
        off += wrong
    sys.exit(1 if off else 2 if unclaimed else 0)


if __name__ == "__main__":
    main()
