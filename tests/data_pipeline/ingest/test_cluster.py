"""Real Ray, embedded and on several nodes: kills of every kind, what is in flight, and an actor that cannot start."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_pipeline import workers
from data_pipeline.config import BuildConfig
from data_pipeline.errors import ConfigError, DataError, NodeFault
from data_pipeline.ingest.run import build
from data_pipeline.settings import check_settings
from data_pipeline.shards.codes import encode_dataset
from data_pipeline.workers import ray_session, run_tasks
from tests.data_pipeline.ingest import campaign
from tests.data_pipeline.ingest.cluster import Nodes, below, command_of, kill, nodes, wait_for

pytestmark = [pytest.mark.real, pytest.mark.slow]

COUNT, SHARD = 2000, 100
TREE = {"source": {"kind": "scenes", "count": COUNT}, "shard_size": SHARD}
LONG = {"kind": "scenes", "count": 20 * COUNT}
"""A source for a build that is looked at or ended on its way: a fast one would be done before."""
DRIVER = """
import json, sys
from data_pipeline.ingest.run import build
from data_pipeline.config import BuildConfig
from data_pipeline.errors import TesseraError
from data_pipeline.settings import check_settings
try:
    build(check_settings(BuildConfig, json.loads(sys.argv[1]), "driver"), progress=False)
except TesseraError as error:
    sys.exit(f"{error.exit_code} {error}")
"""


IMPATIENT = """
import json, sys
from data_pipeline.errors import TesseraError
from data_pipeline.workers import in_driver
from tests.data_pipeline.ingest.test_cluster import impatient_build
try:
    in_driver(impatient_build, json.loads(sys.argv[1]))
except TesseraError as error:
    sys.exit(f"{error.exit_code} {error}")
