"""`tessera preflight` with real ranks on this machine, and what is really wrong with one of them: it is named.

The ranks run at the priority that root may give, so that other programs of the machine do not make one of them slow.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.settings import load_settings
from launchers.chaos.proxy import CLEAN, fault_proxy
from launchers.local import free_port
from pretrain.config import RunConfig
from pretrain.inputs.source import open_data
from pretrain.runtime import probes
from tests.gateway import OTHER, Gateway
from tests.pretrain.checkpoint.simulated import mesh_of
from tests.pretrain.commands import ROOT, Material, command, electra, environment, recipe

pytestmark = [pytest.mark.slow, pytest.mark.real]
TIMEOUT_S = 150
FAKETIME = "faketime"

STOPS_ITSELF = """
import os, signal, socket, time
from launchers.cli import main
from pretrain.runtime import probes

trial = probes.storage

def stop_first(*asked):
    os.kill(os.getpid(), signal.SIGSTOP)
    return trial(*asked)

probes.storage = stop_first
print("ready", flush=True)
while os.environ["RANK"] != "0":
    try:
        socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))).close()
        break
    except OSError:
        time.sleep(0.01)
main()
"""
"""The same command, and it stops where its storage is to be tried: from outside that moment is too short to hit.

It says when it is ready to meet rank 0, and does so as soon as that is there: neither waits while the other one loads.
"""


def need(there: bool, remedy: str) -> None:
    """Skip what cannot be had here; in CI everything can."""
    if not there:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(remedy)


def first() -> None:
    """Run before others."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -15)


def start(argv: list[str], **extra: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        argv, cwd=ROOT, env=environment(**extra), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=first,
    )  # fmt: skip


