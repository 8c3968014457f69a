"""Batch scripts: golden files, the shell's own parser, and what is refused before anything is submitted.

After an intended change write the golden files again: `TESSERA_WRITE_GOLDEN=1 pytest tests/launchers/test_jobs.py`.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError, DataError, NodeFault
from launchers import slurm
from launchers.kubernetes.submit import rendered
from launchers.pipeline import Step, plan_steps
from launchers.spec import KubernetesCluster, SlurmCluster, describe, dns_label, job_name, load_cluster, seconds_of

GOLDEN = Path("tests/launchers/golden")
RECIPE = Path("configs/clip/vit-b-32.yaml")
BUILD = Path("configs/data/folder.yaml")
SITE = SlurmCluster(procs_per_node=4, gpus_per_node=4, cpus_per_proc=8, partition="gpu")


@pytest.fixture(autouse=True)
def _in_repository(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)


def slurm_script(site: SlurmCluster, *overrides: str) -> str:
    return slurm.render(describe(RECIPE, overrides, site, None, None), site)


def site_example() -> str:
    return slurm_script(load_cluster(SlurmCluster, Path("configs/cluster/slurm.yaml")))


def build_example(nodes: int = 1) -> str:
    site = SlurmCluster(cpus_per_proc=32, account="my-account", partition="cpu", time_limit="08:00:00")
    return slurm.render(describe(BUILD, [], site, nodes), site)


def pipeline_example(name: str = "pipeline") -> str:
    return slurm.render_all(plan_steps(SlurmCluster, f"configs/demo/{name}.yaml"))


PYXIS = {"container": "pyxis", "container_image": "example.com/tessera:0.1.0", "container_mounts": ("/data:/data",)}
APPTAINER = {"container": "apptainer", "container_image": "tessera.sif", "container_mounts": ("/scratch dir:/data",)}
RENDERED: dict[str, Callable[[], str]] = {
    "slurm/train.sbatch": site_example,
    "slurm/data.sbatch": build_example,
    "tests/launchers/golden/pyxis.sbatch": lambda: slurm_script(SITE.model_copy(update=PYXIS)),
    "tests/launchers/golden/apptainer.sbatch": lambda: slurm_script(
        SITE.model_copy(update={**APPTAINER, "requeues": 0, "setup": ("module load cuda",), "env": {"A": "b c"}}),
        "optim.lr=1e-3",
    ),
    "tests/launchers/golden/torchrun.sbatch": lambda: slurm_script(
        SITE.model_copy(
            update={"start": "torchrun", "master_addr": "node_addr", "options": ("reservation=maintenance",)}
        )
    ),
    "tests/launchers/golden/array.sbatch": lambda: slurm.render(describe(RECIPE, [], SITE), SITE, seeds="0-3"),
    "tests/launchers/golden/ray.sbatch": lambda: build_example(nodes=4),
    "tests/launchers/golden/pipeline.sbatch": pipeline_example,
    "tests/launchers/golden/pipeline-codes.sbatch": lambda: pipeline_example("pipeline-codes"),
}


@pytest.mark.parametrize("path", RENDERED)
def test_rendered_file_is_the_one_in_the_repository(path: str) -> None:
    text = RENDERED[path]()
    if os.environ.get("TESSERA_WRITE_GOLDEN") == "1":
        Path(path).write_text(text, encoding="utf-8")
    assert text == Path(path).read_text(encoding="utf-8"), "changed on purpose? TESSERA_WRITE_GOLDEN=1 writes it again"


@pytest.mark.parametrize("path", [path for path in RENDERED if path.endswith(".sbatch")])
def test_bash_parses_the_script(path: str) -> None:
    subprocess.run(["bash", "-n"], input=RENDERED[path](), text=True, check=True, timeout=10)


def test_directives_stand_before_the_first_command() -> None:
    lines = slurm_script(SITE).splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])


def test_an_override_with_blanks_and_quotes_stays_one_argument() -> None:
    override = 'tracking.experiment=it\'s "mine" $HOME'
    script = slurm_script(SITE, override)
    line = next(line for line in script.splitlines() if "launchers.cli train" in line)
    shown = subprocess.run(
        ["bash", "-c", "printf '%s\\n' " + line.strip().removesuffix("|| status=$?")], capture_output=True, text=True
    )
    assert shown.stdout.splitlines()[-1] == override


FAULT = {"time": 1.0, "rank": 3, "host": "node2", "cause": "node", "why": "a device failed", "blamed": [3]}


def run_script(script: str, folder: Path, status: int, restarts: int, faults: Sequence[Any] = ()) -> tuple[int, str]:
    """Run a rendered script with stand-ins for Slurm's tools -> (exit code, what it asked of scontrol)."""
    tools, asked = folder / "bin", folder / "asked"
    tools.mkdir()
    written = "".join(json.dumps(fault) + "\\n" for fault in faults)
    (tools / "srun").write_text(f"#!/bin/bash\nprintf '{written}' >> {folder}/run/faults.jsonl\nexit {status}\n")
    (tools / "squeue").write_text("#!/bin/bash\necho 'node7'\n")
    (tools / "scontrol").write_text(
        f'#!/bin/bash\n[ "$1" = show ] && printf "node1\\nnode2\\n" || echo "$*" >> {asked}\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_RESTART_COUNT": str(restarts)}
    path = f"{tools}:{os.environ['PATH']}"
    done = subprocess.run(["bash"], input=script, text=True, timeout=30, env={**os.environ, **job, "PATH": path})
    return done.returncode, asked.read_text() if asked.exists() else ""


@pytest.mark.parametrize(
    ("status", "restarts", "asked"),
    [(0, 0, ""), (75, 0, "requeue 7\n"), (75, 20, ""), (64, 0, ""), (1, 0, ""), (70, 3, "requeue 7\n")],
)
def test_only_what_may_succeed_goes_back_into_the_queue_within_its_budget(
    status: int, restarts: int, asked: str, tmp_path: Path
) -> None:
    script = slurm_script(SITE.model_copy(update={"python": sys.executable}), f"run={tmp_path}/run")
    assert run_script(script, tmp_path, status, restarts) == (status, asked)
    assert (tmp_path / "run/job.end").read_text() == f"7 {restarts} {status}\n"


@pytest.mark.parametrize(("budget", "asked"), [(0, ""), (1, "requeue 7\nupdate JobId=7 ExcNodeList=node1,node7\n")])
def test_a_node_that_is_blamed_is_left_out_within_a_budget(budget: int, asked: str, tmp_path: Path) -> None:
    site = SITE.model_copy(update={"python": sys.executable, "max_excluded_nodes": budget})
    script = slurm_script(site, f"run={tmp_path}/run")
    assert run_script(script, tmp_path, 70, 0, [FAULT]) == (70, asked)


# -------------------------------------------------------------------------------- what no site can run, and seeds


def test_a_lead_that_fills_the_time_limit_is_refused() -> None:
    site = SITE.model_copy(update={"time_limit": "5", "signal_lead_s": 300})
    with pytest.raises(ConfigError, match=r"signal_lead_s=300 is not shorter than time_limit=5 \(300 s\)"):
        slurm_script(site)


def test_a_lead_shorter_than_a_save_was_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "attempt": 0, "step_s": 3.0, "save_s": 210.0}\n')
    site = SITE.model_copy(update={"signal_lead_s": 120})
    with pytest.raises(ConfigError, match=r"120 s lead, but in .* a step took 3 s and a save 210 s.* to 320"):
        slurm_script(site, f"run={tmp_path}")


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("30", 1800), ("30:15", 1815), ("2:00:01", 7201), ("1-0", 86400), ("1-2:30", 95400), ("1-0:0:5", 86405)],
)
def test_time_limits_are_read_as_slurm_reads_them(limit: str, seconds: int) -> None:
    assert seconds_of(limit) == seconds


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("24:00:00", 'write time_limit: "24:00:00", or "86400" for minutes'),
        ("1:30:00", 'write time_limit: "1:30:00", or "5400"'),
        ("90", 'write time_limit: "0:01:30", or "90" for minutes'),
        ("24h", "not a time limit of Slurm"),
        ("1.5", "not a time limit of Slurm"),
        ('"1:"', "not a time limit of Slurm"),
        ("yes", "not a time limit of Slurm"),
    ],
)
def test_a_time_limit_that_yaml_turns_into_a_number_is_explained(written: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(f"kind: slurm\ntime_limit: {written}\n")
    with pytest.raises(ConfigError) as refused:
        load_cluster(SlurmCluster, path)
    assert "time_limit = " in str(refused.value) and said in str(refused.value)


@pytest.mark.parametrize("written", ['"24:00:00"', "08:00:00", "1-12", '"90"'])
def test_a_time_limit_that_is_text_is_taken(written: str, tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(f"kind: slurm\ntime_limit: {written}\n")
    assert load_cluster(SlurmCluster, path).time_limit == written.strip('"')


def test_a_container_without_an_image_is_refused() -> None:
    with pytest.raises(ConfigError, match="without container_image"):
        slurm_script(SITE.model_copy(update={"container": "apptainer"}))


@pytest.mark.parametrize("seeds", ["a", "1-", "3,3", "2-1", "0-2,1"])
def test_seeds_that_are_no_list_of_numbers_are_refused(seeds: str) -> None:
    with pytest.raises(ConfigError, match=f"--seeds {seeds}"):
        slurm.render(describe(RECIPE, [], SITE), SITE, seeds)


def test_seeds_keep_their_checkpoints_apart_wherever_these_are() -> None:
    spec = describe(RECIPE, ["train.checkpoints=s3://bucket/clip"], SITE)
    assert ' train.checkpoints=s3://bucket/clip/seed-"$SLURM_ARRAY_TASK_ID" ||' in slurm.render(spec, SITE, seeds="0-3")


def test_seeds_are_for_training() -> None:
    with pytest.raises(ConfigError, match="seeds are for training"):
        slurm.render(describe(BUILD, [], SITE), SITE, seeds="0-3")


def test_more_processes_than_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match="a GPU serves one process, use --procs-per-node 4"):
        slurm.render(describe(RECIPE, [], SITE, 1, 8), SITE)


def step(run: Path) -> Step[SlurmCluster]:
    return Step("train", describe(RECIPE, [f"run={run}"], SITE), SITE)


def test_gpus_are_counted_in_gres_too() -> None:
    site = SlurmCluster(procs_per_node=8, gres="gpu:h100:4")
    with pytest.raises(ConfigError, match="more than gpus_per_node=4"):
        slurm.render(describe(RECIPE, [], site), site)


def test_submitting_without_sbatch_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no sbatch"):
        slurm.submit(step(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


Tool = Callable[[str, str], None]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tool:
    """Puts a script in the place of one of Slurm's tools."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")

    def make(name: str, script: str) -> None:
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    return make


def test_sbatch_refusing_is_shown_in_its_own_words(tool: Tool, tmp_path: Path) -> None:
    tool("sbatch", "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")
    with pytest.raises(ConfigError, match="invalid partition specified: gpu"):
        slurm.submit(step(tmp_path / "run"))


def test_sbatch_that_hangs_is_a_node_fault_that_names_the_way_out(
    tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launchers.slurm_jobs.TOOL_TIMEOUT_S", 0.3)
    tool("sbatch", "exec sleep 60")
    with pytest.raises(NodeFault, match=r"sbatch did not return within 0.3 s.*`squeue --me --name=run`"):
        slurm.submit(step(tmp_path / "run"))


SECOND_FAILS = (
    'echo >> "$0.calls"; [ "$(wc -l < "$0.calls")" = 1 ] && echo 7 || { echo "no such account" >&2; exit 1; }'
)


@pytest.mark.parametrize(
    ("scancel", "said"),
    [
        ('echo "$@" > "$0.calls"', "job 7 cancelled: no job of this launch is left in the queue"),
        (
            "echo 'Socket timed out' >&2; exit 1",
            "job 7 may be left in the queue (Socket timed out); once Slurm answers",
        ),
    ],
)
def test_what_became_of_the_steps_before_one_that_is_refused_is_said(
    scancel: str, said: str, tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool("sbatch", SECOND_FAILS)
    tool("scancel", scancel)
    steps = [replace(step(tmp_path / name), name=name) for name in ("first", "second")]
    with pytest.raises(ConfigError, match="no such account"):
        slurm.submit_all(steps)
    assert said in capsys.readouterr().err


def test_a_job_whose_number_cannot_be_noted_is_taken_back(
    tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool("sbatch", f"rm -r {tmp_path}/run; echo 7; touch {tmp_path}/run")
    tool("scancel", 'echo "$@" > "$0.calls"')
    with pytest.raises(DataError, match="/run: File exists"):
        slurm.submit(step(tmp_path / "run"))
    assert (tmp_path / "bin/scancel.calls").read_text() == "7\n" and "job 7 cancelled" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "label"),
    [("clip", "clip"), ("CLIP ViT_B/32", "clip-vit-b-32"), ("7b", "run-7b"), ("", "run"), ("a" * 70, "a" * 40)],
)
def test_job_names_are_dns_labels(text: str, label: str) -> None:
    assert dns_label(text) == label


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("clip-b", "clip-b"),
        ("Clip_B", "clip-b-%s"),
        ("clip.b", "clip-b-%s"),
        ("7b", "run-7b-%s"),
        ("a" * 40, "a" * 40),
        ("a" * 70, "a" * 33 + "-%s"),
        ("图片", "run-%s"),
        ("clip-图", "clip-%s"),
    ],
)
def test_what_a_label_leaves_out_of_a_name_is_in_its_digest(text: str, name: str) -> None:
    assert job_name(text) == name.replace("%s", hashlib.sha256(text.encode()).hexdigest()[:6])


@given(texts=st.lists(st.text(st.sampled_from("aA1_.图片é- "), min_size=1, max_size=60), min_size=2, max_size=2))
def test_names_that_differ_differ_as_jobs(texts: list[str]) -> None:
    one, other = map(job_name, texts)
    for label in (one, other):
        assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", label) and len(label) <= 40
    assert (one == other) == (texts[0] == texts[1])


@pytest.mark.parametrize("kind", ["long", "图片"])
def test_two_runs_on_kubernetes_have_objects_of_their_own(kind: str) -> None:
    stem = "a" * 60 if kind == "long" else kind
    cluster = KubernetesCluster(image="e.com/t:1", claims={"all": "/work"})
    names = {
        tree["metadata"]["name"]
        for run in (f"{stem}1", f"{stem}二")
        for tree in rendered(describe(RECIPE, [f"run=runs/{run}"], cluster), cluster)
    }
    assert len(names) == 2
