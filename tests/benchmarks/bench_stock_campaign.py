"""The strikes of `tessera chaos` against a small script with stock DeepSpeed's save_checkpoint and load_checkpoint.

    python tests/benchmarks/bench_stock_campaign.py FOLDER --kills 20 --seed 1

Two processes, ZeRO-3, a save every four steps, started again with the same command after each strike. A strike counts
as survived when the next start makes a step that an undisturbed run made too, with the same loss. Where none does, the
script's user has to step in: here the tag before is written into `latest` by hand, and if that does not help either,
the training starts from nothing. The strikes are those that a seed means for our own runs.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from launchers.chaos.attempt import Attempt, left_over  # noqa: E402
from launchers.chaos.campaign import hit  # noqa: E402
from launchers.chaos.plan import Strike, When, plan  # noqa: E402
from launchers.chaos.points import has_open, moment  # noqa: E402
from launchers.children import die_with  # noqa: E402
from launchers.local import free_port  # noqa: E402
from pretrain.runtime.goodput import lines_of  # noqa: E402

WORLD, EVERY, WIDTH = 2, 4, 256
FILES = 2 * WORLD
"""Of a save: model and optimizer of each rank."""
HANG_S = 90.0
"""How long a frozen rank is waited for; gloo itself would wait for 30 minutes."""
SHARD = r".*_states\.pt"

# ------------------------------------------------------------------------------------- what a user would write


def rank_main(folder: Path, steps: int) -> None:
    """Train from `latest` to the end."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # as in our own start: two seconds of import
    import deepspeed
    import torch

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    layers = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(4)]
    model = torch.nn.Sequential(*[part for layer in layers for part in (layer, torch.nn.Tanh())])
    settings = {
        "train_batch_size": 8 * WORLD, "zero_allow_untested_optimizer": True, "steps_per_print": 10**9,
        "zero_optimization": {"stage": 3, "overlap_comm": False},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), 1e-3, fused=True), config=settings
    )
    start = 0
    if (folder / "saves" / "latest").exists():
        path, _ = engine.load_checkpoint(str(folder / "saves"))
        start = int(Path(path).parent.name.removeprefix("step-"))
    for step in range(start + 1, steps + 1):
        draw = torch.Generator().manual_seed(1000 * step + rank)
        loss = engine(torch.randn(8, WIDTH, generator=draw)).square().mean()
        engine.backward(loss)
        engine.step()
        if rank == 0:
            row = {"step": step, "loss_hex": float(loss).hex(), "time": time.time()}
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        if step % EVERY == 0:
            engine.save_checkpoint(str(folder / "saves"), tag=f"step-{step:08d}")
    os._exit(0)


def launcher_main(folder: str, steps: str) -> None:
    """Start the ranks; when one fails, end the others."""
    ranks = []
    port = str(free_port())
    for rank in range(WORLD):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in place.items()}
        command = [sys.executable, __file__, "rank", folder, steps]
        ranks.append(subprocess.Popen(command, env=environment, preexec_fn=die_with(os.getpid())))
    while any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks):
            for rank in ranks:
                rank.kill()
        time.sleep(0.05)
    sys.exit(70 if any(rank.returncode for rank in ranks) else 0)


# -------------------------------------------------------------------------------------------- struck, and held against


class StockPoints:
    """Where a save stands, by its files and by `latest`."""

    def __init__(self, folder: Path) -> None:
        self.saves = folder / "saves"
        self._point: When = "shard"

    def expect(self, point: When, attempt: Attempt) -> None:
        self._point, self._attempt, self._before = point, attempt, self.latest()

    def latest(self) -> str:
        path = self.saves / "latest"
        return path.read_text() if path.exists() else ""

    def tags(self) -> list[Path]:
        return sorted(self.saves.glob("step-*"))

    def reached(self) -> bool:
        if self._point == "load":
            return has_open(self._attempt, SHARD)
        if self._point == "retention":
            return self.latest() != self._before
        newest = self.tags()[-1:]
        if not newest or newest[0].name <= self._before:
            return False
        files = len(list(newest[0].glob("*.pt")))
        return 0 < files < FILES if self._point == "shard" else files == FILES

    def go_on(self) -> None:
        """Nothing is held."""