def ended(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """-> (exit code, what was said)."""
    try:
        out, said = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    return process.returncode, out + said


def preflight(*arguments: str | Path, **extra: str) -> tuple[int, str]:
    return ended(start(command("preflight", *arguments), **extra))


def rank_of(
    rank: int, world: int, port: int, *arguments: str | Path, program: Sequence[str] = ("-m", "launchers.cli")
) -> "subprocess.Popen[str]":
    """One rank alone, as srun or torchrun would start it."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    named = {name: str(value) for name, value in place.items()}
    return start([sys.executable, *program, "preflight", *map(str, arguments)], **named)


def told(text: str) -> dict[str, Any]:
    """The JSON that rank 0 printed."""
    return dict(json.loads(next(line for line in text.splitlines() if line.startswith("{"))))


def blamed(text: str) -> list[tuple[str, list[int]]]:
    return [(finding["check"], finding["ranks"]) for finding in told(text)["findings"]]


@pytest.fixture
def config(material: Material, tmp_path: Path) -> Path:
    return recipe(electra(material, tmp_path / "run"), tmp_path / "run.yaml")


# ------------------------------------------------------------------------------------------- no findings


def test_a_healthy_machine_passes_and_nothing_is_left_behind(config: Path, tmp_path: Path) -> None:
    code, text = preflight(config, "--procs-per-node", "2")
    assert code == 0, text
    for check in ("clock", "program", "data", "storage", "disk", "health", "matmul", "all-reduce", "barrier", "link"):
        assert f" {check} " in text
    assert "FAILED" not in text and "2 of 2 ranks on 1 hosts" in text and "no findings" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"]


def test_one_process_without_a_configuration_looks_at_its_device_alone() -> None:
    code, text = preflight("--procs-per-node", "1", "--json")
    assert code == 0, text
    assert set(told(text)["reports"]["0"]["values"]) == {"clock", "program", "health", "matmul"}


def test_torchrun_may_start_it() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    code, text = ended(start([*torchrun, "-m", "launchers.cli", "preflight", "--json"]))
    assert code == 0, text
    assert told(text)["world"] == 2


# ------------------------------------------------------------------------------------ what one rank has


def test_a_rank_on_a_busy_core_is_named(tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    need(len(cores) > 1, "needs two cores: one to be busy, one not")
    hog = [sys.executable, "-c", f"import os\nos.sched_setaffinity(0, {{{cores[1]}}})\nwhile True: pass"]
    hogs = [subprocess.Popen(hog, preexec_fn=first) for _ in range(4)]
    port = free_port()
    try:
        ranks = [rank_of(rank, 2, port, "--json") for rank in (0, 1)]
        for rank, process in enumerate(ranks):
            os.sched_setaffinity(process.pid, {cores[rank]})
        outcome = [ended(process) for process in ranks]
    finally:
        for process in hogs:
            process.kill()
            process.wait(10)
    assert [code for code, _ in outcome] == [70, 70], outcome
    assert ("matmul", [1]) in blamed(outcome[0][1])


def test_another_configuration_and_another_dataset_on_one_rank_are_named(
    material: Material, config: Path, tmp_path: Path
) -> None:
    """The other dataset lies under the same name on its node: as a copy that is out of date does."""
    tree = electra(material, tmp_path / "run")
    tree["data"]["dataset"] = str(tmp_path / "data")
    mine = recipe(tree, tmp_path / "mine.yaml")
    tree["seed"] = 7
    other = recipe(tree, tmp_path / "other.yaml")
    shutil.copytree(material.dataset, tmp_path / "data")
    shutil.copytree(material.dataset, tmp_path / "stale")
    manifest = json.loads((tmp_path / "stale/manifest.json").read_text())
    manifest["shards"].pop()
    manifest["samples"] = sum(shard["n"] for shard in manifest["shards"])
    (tmp_path / "stale/manifest.json").write_text(json.dumps(manifest))
    own = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"']
    port = free_port()
    ranks = [rank_of(rank, 3, port, mine, "--json") for rank in (0, 1)]
    place = {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    argv = [*own, str(tmp_path / "stale"), str(tmp_path / "data"), *command("preflight", other, "--json")]
    ranks.append(start(argv, **place))
    outcome = [ended(process) for process in ranks]
    assert [code for code, _ in outcome] == [74, 74, 74], outcome
    assert blamed(outcome[0][1]) == [("program", [2]), ("data", [2])]


def test_a_clock_that_is_off_is_named() -> None:
    need(shutil.which(FAKETIME) is not None, f"apt-get install --no-install-recommends {FAKETIME}")
    port = free_port()
    ranks = [rank_of(rank, 3, port, "--json") for rank in (0, 1)]
    place = {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    argv = [FAKETIME, "-m", "--exclude-monotonic", "-f", "-90s", *command("preflight", "--json")]
    ranks.append(start(argv, **place))
    outcome = [ended(process) for process in ranks]
    assert outcome[0][0] == 70, outcome
    assert [pair for pair in blamed(outcome[0][1]) if pair[0] == "clock"] == [("clock", [2])]
    assert "-90.0 s off most others'" in outcome[0][1]


# ---------------------------------------------------------------------------------------- who is not there


def test_a_rank_that_never_comes_is_named_at_the_deadline() -> None:
    port, began = free_port(), time.monotonic()
    ranks = [rank_of(rank, 3, port, "--timeout", "10") for rank in (0, 2)]
    outcome = [ended(process) for process in ranks]
    assert [code for code, _ in outcome] == [70, 70], outcome
    assert "1 of 3 ranks did not join" in outcome[0][1] and "rank 1; check their nodes" in outcome[0][1]
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_rank_that_stops_on_the_way_is_named_and_not_waited_for(frozen: int, config: Path) -> None:
    """The one that stops has the time that the other one takes to start; the other one does not wait so long."""
    port = free_port()
    stopped = rank_of(frozen, 2, port, config, "--timeout", str(TIMEOUT_S), "--json", program=("-c", STOPS_ITSELF))
    try:
        assert stopped.stdout is not None and stopped.stdout.readline() == "ready\n"
        code, text = ended(rank_of(1 - frozen, 2, port, config, "--timeout", "6", "--json"))
        assert state_of(stopped) == "T"
    finally:
        stopped.kill()
        stopped.communicate(timeout=20)
    assert code == 70, text
    if frozen == 1:
        assert ("join", [1]) in blamed(text)
        assert "rank 1 is missing, last seen at 'storage'" in text
    else:
        assert "check the node of rank 0" in text


def state_of(process: "subprocess.Popen[str]") -> str:
    """As the kernel names it: T is stopped."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


# ------------------------------------------------------------------------------------------------ storage


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, timeout=10)
    need(done.returncode == 0, f"mounting needs root: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True, timeout=10)


def look(config: Path, *overrides: str) -> None:
    """What a rank looks at alone, in this process: raises what the rank would report."""
    asked = load_settings(RunConfig, config, overrides)
    probes.data(asked, mesh_of(), open_data)
    probes.storage(asked, mesh_of())
    probes.disk(asked, mesh_of())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("ro", "Read-only file system"),
        ("size=64k", "No space left on device"),
        ("size=2m", "3 checkpoints need"),
    ],
)
def test_storage_that_takes_nothing_or_too_little_is_said(
    options: str, said: str, config: Path, tmp_path: Path
) -> None:
    with mounted(tmp_path / "disk", options) as folder, pytest.raises(DataError, match=said):
        look(config, f"train.checkpoints={folder}/here", "model.width=128")


