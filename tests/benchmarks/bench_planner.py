"""The planner error table: what `tessera plan` foretells beside what is measured, on this machine's CPU.

python -m tests.benchmarks.bench_planner            everything, some ten minutes of two cores
python -m tests.benchmarks.bench_planner time       or parameters, flops, activations, peak, engine, time, published

Parameters, FLOPs and activations are the real modules'; states, bytes on the wire and times those of the real engine in
two processes (bytes: what the kernel says that their connections carried; times: CPU seconds of a process, which other
work on the machine disturbs little, beside products and copies timed in the same process).
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from data_pipeline.settings import load_settings
from launchers.plan.clusters import GIGA, GPUS, Cluster, Device, cluster_of
from launchers.plan.make import make_plan
from launchers.plan.textbook import flops_per_token, mfu
from launchers.plan.trace import trace
from pretrain.config import RunConfig
from tests.launchers.plan import measured
from tests.launchers.plan.engine_runs import RUNS, between, in_backward, on_ranks
from tests.launchers.plan.recipes import desk, figures_of, recipes, run_of
from tests.launchers.plan.test_published import LLM_FOUNDRY
from tests.launchers.plan.test_published import RUNS as PUBLISHED

ROOT = Path(__file__).resolve().parents[2]
DESKTOP = [recipe for recipe in recipes() if "/small/" in recipe or "/demo/" in recipe]
MEDIUM = [
    ("configs/text/bert-base.yaml", 1, ()),
    ("configs/text/electra-base.yaml", 1, ()),
    ("configs/clip/vit-b-32.yaml", 2, ()),
    ("configs/text_to_image/pai-painter-base.yaml", 1, ()),
    ("configs/image_tokenizer/vqgan-f16-16384.yaml", 1, ("model.image_size=128", "model.attention_at=[8]")),
]


class Row(NamedTuple):
    """One figure, foretold and measured."""

    what: str
    planned: float
    found: float

    @property
    def error(self) -> float:
        return self.planned / self.found - 1


def run(recipe: str, *overrides: str) -> RunConfig:
    return load_settings(RunConfig, ROOT / recipe, overrides)


def name(recipe: str) -> str:
    return recipe.removeprefix("configs/").removesuffix(".yaml")


def parameters() -> Iterator[Row]:
    """Elements, every recipe."""
    for recipe in recipes():
        config = run(recipe)
        planned = trace(config, 1, accumulation=1, world=1, on_gpu=True)
        yield Row(name(recipe), planned.parameters, measured.parameters(config))


def flops() -> Iterator[Row]:
    """Of a forward and backward by torch's counter, attention as plain products."""
    for recipe in DESKTOP:
        config = run(recipe)
        yield Row(name(recipe), figures_of(config, 2).flops, measured.flops(config, 2)[1])


def activations() -> Iterator[Row]:
    """Bytes that wait for the backward, in float32 and under autocast."""
    sizes = [(recipe, 2, ()) for recipe in DESKTOP] + MEDIUM
    for recipe, rows, overrides in sizes:
        for precision in ("fp32", "bf16"):
            config = run(recipe, f"train.precision={precision}", *overrides)
            yield Row(f"{name(recipe)} {precision}", figures_of(config, rows).kept, measured.saved_bytes(config, rows))


def peak() -> Iterator[Row]:
    """The most bytes that a forward and its backward hold beside parameters and batch."""
    for recipe in DESKTOP:
        for precision in ("fp32", "bf16"):
            config = run(recipe, f"train.precision={precision}")
            yield Row(f"{name(recipe)} {precision}", figures_of(config, 8).most, measured.peak_bytes(config, 8))


def engine() -> Iterator[Row]:
    """Bytes held before an update and sent in a step, ZeRO stages 0 to 3 over two processes."""
    ranks = on_ranks(list(RUNS.values()), world=2)
    for number, (label, words) in enumerate(RUNS.items()):
        plan = make_plan(run(*words), desk(2))
        most = {key: max(rank["runs"][number][key] for rank in ranks) for key in ranks[0]["runs"][number]}
        yield Row(f"{label}: sent", plan.sent_per_rank, most["sent"])
        yield Row(f"{label}: held between steps", between(plan), most["between"])
        yield Row(f"{label}: held at most", in_backward(plan), max(most.get("in_backward", 0), most["before_update"]))


def times() -> Iterator[Row]:
    """CPU seconds of a step in one process of one thread, usual shares: at 16 rows, which set them, and at 32."""
    asked = [
        (recipe, ["train.zero_stage=0", "train.precision=fp32", f"train.global_batch={rows}"])
        for rows in (16, 32)
        for recipe in DESKTOP
    ]
    said = on_ranks([[recipe, *overrides] for recipe, overrides in asked], world=1)[0]
    device = Device("cpu", {"fp32": said["peak"]}, 8 * GIGA, said["rate"], GIGA, GIGA)
    for (recipe, overrides), there in zip(asked, said["runs"], strict=True):
        plan = make_plan(run(recipe, *overrides), Cluster(device, 1, 1, GIGA))
        slow, usual, fast = plan.paces
        verdict = "within" if fast.step < there["cpu_seconds"] < slow.step else "OUTSIDE"
        label = f"{name(recipe)}, {plan.micro} rows ({verdict} {fast.step:.3f} to {slow.step:.3f})"
        yield Row(label, usual.step, there["cpu_seconds"])


def published() -> Iterator[Row]:
    """Utilisation by formula, in %; then samples/s of other people's runs at the usual shares."""
    for parameters, layers, width, length, gpus, tokens, share in LLM_FOUNDRY:
        found = mfu(flops_per_token(parameters, layers, width, length), tokens, gpus, GPUS["h100"].peaks["bf16"])
        yield Row(f"llm-foundry {parameters / 1e9:.1f}B length {length} on {gpus}: MFU", 100 * found, share)
    for model, batch, micro, stage, gpu, nodes, recompute, speed in PUBLISHED:
        config = run_of(model, global_batch=batch, micro_batch=micro, zero_stage=stage, recompute=recompute)
        plan = make_plan(config, cluster_of(gpu, nodes, 8))
        yield Row(
            f"{model['kind']} {plan.parameters / 1e9:.1f}B on {8 * nodes} {gpu}", batch / plan.paces[1].step, speed
        )


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "parameters": parameters,
    "flops": flops,
    "activations": activations,
    "peak": peak,
    "engine": engine,
    "time": times,
    "published": published,
}


def main() -> None:
    for part in sys.argv[1:] or PARTS:
        print(f"\n{part}: {(PARTS[part].__doc__ or '').splitlines()[0]}")
        errors = []
        for row in PARTS[part]():
            errors.append(abs(row.error))
            print(f"  {row.what:62} {row.planned:18,.4g} {row.found:18,.4g} {100 * row.error:+8.2f} %", flush=True)
        print(f"  largest error {100 * max(errors):.2f} %, median {100 * sorted(errors)[len(errors) // 2]:.2f} %")


if __name__ == "__main__":
    main()