def damaged(points: StockPoints, strike: Strike) -> bool:
    """Cut or flip a file of the newest save, as our campaign does: if there is another one to go on from."""
    if len(points.tags()) < 2:
        return False
    files = sorted((points.saves / points.latest()).glob("*optim_states.pt"))
    file = files[strike.rank % len(files)]
    data = bytearray(file.read_bytes())
    at = int(strike.after * (len(data) - 1))
    if strike.damage == "cut":
        data = data[:at]
    else:
        data[at] ^= 1
    file.write_bytes(data)
    return True


class Stock:
    """The struck run, and how it fared."""

    def __init__(self, folder: Path, steps: int, expected: dict[int, str]) -> None:
        self.folder, self.steps, self.expected = folder, steps, expected
        self.points = StockPoints(folder)
        self.tally: dict[str, int] = {}

    def start(self) -> Attempt:
        return Attempt([sys.executable, __file__, "launch", str(self.folder), str(self.steps)], self.folder)

    def goes_on(self) -> str:
        """Start again and watch for a step -> "survived", or what came instead. The attempt is left running."""
        self.attempt = self.start()
        while not self.attempt.step() and not self.attempt.done:
            time.sleep(0.01)
        if not self.attempt.step():
            said = [line for line in self.attempt.log.read_text(errors="replace").splitlines() if "Error" in line]
            return f"no start: {said[-1].split(': ', 1)[-1][:110] if said else 'no word'}"
        first = next(row for row in reversed(list(lines_of(self.folder / "metrics.jsonl"))))
        return (
            "survived" if first["loss_hex"] == self.expected[first["step"]] else "went on with another loss, silently"
        )

    def repair(self) -> None:
        """What a person would do: the tag before, else from nothing."""
        tags = [tag.name for tag in self.points.tags() if tag.name < self.points.latest()]
        for tag in reversed(tags):
            (self.points.saves / "latest").write_text(tag)
            if self.goes_on() == "survived":
                return
            self.end()
        shutil.rmtree(self.points.saves, ignore_errors=True)
        (self.folder / "metrics.jsonl").unlink()
        assert self.goes_on() == "survived"

    def end(self) -> None:
        family = self.attempt.family()
        self.attempt.launcher.send_signal(signal.SIGKILL)
        self.attempt.wait()
        left_over(family)

    def strike(self, strike: Strike) -> str:
        if not moment(strike, self.attempt, self.points, EVERY):
            return "the run finished first"
        family = self.attempt.family()
        hit(strike, self.attempt, family)
        hung = False
        if strike.whom == "freeze":
            deadline = time.monotonic() + HANG_S
            while not self.attempt.done and time.monotonic() < deadline:
                time.sleep(0.1)
            hung = not self.attempt.done
            self.attempt.launcher.kill()
        self.attempt.wait()
        left_over(family)
        hurt = bool(strike.damage) and damaged(self.points, strike)
        came = f"hung for {HANG_S:.0f} s" if hung else self.goes_on()
        if came != "survived":
            if hung:
                self.attempt = self.start()
            else:
                self.end()
                self.repair()
        return came + (f" (a file was {strike.damage})" if hurt else "")


def undisturbed(folder: Path, steps: int) -> dict[int, str]:
    folder.mkdir(parents=True)
    run = Attempt([sys.executable, __file__, "launch", str(folder), str(steps)], folder)
    assert run.wait() == 0, run.log.read_text()[-2000:]
    return {row["step"]: row["loss_hex"] for row in lines_of(folder / "metrics.jsonl")}


def main() -> None:
    """Print a line for each strike, then how many were survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    folder, steps = options.folder.resolve() / f"stock-{options.seed}", max(20, 3 * options.kills)
    shutil.rmtree(folder, ignore_errors=True)
    expected = undisturbed(folder / "reference", steps)
    (folder / "struck").mkdir()
    stock = Stock(folder / "struck", steps, expected)
    stock.attempt = stock.start()
    results = []
    for number, strike in enumerate(plan(options.seed, options.kills, steps, WORLD), 1):
        results.append(stock.strike(strike))
        print(f"strike {number} of {options.kills}: {strike}: {results[-1]}", flush=True)
    code = stock.attempt.wait()
    kept = {row["step"]: row["loss_hex"] for row in lines_of(folder / "struck" / "metrics.jsonl")}
    survived = sum(result.startswith("survived") for result in results)
    print(f"{survived} of {len(results)} strikes were survived without help; the last attempt left with {code}")
    others = sum(kept.get(step) != loss for step, loss in expected.items())
    print(f"losses that differ from the undisturbed run's: {others} of {steps}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        rank_main(Path(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1:2] == ["launch"]:
        launcher_main(*sys.argv[2:])
    else:
        main()
