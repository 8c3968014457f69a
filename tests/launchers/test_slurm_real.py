"""The rendered script under a real Slurm: two nodes on this machine, started and ended by the fixture."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launchers import slurm
from launchers.spec import RunSpec, SlurmCluster

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(240)]
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "bc")
PACKAGES = "slurm-wlm slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins bc"

# Stands in for the interpreter: says where it is, and on the first attempt waits for the signal and leaves with 75.
PAYLOAD = """#!/bin/bash
echo "rank=$SLURM_PROCID local=$SLURM_LOCALID world=$SLURM_NTASKS at=$MASTER_ADDR:$MASTER_PORT attempt=$TESSERA_ATTEMPT"
echo "arguments: $*"
trap 'echo "rank $SLURM_PROCID saved"; exit 75' USR1
if [ "$TESSERA_ATTEMPT" = 0 ]; then for i in $(seq 600); do sleep 0.2; done; fi
exit "$(cat "$(dirname "$0")/status")"
"""


@pytest.fixture(scope="module")
def site(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a running Slurm of two nodes; SLURM_CONF points at it."""
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        message = f"{', '.join(missing)} missing; as root: apt-get install --no-install-recommends {PACKAGES}"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(message)
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("start.sh", "stop.sh"):
        shutil.copy(shared / "components" / "slurm" / name, folder)
    before = dict(os.environ)
    os.environ["SLURM_CONF"] = str(folder / "etc" / "slurm.conf")
    try:
        subprocess.run(["bash", str(folder / "start.sh")], env={**before, "N": "2"}, check=True, timeout=60)
        yield folder
    finally:
        subprocess.run(["bash", str(folder / "stop.sh")], timeout=60, check=False)
        os.environ.pop("SLURM_CONF")


def submit(folder: Path, status: int, procs: int = 1) -> tuple[str, Path]:
    """Submit the payload on two nodes -> (job id, output file). It leaves with `status` on its second attempt."""
    folder.mkdir()
    payload = folder / "payload"
    payload.write_text(PAYLOAD)
    payload.chmod(0o755)
    (folder / "status").write_text(str(status))
    cluster = SlurmCluster(
        nodes=2, cpus_per_proc=1, python=str(payload), output=str(folder / "out"), time_limit="10", signal_lead_s=60
    )
    spec = RunSpec("payload", "train", ("train", "recipe.yaml", "a=b c"), "hash", str(folder), 2, procs)
    return slurm.submit(spec, cluster)[0], folder / "out"


def wait_for_text(path: Path, text: str, count: int, seconds: float = 60) -> str:
    end = time.monotonic() + seconds
    while True:
        said = path.read_text() if path.exists() else ""
        if said.count(text) >= count:
            return said
        assert time.monotonic() < end, f"no {count} x {text!r} in: {said}"
        time.sleep(0.1)


def state(job: str) -> str:
    done = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.partition("JobState=")[2].split()[0]


def wait_for_state(job: str, wanted: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while state(job) != wanted:
        assert time.monotonic() < end, f"job {job} is {state(job)}, not {wanted}"
        time.sleep(0.2)


def test_a_signalled_job_saves_is_requeued_and_ends(site: Path) -> None:
    job, out = submit(site / "requeued", status=0, procs=2)
    first = wait_for_text(out, "attempt=0", 4)
    assert sorted(line.split()[0] for line in first.splitlines() if line.startswith("rank=")) == [
        f"rank={rank}" for rank in range(4)
    ]
    assert f"at=node1:{20000 + int(job) % 20000}" in first
    assert "arguments: -m launchers.cli train recipe.yaml a=b c" in first
    subprocess.run(["scancel", "--signal=USR1", job], check=True, timeout=20)
    said = wait_for_text(out, "attempt=1", 4, seconds=150)
    assert said.count("saved") == 4
    wait_for_state(job, "COMPLETED")


def test_a_wrong_partition_is_refused_in_the_schedulers_words(site: Path) -> None:
    spec = RunSpec("payload", "train", ("train", "recipe.yaml"), "hash", str(site / "refused"))
    with pytest.raises(slurm.ConfigError, match="partition"):
        slurm.submit(spec, SlurmCluster(partition="nowhere", cpus_per_proc=1))