"""


def impatient_build(tree):
    """Waits two seconds for a node, and for Ray to be left."""
    workers._WITHOUT_ROOM_S = workers._LEAVE_S = 2.0
    build(check_settings(BuildConfig, tree, "driver"), progress=False)


def run_with_a_token(words, cwd=campaign.REPOSITORY) -> "subprocess.Popen[str]":
    """A driver with a token of its user's own. (Ray keeps one in the memory of its process: this one has none.)"""
    return subprocess.Popen(
        words,
        cwd=cwd,
        env=os.environ | {"RAY_AUTH_TOKEN": "0123456789abcdef" * 4},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def start(output, program=DRIVER, **more) -> "subprocess.Popen[str]":
    tree = {**TREE, "output": str(output), **more}
    return run_with_a_token([sys.executable, "-c", program, json.dumps(tree)])


@pytest.fixture(scope="module")
def cluster():
    """A head and two nodes with one CPU each, which ask for no token."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in campaign.HEALTH.items():
            patch.setenv(name, value)
        with nodes(2, 1) as started:
            yield started


def shards_in(output) -> int:
    return len(list(Path(output).glob("*_stats.json")))


def test_a_build_joins_a_cluster_and_outlives_one_of_its_nodes(cluster: Nodes, build_here, tmp_path, tree_digests):
    build_here(**TREE, output=f"{tmp_path}/whole")
    driver = start(tmp_path / "out", workers=2, ray_address=cluster.address)
    working = lambda n: any(b"ray::build_shard" in command_of(pid) for pid in cluster.processes(n))  # noqa: E731
    wait_for(lambda: shards_in(tmp_path / "out") >= 2 and working(0) and working(1), "both nodes at work")
    assert not [pid for pid in below(driver.pid) if b"raylet" in command_of(pid)], "it started a Ray of its own"
    cluster.lose(1)
    assert shards_in(tmp_path / "out") < COUNT // SHARD
    _, said = driver.communicate(timeout=240)
    assert driver.returncode == 0, said[-2000:]
    cluster.replace(1)
    assert tree_digests(tmp_path / "out") == tree_digests(tmp_path / "whole")


def test_relative_paths_name_on_a_cluster_what_they_name_without_one(tmp_path, tree_digests, make_png, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(campaign.REPOSITORY))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.png").write_bytes(make_png())
    rows = [{"image": image, "caption": text} for image, text in (("0.png", "a"), ("gone.png", "b"), ("0.png", "bad"))]
    (tmp_path / "in/x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "deny.txt").write_text("bad")
    source = {"kind": "jsonl", "path": "in/x.jsonl"}
    tree = {"source": source, "captions": {"deny": "deny.txt"}, "dedup": {"exact": True}, "workers": 1}
    with nodes(1, 1) as own:
        for output, more in {"alone": {}, "joined": {"ray_address": own.address}}.items():
            words = [sys.executable, "-c", DRIVER, json.dumps({**tree, "output": output, **more})]
            driver = run_with_a_token(words, cwd=tmp_path)
            _, said = driver.communicate(timeout=120)
            assert driver.returncode == 0, said[-2000:]
    assert tree_digests(tmp_path / "joined") == tree_digests(tmp_path / "alone")


def test_an_embedded_build_leaves_a_cluster_on_its_machine_alone(cluster: Nodes, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    driver = start(tmp_path / "out", source={"kind": "scenes", "count": 200})
    wait_for(lambda: shards_in(tmp_path / "out") >= 1, "a shard")
    assert not any(b"ray::build_shard" in command_of(pid) for n in range(2) for pid in cluster.processes(n))
    _, said = driver.communicate(timeout=240)
    assert driver.returncode == 0, said[-2000:]


def test_an_embedded_ray_listens_on_the_loopback_address_alone_and_has_the_priority_of_the_command(tmp_path):
    driver = start(tmp_path / "out", source=LONG)
    wait_for(lambda: shards_in(tmp_path / "out") >= 1, "a shard")
    own = {driver.pid, *below(driver.pid)}
    working = [pid for pid in own if command_of(pid).startswith(b"ray::")]
    assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in working} == {os.getpriority(os.PRIO_PROCESS, 0)}
    listening = {c.laddr.ip for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in own}
    driver.kill()
    driver.communicate(timeout=30)
    assert listening and listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_a_driver_whose_ray_died_leaves_with_the_code_of_a_node_fault_and_is_resumed(
    build_here, tmp_path, tree_digests
):
    driver = start(tmp_path / "out")
    wait_for(lambda: shards_in(tmp_path / "out") >= 2, "two shards")
    raylets = [pid for pid in below(driver.pid) if command_of(pid).split(b"\0")[0].endswith(b"/raylet")]
    kill(raylets + [pid for raylet in raylets for pid in below(raylet)])
    _, said = driver.communicate(timeout=240)
    assert "70 Ray's process on this machine died" in said
    build_here(**TREE, output=f"{tmp_path}/whole")
    build_here(**TREE, output=f"{tmp_path}/out")
    assert tree_digests(tmp_path / "out") == tree_digests(tmp_path / "whole")


def command(folder, **more) -> "subprocess.Popen[str]":
    """The same by the command line."""
    (folder / "build.yaml").write_text(json.dumps({**TREE, "output": f"{folder}/out", **more}))
    return run_with_a_token([sys.executable, "-m", "launchers.cli", "data", "build", f"{folder}/build.yaml", "--json"])


def stop_answering(started, output):
    """Ray's node of this driver answers no more, as on a machine that starves -> its process."""
    wait_for(lambda: shards_in(output) >= 1, "a shard")
    (raylet,) = [pid for pid in below(started.pid) if command_of(pid).split(b"\0")[0].endswith(b"/raylet")]
    os.kill(raylet, signal.SIGSTOP)
    return raylet


@pytest.fixture
def soon_given_up(monkeypatch):
    """Ray gives up a node of its own that does not answer for some seconds."""
    for name, value in {**campaign.HEALTH, "RAY_health_check_timeout_ms": "1000"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("soon_given_up")
def test_a_driver_whose_node_never_answers_again_leaves_with_70(tmp_path):
    started = start(tmp_path / "out", program=IMPATIENT, source=LONG)
    stop_answering(started, tmp_path / "out")
    _, said = started.communicate(timeout=240)
    assert "none of the 0 live nodes" in said and "\n70 " in said, said[-2000:]


@pytest.mark.usefixtures("soon_given_up")
def test_a_driver_whose_node_was_given_up_leaves_with_70(tmp_path):
    started = command(tmp_path, source=LONG)
    raylet = stop_answering(started, tmp_path / "out")
    assert any("none of the 0 live nodes" in line for line in started.stderr)
    os.kill(raylet, signal.SIGCONT)
    _, said = started.communicate(timeout=240)
    assert started.returncode == 70 and "run the same command again" in said, (started.returncode, said[-2000:])


def test_a_driver_that_joined_leaves_with_70_when_its_own_node_dies(tmp_path):
    with nodes(1, 1) as own:
        started = command(tmp_path, ray_address=own.address, source=LONG)
        wait_for(lambda: shards_in(tmp_path / "out") >= 1, "a shard")
        own.lose_own()
        _, said = started.communicate(timeout=240)
    assert started.returncode == 70 and "run the same command again" in said, (started.returncode, said[-2000:])


def test_a_cluster_that_lost_every_node_is_waited_for_and_this_is_said(cluster: Nodes, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_WITHOUT_ROOM_S", 3.0)
    started = command(tmp_path, ray_address=cluster.address)
    wait_for(lambda: shards_in(tmp_path / "out") >= 1, "a shard")
    for number in range(cluster.count):
        cluster.lose(number)
    assert any("none of the 1 live nodes" in line for line in started.stderr)
    with pytest.raises(NodeFault, match="none of the 1 live nodes.*add a node"), ray_session(1, cluster.address):
        import ray

        list(run_tasks(ray.remote(lambda item: item).remote, [0], 1))
    for number in range(cluster.count):
        cluster.replace(number)
    _, said = started.communicate(timeout=240)
    assert started.returncode == 0, said[-2000:]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no-such-host.invalid:6379", "nonsense"])
def test_a_cluster_that_does_not_answer_is_named(address):
    with pytest.raises((NodeFault, ConfigError), match=f"ray_address={address}"), ray_session(1, address):
        pass


def test_what_answers_and_is_no_cluster_is_a_node_fault(monkeypatch):
    import ray

    def refused(*_, **__):
        raise ConnectionError("Failed to connect to Ray cluster")

    monkeypatch.setattr(ray, "init", refused)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(NodeFault, match=f"ray_address={address}: Failed to connect"), ray_session(1, address):
            pass


def test_a_ray_that_does_not_start_in_time_is_a_node_fault(monkeypatch):
    import ray

    def late(*_, **__):
        raise Exception("The current node timed out during startup.")  # what Ray raises after 30 s

    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(NodeFault, match="Ray did not start here: .*timed out.*load"), ray_session(1):
        pass


def test_a_bounded_number_of_tasks_is_in_flight_however_many_there_are(cluster: Nodes):
    import ray

    memory, most = [], 0
    with ray_session(2, cluster.address):
        task = ray.remote(lambda item: bytes(50_000))
        waiting = set()

        def submit(item):
            waiting.add(item)
            return task.remote(item)

        for done, (item, _) in enumerate(run_tasks(submit, range(3000), 2)):
            most = max(most, len(waiting))
            waiting.remove(item)
            if done in (500, 2999):
                memory.append(psutil.Process().memory_info().rss)
    assert most <= 4
    assert memory[1] - memory[0] < 3000 * 50_000 / 4  # none of the results is kept


def test_a_fetched_build_is_the_same_after_kills_of_every_kind(tmp_path, monkeypatch):
    for name, value in campaign.HEALTH.items():
        monkeypatch.setenv(name, value)
    killed = campaign.run(tmp_path, kills=3, workers=[2], seed=5, rows=200, each=2, where=str(tmp_path))
    assert killed.total() == 3


def test_a_build_onto_the_gateway_is_the_local_one_after_kills(tmp_path, bucket):
    killed = campaign.run(tmp_path, kills=2, workers=[2], seed=3, rows=200, each=2, where=f"{bucket}/campaign")
    assert killed.total() == 2


class Here:
    """A tokenizer that this process can load and no worker can."""

    id, image_size, codes_per_image, codebook_size = "0123456789ab", 8, 1, 2


def only_here(directory):
    if Path(directory, "pid").read_text() == str(os.getpid()):
        return Here()
    raise DataError(f"{directory}: the weights are damaged; export the tokenizer again")


def test_an_actor_that_cannot_load_its_tokenizer_ends_as_that_error(scenes, tmp_path):
    (tmp_path / "pid").write_text(str(os.getpid()))
    start = time.monotonic()
    with pytest.raises(DataError, match="the weights are damaged"):
        encode_dataset(scenes, only_here, tmp_path, workers=1, progress=False)
    assert time.monotonic() - start < 200
