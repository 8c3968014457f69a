"""Batch scripts: golden files, the shell's own parser, and what is refused before anything is submitted.

After an intended change write the golden files again: `TESSERA_WRITE_GOLDEN=1 pytest tests/launchers/test_jobs.py`.
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError
from launchers import slurm
from launchers.spec import SlurmCluster, describe, dns_label, load_cluster

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


def build_example() -> str:
    site = SlurmCluster(cpus_per_proc=32, account="my-account", partition="cpu", time_limit="08:00:00")
    return slurm.render(describe(BUILD, ["workers=32"], site), site)


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


def run_script(script: str, folder: Path, status: int, restarts: int) -> tuple[int, bool]:
    """Run a rendered script with stand-ins for srun and scontrol -> (exit code, whether it asked for a requeue)."""
    tools = folder / "bin"
    tools.mkdir()
    (tools / "srun").write_text(f"#!/bin/bash\nexit {status}\n")
    (tools / "scontrol").write_text(f'#!/bin/bash\n[ "$1" = requeue ] && touch {folder}/requeued\necho node1\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_RESTART_COUNT": str(restarts)}
    path = f"{tools}:{os.environ['PATH']}"
    done = subprocess.run(["bash"], input=script, text=True, timeout=10, env={**os.environ, **job, "PATH": path})
    return done.returncode, (folder / "requeued").exists()


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"), [(0, 0, False), (75, 0, True), (75, 20, False), (64, 0, False), (70, 3, False)]
)
def test_only_a_saved_run_within_its_budget_goes_back_into_the_queue(
    status: int, restarts: int, requeued: bool, tmp_path: Path
) -> None:
    assert run_script(slurm_script(SITE), tmp_path, status, restarts) == (status, requeued)


def test_more_processes_than_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match="a GPU serves one process, use --procs-per-node 4"):
        slurm.render(describe(RECIPE, [], SITE, 1, 8), SITE)


def test_submitting_without_sbatch_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    spec = describe(RECIPE, [f"run={tmp_path}/run"], SITE, None, None)
    with pytest.raises(ConfigError, match="no sbatch"):
        slurm.submit(spec, SITE)
    assert not (tmp_path / "run").exists()


def test_sbatch_refusing_is_shown_in_its_own_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "sbatch"
    tool.write_text("#!/bin/bash\necho 'sbatch: error: invalid partition specified: gpu' >&2\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match="invalid partition specified: gpu"):
        slurm.submit(describe(RECIPE, [f"run={tmp_path}/run"], SITE, None, None), SITE)


@pytest.mark.parametrize(
    ("text", "label"),
    [("clip", "clip"), ("CLIP ViT_B/32", "clip-vit-b-32"), ("7b", "run-7b"), ("", "run"), ("a" * 70, "a" * 40)],
)
def test_job_names_are_dns_labels(text: str, label: str) -> None:
    assert dns_label(text) == label
