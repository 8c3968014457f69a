"""From a kill to the next step, and from a start to the first one, as models grow.

    python tests/benchmarks/bench_restart.py FOLDER

BERT on two processes under ZeRO-3 by the public command: one process is killed after a checkpoint, the same command
goes on. FOLDER is that of bench_campaign.py, for its data. Rounds are alike; median, least and most.
"""

import argparse
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pretrain.runtime.goodput import ATTEMPTS, lines_of  # noqa: E402
from tests.benchmarks.bench_campaign import material_in  # noqa: E402
from tests.pretrain import commands  # noqa: E402
from tests.pretrain.commands import Material, electra, finish, interrupted, kill_rank_1, recipe, rows_of, two_ranks  # noqa: E402

SIZES = {"1M": (2, 192), "10M": (6, 384), "40M": (12, 512), "150M": (12, 1024)}
"""Name -> (layers, width)."""
EVERY = 2


def bert(material: Material, run: Path, layers: int, width: int) -> dict[str, Any]:
    """A BERT of which almost everything is its layers."""
    tree = electra(material, run, steps=4, global_batch=4, checkpoint_every_steps=EVERY)
    model = {"kind": "bert", "vocab_size": 200, "context": 24, "layers": layers, "width": width, "heads": 8}
    return tree | {"model": model, "task": {"kind": "mlm"}}


def killed_and_restarted(config: Path, run: Path) -> dict[str, float]:
    """One round -> seconds."""
    struck = 0.0

    def strike(launcher: int) -> None:
        nonlocal struck
        struck = time.time()
        kill_rank_1(launcher)

    code, log = interrupted(two_ranks(config), run, EVERY + 1, strike)  # which waits for the checkpoint before
    ended = time.time()
    assert code == 70, log[-2000:]
    done = finish(two_ranks(config))
    assert done.returncode == 0, done.stdout[-2000:]
    first = next(row for row in rows_of(run) if row["time_ms"] / 1000 > ended)
    began = list(lines_of(run / ATTEMPTS))[-1]
    assert first["step"] > EVERY
    shutil.rmtree(run / "checkpoints")
    return {
        "kill to end": ended - struck,
        "start to first step": first["time_ms"] / 1000 - began["started"],
        "of it before the loop": began["time"] - began["started"],
        "a step": statistics.median(row["step_s"] for row in rows_of(run)),
    }


def main() -> None:
    """Print a line for each size."""
    commands.TIMEOUT_S = 1800
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    folder = options.folder.resolve()
    material = material_in(folder)
    for name in options.sizes:
        (layers, width), rounds = SIZES[name], []
        for number in range(options.rounds):
            run = folder / f"restart-{name}-{time.time_ns()}-{number}"
            rounds.append(
                killed_and_restarted(recipe(bert(material, run, layers, width), run.with_suffix(".yaml")), run)
            )
        figures = [
            f"{what} {statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})"
            for what in rounds[0]
            if (values := [one[what] for one in rounds])
        ]
        print(f"{name:>5}: {', '.join(figures)}", flush=True)


if __name__ == "__main__":
    main()