def test_a_dataset_that_is_cut_off_is_said(material: Material, config: Path, tmp_path: Path) -> None:
    shutil.copytree(material.dataset, tmp_path / "data")
    shard = tmp_path / "data/00001.tar"
    os.truncate(shard, shard.stat().st_size - 512)
    with pytest.raises(DataError, match="the manifest has"):
        look(config, f"data.dataset={tmp_path}/data")


def test_a_vocabulary_that_does_not_fit_the_model_is_64(config: Path) -> None:
    with pytest.raises(ConfigError, match="200 pieces, the model has 100"):
        look(config, "model.vocab_size=100")


def test_an_image_tokenizer_that_is_not_there_is_said(material: Material, config: Path, tmp_path: Path) -> None:
    tree = electra(material, tmp_path / "gpt")
    tree["model"] = {"kind": "gpt", "text_vocab": 200, "image_tokens": 64, "layers": 1, "width": 32, "heads": 2}
    tree |= {"task": {"kind": "autoregressive"}}
    tree["data"]["image_tokenizer"] = str(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"nowhere/config\.json does not exist"):
        look(recipe(tree, tmp_path / "gpt.yaml"))


def test_a_bucket_without_the_right_to_write_is_74(config: Path, gateway: Gateway, bucket: str) -> None:
    gateway.allow(bucket.removeprefix("s3://"), ["s3:ListBucket"])
    code, text = preflight(config, f"train.checkpoints={bucket}/c", "--procs-per-node", "1", **OTHER)
    assert code == 74, text
    assert "permission denied" in text and bucket in text


def test_a_bucket_without_the_right_to_delete_is_said(
    config: Path, gateway: Gateway, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    look(config, f"train.checkpoints={bucket}/c")  # its owner may
    gateway.allow(bucket.removeprefix("s3://"), ["s3:ListBucket", "s3:GetObject", "s3:PutObject"])
    for name, value in OTHER.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DataError, match="permission denied"):
        look(config, f"train.checkpoints={bucket}/c")


def test_a_server_that_overwrites_what_should_only_be_created_is_said(
    config: Path, gateway: Gateway, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The gateway behind a proxy that drops the condition; unsigned, since a signature would cover it."""
    gateway.allow_everybody(bucket.removeprefix("s3://"))
    for name in OTHER:
        monkeypatch.delenv(name)
    nobody = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_SHARED_CREDENTIALS_FILE": f"{tmp_path}/none"}
    with fault_proxy(gateway.port, lambda *_: CLEAN, drop=b"if-none-match") as proxy:
        for name, value in {**nobody, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(DataError, match="exclusive creation overwrites"):
            look(config, f"train.checkpoints={bucket}/c")
