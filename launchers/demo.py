"""`make demo`: from raw pairs to generated images with the public commands, in sequence, on two CPU cores.

Every stage is a command that a user would type; it is printed before it runs. The text-to-image run is killed half way
and resumed. Ends with a table, the paths of the images and runs/demo/summary.json. `--quick` runs a few steps of each
stage, to exercise the machinery; its figures are meaningless.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launchers.watch import METRICS, read_record
from pretrain.runtime.goodput import ATTEMPTS, is_step, lines_of

ROOT = Path("runs/demo")
PROCESSES = 2
STAGE_TIMEOUT_S = 1800
POLL_S = 0.2
PROMPT = "a big red circle at the top left on white"

QUICK = {
    "data": ["source.count=400", "shard_size=200"],
    "heldout": ["source.count=100"],
    "train": ["train.steps=6", "train.checkpoint_every_steps=2", "train.log_every_steps=2", "optim.warmup_steps=2"],
}
"""Overrides of `--quick`, by the kind of stage that they shorten."""

console = Console(highlight=False)


@dataclass
class Demo:
    """The stages run so far, with the duration of each in seconds."""

    quick: bool
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, title: str, *command: str) -> None:
        """Run one stage; exits with its exit code if it fails."""
        process = self.start(title, *command)
        began = time.monotonic()
        try:
            code = process.wait(timeout=STAGE_TIMEOUT_S)
        except BaseException:
            process.terminate()
            process.wait(timeout=60)
            raise
        self.seconds[title] = round(self.seconds.get(title, 0.0) + time.monotonic() - began, 1)
        if code:
            console.print(f"[red]{title} exited with {code}[/red]")
            sys.exit(code)

    def start(self, title: str, *command: str) -> "subprocess.Popen[bytes]":
        """Print the command and start it."""
        console.rule(f"[bold]{title}")
        console.print(f"$ tessera {' '.join(command)}", style="cyan", soft_wrap=True)
        return subprocess.Popen([sys.executable, "-m", "launchers.cli", *command])

    def launch(self, name: str) -> tuple[str, ...]:
        """Return the command that trains configs/demo/NAME.yaml on two processes."""
        more = QUICK["train"] if self.quick else []
        return ("launch", "local", f"configs/demo/{name}.yaml", "--procs-per-node", str(PROCESSES), *more)

    def build(self, name: str) -> tuple[str, ...]:
        """Return the command that builds configs/demo/NAME.yaml."""
        return ("data", "build", f"configs/demo/{name}.yaml", *(QUICK[name] if self.quick else []))


def main(arguments: list[str] | None = None) -> None:
    """Run all stages, write the summary, print the table."""
    parser = argparse.ArgumentParser(prog="python -m launchers.demo", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="run only a few steps per stage")
    demo = Demo(parser.parse_args(arguments).quick)
    began = time.monotonic()
    if ROOT.exists():
        console.print(f"removed {ROOT} of an earlier demo")
        shutil.rmtree(ROOT)
    prepare(demo)
    resumed = pretrain(demo)
    summary = evaluate(demo) | {"resumed": resumed, "minutes": round((time.monotonic() - began) / 60, 2)}
    (ROOT / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    show(demo, summary)


def prepare(demo: Demo) -> None:
    """Make shards, vocabulary, image tokenizer and codes from raw pairs."""
    demo.run("build shards", *demo.build("data"))
    demo.run("build held-out shards", *demo.build("heldout"))
    demo.run("train vocabulary", "vocab", "train", "configs/demo/vocab.yaml")
    demo.run("train VQGAN", *demo.launch("vqgan"))
    demo.run("export tokenizer", "checkpoint", "export", str(ROOT / "vqgan"), str(ROOT / "tokenizer"))
    demo.run("encode codes", "data", "encode", str(ROOT / "data"), "--image-tokenizer", str(ROOT / "tokenizer"))


def pretrain(demo: Demo) -> dict[str, Any]:
    """Pretrain the three families under ZeRO-3; the last is killed half way and resumed.

    Returns the step at which it was killed, the step it resumed from and its last step.
    """
    demo.run("pretrain CLIP", *demo.launch("clip"))
    demo.run("pretrain ELECTRA", *demo.launch("electra"))
    title, run = "pretrain GPT", ROOT / "gpt"
    began = time.monotonic()
    killed_at = kill_half_way(demo.start(title + ", to be killed half way", *demo.launch("gpt")), run)
    demo.seconds[title] = time.monotonic() - began
    demo.run(title, *demo.launch("gpt"))
    attempts = list(lines_of(run / ATTEMPTS))
    return {"killed_at_step": killed_at, "from_step": attempts[-1]["from_step"], "to_step": last_step(run)}


def kill_half_way(launcher: "subprocess.Popen[bytes]", run: Path) -> int:
    """Send SIGKILL to a rank of the run once half its steps are done; return the last logged step."""
    deadline = time.monotonic() + STAGE_TIMEOUT_S
    while last_step(run) < total_steps(run) / 2:
        if launcher.poll() is not None or time.monotonic() > deadline:
            console.print(f"[red]{run} ended before half of its steps[/red]")
            sys.exit(launcher.returncode or 70)
        time.sleep(POLL_S)
    victim = children_of(int(read_record(run)["pid"]))[-1]
    os.kill(victim, signal.SIGKILL)
    step = last_step(run)
    console.print(f"[bold red]killed process {victim} with SIGKILL at step {step}[/bold red]")
    code = launcher.wait(timeout=120)
    console.print(f"the launcher exited with {code}; the same command resumes from the last checkpoint")
    return step


def evaluate(demo: Demo) -> dict[str, Any]:
    """Evaluate all runs on held-out scenes and return their figures."""
    for name in ("vqgan", "clip", "electra"):
        demo.run(f"evaluate {name}", "evaluate", str(ROOT / name))
    demo.run("evaluate gpt", "evaluate", str(ROOT / "gpt"), "--rerank", str(ROOT / "clip"))
    demo.run("generate", "generate", str(ROOT / "gpt"), "--prompt", PROMPT, "-n", "4", "--temperature", "0.5")
    figures = {name: read_json(ROOT / name / "evaluation.json") for name in ("vqgan", "clip", "electra", "gpt")}
    return {
        "images_in": read_json(ROOT / "data" / "stats.json")["in"],
        "shards": len(read_json(ROOT / "data" / "manifest.json")["shards"]),
        "reconstruction_psnr": figures["vqgan"]["reconstruction_psnr"],
        "codes_used": figures["vqgan"]["codes_used"],
        "clip_retrieval_r1": figures["clip"]["retrieval_r1"],
        "mlm_accuracy": figures["electra"]["mlm_accuracy"],
        "rtd_accuracy": figures["electra"]["rtd_accuracy"],
        "prompt_accuracy": figures["gpt"]["prompt_accuracy"],
        "shape_accuracy": figures["gpt"]["shape_accuracy"],
        "colour_accuracy": figures["gpt"]["colour_accuracy"],
        "prompt_accuracy_without_reranking": figures["gpt"]["single_prompt_accuracy"],
        "steps_per_s": {name: training_figures(ROOT / name)[0] for name in figures},
        "peak_memory_gib_per_process": {name: training_figures(ROOT / name)[1] for name in figures},
    }


def show(demo: Demo, summary: dict[str, Any]) -> None:
    """Print the closing table and the paths of the outputs."""
    table = Table(title="tessera demo", title_justify="left")
    for column in ("figure", "value"):
        table.add_column(column)
    for name, value in summary.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    for name, seconds in demo.seconds.items():
        table.add_row(f"seconds: {name}", f"{seconds:.0f}", style="dim")
    console.print(table)
    console.print(f"held-out prompts   {ROOT / 'gpt/samples/evaluation-prompts.png'}", soft_wrap=True)
    console.print(f"reconstructions    {ROOT / 'vqgan/samples/evaluation-reconstructions.png'}", soft_wrap=True)
    console.print(f"summary            {ROOT / 'summary.json'}")
    console.print("tracking page      .venv/bin/mlflow server --backend-store-uri sqlite:///runs/demo/mlflow.db")


def last_step(run: Path) -> int:
    """Return the last step in metrics.jsonl, 0 if there is none."""
    path = run / METRICS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    whole = [line for line in lines[-2:] if line.endswith("\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def training_figures(run: Path) -> tuple[float, float]:
    """Return (median steps per second, peak resident memory of rank 0 in GiB)."""
    rows = [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]
    step_s = statistics.median(row["step_s"] for row in rows if is_step(row))
    return round(1 / step_s, 2), round(max(row["peak_memory_gib"] for row in rows if is_step(row)), 2)


def total_steps(run: Path) -> float:
    """Return train.steps of the run; infinity until it has written its configuration."""
    path = run / "config.json"
    return float(read_json(path)["train"]["steps"]) if path.is_file() else float("inf")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of the run."""
    return dict(json.loads(path.read_text(encoding="utf-8")))


def children_of(pid: int) -> list[int]:
    """Return the direct children of a process, oldest first."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


if __name__ == "__main__":
    main()
