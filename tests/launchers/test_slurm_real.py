"""Jobs under a real Slurm: four nodes on this machine, started and ended by the fixture, with accounting.

One run is struck again and again, by everything that ends a job, and is then held against an undisturbed one; the other
tests are about what is beside it. Slurm's clock is coarse: it looks at time limits every 30 seconds.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launchers.watch import job_of, run_status
from tests.launchers.site import ACCOUNTING, NEEDED, PACKAGES, Site, port_block, running_site, wait_until
from tests.pretrain.commands import (
    ROOT,
    TIMEOUT_S,
    Material,
    ask_to_stop,
    command,
    electra,
    environment,
    interrupted,
    recipe,
    rows_of,
    tessera,
    vqgan,
)  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(900)]
STEPS = 100_000  # more than any of these runs makes
PLACE: dict[str, Any] = {
    "kind": "slurm", "nodes": 2, "cpus_per_proc": 1, "memory": "100", "time_limit": "20", "signal_lead_s": 100,
    "master_addr": "node_addr", "python": sys.executable,
    "env": {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
}  # fmt: skip


@pytest.fixture(scope="module")
def site(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A running Slurm of four nodes; SLURM_CONF points at it."""
    if missing := [name for name in (*NEEDED, *ACCOUNTING) if shutil.which(name) is None]:
        message = f"{', '.join(missing)} missing; as root: apt-get install --no-install-recommends {PACKAGES}"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(message)
    folder = tmp_path_factory.mktemp("slurm")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)  # jobs inherit the environment, in which earlier tests kept Ray on one machine
        with running_site(shared / "components" / "slurm", folder, nodes=4, accounting=True) as started:
            yield started


@dataclasses.dataclass(frozen=True)
class Desk:
    """Where a test writes what it launches, and the command line it does so with."""

    folder: Path
    material: Material

    def place(self, **changes: Any) -> Path:
        """A cluster file."""
        return recipe(PLACE | {"output": f"{self.folder}/%x-%j.out"} | changes, self.folder / "place.yaml")

    def recipe(self, name: str, **train: Any) -> tuple[Path, Path]:
        """-> (recipe of a tiny ELECTRA, its run folder)."""
        run = self.folder / name
        settings = {"steps": STEPS, "checkpoint_every_steps": 20, "collective_timeout_s": 60} | train
        return recipe(electra(self.material, run, **settings), self.folder / f"{name}.yaml"), run

    def launch(self, *arguments: str | Path) -> dict[str, Any]:
        """`tessera launch slurm`, which must succeed -> what it says."""
        done = tessera("launch", "slurm", *arguments, "--json")
        assert done.returncode == 0, done.stdout
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def outputs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.out")))


@pytest.fixture
def desk(site: Site, material: Material, tmp_path: Path) -> Desk:
    return Desk(tmp_path, material)


def reached(desk: Desk, run: Path, attempts: int) -> int:
    """Wait until `attempts` attempts have made steps, the newest five -> its last step."""

    def last() -> int:
        rows = rows_of(run)
        newest = [row["step"] for row in rows if row["attempt"] == rows[-1]["attempt"]]
        return newest[-1] if len({row["attempt"] for row in rows}) == attempts and len(newest) >= 5 else 0

    return int(wait_until(last, desk.outputs, 400))


def state_of(run: Path) -> str:
    return str(run_status(run)["state"])


# ------------------------------------------------------------------------------- one run, and all that befalls it


@dataclasses.dataclass(frozen=True)
class Story:
    """A run that was struck, what Slurm said of its job after each strike, and what `tessera stop` said."""

    run: Path
    recipe: Path
    output: str
    while_running: dict[str, Any]
    after: dict[str, dict[str, str]]
    stopped: dict[str, Any]


def strikes(site: Site, job: str) -> dict[str, Callable[[], Any]]:
    """Everything that ends a job without ending its run, the name of each first."""
    return {
        "preemption": lambda: site.tool("scancel", "--signal=USR1", job),
        "a rank killed": lambda: os.kill(site.rank(job, 1), signal.SIGKILL),
        "a node lost": lambda: site.lose(site.nodes_of(job)[1], job),
        "the time limit": lambda: reach_time_limit(site, job),
    }


def reach_time_limit(site: Site, job: str) -> None:
    """The limit is one to two minutes away now: Slurm announces it at its next look, and the save has time."""
    before = site.job(job)
    hours, minutes, _ = map(int, before["RunTime"].split(":"))
    site.tool("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 2}")
    wait_until(lambda: came_back(site.job(job), before), "the limit is not announced")
    site.tool("scontrol", "update", f"JobId={job}", f"TimeLimit={PLACE['time_limit']}")


def came_back(now: dict[str, str], before: dict[str, str]) -> bool:
    """Into the queue: whether it waits there, or has left it again."""
    return now["JobState"] == "PENDING" or now["Restarts"] != before["Restarts"]


@pytest.fixture(scope="module")
def story(site: Site, material: Material, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """The run is trained on two nodes, struck four times, and stopped."""
    desk = Desk(tmp_path_factory.mktemp("story"), material)
    config, run = desk.recipe("struck")
    job = desk.launch(config, "--cluster", desk.place())["job"]
    after: dict[str, dict[str, str]] = {}
    reached(desk, run, 1)
    while_running = run_status(run)
    for number, (name, strike) in enumerate(strikes(site, job).items()):
        before = site.nodes_of(job)
        strike()
        reached(desk, run, number + 2)
        after[name] = site.job(job) | {"before": " ".join(before), "now": " ".join(site.nodes_of(job))}
    site.restore(after["a node lost"]["before"].split()[1])
    done = tessera("stop", run, "--timeout-s", "300", "--json")
    assert done.returncode == 0, done.stdout + desk.outputs()
    return Story(run, config, desk.outputs(), while_running, after, json.loads(done.stdout.splitlines()[-1]))


def test_a_run_on_two_nodes_is_followed_while_it_trains(story: Story) -> None:
    told = story.while_running
    assert (told["state"], told["nodes"], told["steps"]) == ("running", "node[1-2]", STEPS)
    assert told["step"] >= 5 and Path(told["output"]).is_file()
    printed = tessera("logs", story.run, "--job", "--lines", "1000").stdout
    assert "electra: steps 0 to 100000, 2 processes, attempt 0" in printed and printed.count("srun: error:") >= 4


def test_every_strike_puts_the_same_job_back_into_the_queue(story: Story) -> None:
    assert [int(told["Restarts"]) for told in story.after.values()] == [1, 2, 3, 4]
    assert len({told["JobId"] for told in story.after.values()}) == 1


def test_the_node_of_a_rank_that_died_is_left_out_from_then_on(story: Story) -> None:
    struck = story.after["a rank killed"]
    blamed = struck["before"].split()[1]
    assert story.after["preemption"]["ExcNodeList"] == "(null)" and struck["ExcNodeList"] == blamed
    assert blamed not in struck["now"] and blamed not in story.after["the time limit"]["now"]
    assert f"rank 1 was killed by SIGKILL; requeued without {blamed}" in story.output


def test_a_job_whose_node_is_lost_goes_on_with_another_one(story: Story) -> None:
    struck = story.after["a node lost"]
    assert struck["before"].split()[1] not in struck["now"] and len(struck["now"].split()) == 2


def test_a_stopped_run_has_saved_and_does_not_come_back(story: Story) -> None:
    assert (story.stopped["state"], story.stopped["exit_code"], story.stopped["restarts"]) == ("stopped", 75, "4")
    saved = sorted(path.parent.name for path in (story.run / "checkpoints").glob("step-*/MANIFEST.json"))
    assert saved[-1].startswith(f"step-{story.stopped['step']:08d}.")


def test_the_struck_run_has_bitwise_the_losses_of_an_undisturbed_one(story: Story, tmp_path: Path) -> None:
    rows, undisturbed = rows_of(story.run), tmp_path / "undisturbed"
    last = max(row["step"] for row in rows)
    argv = command("launch", "local", story.recipe, "--procs-per-node", "2", f"run={undisturbed}")
    interrupted(argv, undisturbed, last, ask_to_stop)
    expected = {row["step"]: (row["loss_hex"], row["positions"]) for row in rows_of(undisturbed)}
    assert len({row["attempt"] for row in rows}) == 5 and {row["step"] for row in rows} == set(range(1, last + 1))
    assert [(row["step"], row["loss_hex"], row["positions"]) for row in rows] == [
        (row["step"], *expected[row["step"]]) for row in rows
    ]


# --------------------------------------------------------------------------------------- other ways to start


def test_torchrun_starts_the_processes_of_a_node_and_their_75_comes_through(site: Site, desk: Desk) -> None:
    config, run = desk.recipe("elastic")
    desk.launch(config, "--cluster", desk.place(start="torchrun"), "--procs-per-node", "1")
    reached(desk, run, 1)
    done = tessera("stop", run, "--json")
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["state"], told["exit_code"]) == ("stopped", 75), desk.outputs()
    assert "launchers.torchrun --nnodes=2 --nproc-per-node=1" in (run / "job.sbatch").read_text()


def test_an_array_trains_each_seed_in_a_folder_of_its_own(site: Site, desk: Desk) -> None:
    config, run = desk.recipe("seeds", steps=3)
    desk.launch(config, "--cluster", desk.place(nodes=1), "--seeds", "3,5")
    wait_until(lambda: state_of(run) == "done", desk.outputs, 400)
    losses = {seed: [row["loss_hex"] for row in rows_of(run / f"seed-{seed}")] for seed in (3, 5)}
    assert len(losses[3]) == len(losses[5]) == 3 and losses[3] != losses[5]
    assert run_status(run)["tasks"] == {"done": 2}
    assert json.loads((run / "seed-5" / "config.json").read_text())["seed"] == 5
    assert run_status(run / "seed-5")["state"] == "done"


def test_a_pipeline_builds_over_two_nodes_then_trains_then_evaluates(site: Site, desk: Desk) -> None:
    shards, folder = desk.folder / "shards", desk.folder
    build = recipe(
        {"source": {"kind": "scenes", "count": 200}, "output": str(shards), "shard_size": 50}, folder / "b.yaml"
    )
    config, run = desk.recipe("trained", steps=3)
    steps = [
        {"target": str(build), "name": "build"},
        {"target": str(config), "arguments": [f"data.dataset={shards}", f"data.evaluation={shards}"]},
        {"target": str(run), "task": "evaluate"},
    ]
    launched = desk.launch(recipe({"steps": steps}, folder / "p.yaml"), "--cluster", desk.place())["jobs"]
    assert site.job(launched[2]["job"])["Dependency"].startswith(f"afterok:{launched[1]['job']}")
    wait_until(lambda: state_of(Path(launched[2]["run"])) not in ("queued", "running"), desk.outputs, 600)
    assert [state_of(Path(job["run"])) for job in launched] == ["done"] * 3, desk.outputs()
    assert "Ray at 127.0.0.1" in desk.outputs() and ": 2 nodes" in desk.outputs()
    assert digests(shards) == digests(desk.material.dataset)
    assert "loss" in next(folder.glob("evaluate-*.out")).read_text()


def test_a_pipeline_trains_a_tokenizer_encodes_over_two_nodes_and_trains_on_the_codes(site: Site, desk: Desk) -> None:
    shards, folder, tokenizer = desk.folder / "shards", desk.folder, desk.folder / "tokenizer"
    scenes = {"source": {"kind": "scenes", "count": 200}, "output": str(shards), "shard_size": 50}
    material = dataclasses.replace(desk.material, dataset=shards)
    pictures = vqgan(material, folder / "vqgan")
    pictures["train"] |= {"steps": 3}
    steps = [
        {"target": str(recipe(scenes, folder / "b.yaml")), "nodes": 1},
        {"target": str(recipe(pictures, folder / "v.yaml")), "nodes": 1},
        {"target": str(folder / "vqgan"), "task": "export", "arguments": [str(tokenizer)]},
        {"target": str(shards), "task": "encode", "arguments": ["--image-tokenizer", str(tokenizer)]},
        {"target": str(recipe(gpt(material, folder / "gpt", tokenizer), folder / "g.yaml")), "nodes": 1},
    ]
    launched = desk.launch(recipe({"steps": steps}, folder / "p.yaml"), "--cluster", desk.place())["jobs"]
    wait_until(lambda: state_of(Path(launched[-1]["run"])) not in ("queued", "running"), desk.outputs, 800)
    assert [state_of(Path(job["run"])) for job in launched] == ["done"] * 5, desk.outputs()
    assert len(list(shards.glob("*.vq-*.bin"))) == 4 and len(rows_of(folder / "gpt")) == 3
    assert ": 2 nodes" in next(folder.glob("encode-*.out")).read_text()


def gpt(material: Material, run: Path, tokenizer: Path) -> dict[str, Any]:
    """A run of a tiny GPT over the codes of the tests' VQGAN: 8 x 8 of 32."""
    return electra(material, run, steps=3, zero_stage=0) | {
        "model": {
            "kind": "gpt", "text_vocab": 200, "image_vocab": 32, "text_tokens": 8, "image_tokens": 64, "layers": 1,
            "width": 32, "heads": 2,
        },
        "task": {"kind": "autoregressive"},
        "data": {
            "dataset": str(material.dataset), "text_tokenizer": str(material.vocabulary),
            "image_tokenizer": str(tokenizer),
        },
    }  # fmt: skip


def digests(dataset: Path) -> list[tuple[str, str]]:
    return [(shard["name"], shard["digest"]) for shard in json.loads((dataset / "manifest.json").read_text())["shards"]]


# ------------------------------------------------------------------------------------------- what goes wrong


def test_a_wrong_partition_is_refused_in_the_schedulers_words(site: Site, desk: Desk) -> None:
    config, _ = desk.recipe("refused")
    done = tessera("launch", "slurm", config, "--cluster", desk.place(partition="nowhere"))
    assert done.returncode == 64 and "invalid partition specified: nowhere" in done.stdout


def test_a_pipeline_whose_last_step_is_refused_leaves_nothing_in_the_queue(site: Site, desk: Desk) -> None:
    (first, run), (second, _) = desk.recipe("first"), desk.recipe("second")
    elsewhere = recipe(PLACE | {"partition": "nowhere"}, desk.folder / "elsewhere.yaml")
    steps = [{"target": str(first)}, {"target": str(second), "cluster": str(elsewhere)}]
    done = tessera("launch", "slurm", recipe({"steps": steps}, desk.folder / "p.yaml"), "--cluster", desk.place())
    assert done.returncode == 64 and "invalid partition" in done.stdout
    assert f"job {job_of(run)['job']} cancelled" in done.stdout
    wait_until(lambda: state_of(run) == "cancelled", "the first step is not cancelled")


def test_a_controller_that_nobody_reaches_is_a_fault_of_a_node(
    site: Site, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = desk.recipe("unheard")
    monkeypatch.setenv("SLURM_CONF", str(site.with_controller_at(port_block(1))))
    done = tessera("launch", "slurm", config, "--cluster", desk.place())
    assert done.returncode == 70, done.stdout
    assert "Unable to contact slurm controller" in done.stdout and "`scontrol ping`" in done.stdout
    assert not job_of(run)


def test_what_a_controller_that_froze_may_have_taken_is_said_and_true(site: Site, desk: Desk) -> None:
    """It reads later what it was sent: the job of the second step is there, that of the first is not."""
    (first, run), (second, _) = desk.recipe("before"), desk.recipe("during")
    steps = recipe({"steps": [{"target": str(first)}, {"target": str(second), "after": []}]}, desk.folder / "p.yaml")
    place = desk.place(options=["begin=now+1hour"])
    with site.frozen_controller():
        done = tessera("launch", "slurm", steps, "--cluster", place)
    assert done.returncode == 70 and "Socket timed out" in done.stdout, done.stdout
    assert f"once Slurm answers: scancel {job_of(run)['job']}" in done.stdout
    assert "`squeue --me --name=during` is empty" in done.stdout
    site.tool("scancel", job_of(run)["job"])
    wait_until(lambda: state_of(run) == "cancelled", "the first step is not cancelled")
    (left,) = site.tool("squeue", "--me", "--noheader", "--format=%i", "--name=during").split()
    site.tool("scancel", left)


@pytest.fixture
def waiting(site: Site, desk: Desk) -> Path:
    """The folder of a run whose job waits: it asks for a node that is not there."""
    config, run = desk.recipe("waiting")
    desk.launch(config, "--cluster", desk.place(options=["begin=now+1hour"]))
    return run


def test_a_job_that_waits_is_followed_refused_a_second_time_and_taken_back(waiting: Path, desk: Desk) -> None:
    told = run_status(waiting)
    assert (told["state"], told["reason"]) == ("queued", "BeginTime")
    again = tessera("launch", "slurm", desk.folder / "waiting.yaml", "--cluster", desk.folder / "place.yaml")
    assert again.returncode == 64 and "of this run is queued; `tessera stop" in again.stdout
    done = tessera("stop", waiting, "--json")
    assert json.loads(done.stdout.splitlines()[-1])["state"] == "cancelled"


def test_scancel_ends_a_run_for_good(site: Site, desk: Desk) -> None:
    config, run = desk.recipe("cancelled")
    job = desk.launch(config, "--cluster", desk.place(nodes=1))["job"]
    reached(desk, run, 1)
    site.tool("scancel", job)
    wait_until(lambda: state_of(run) == "cancelled", desk.outputs)
    assert list((run / "checkpoints").glob("step-*/MANIFEST.json"))  # SIGTERM, which scancel sends first, saves too


def test_a_job_is_known_after_the_controller_forgot_it(
    site: Site, desk: Desk, story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.forget_soon()
    job = job_of(story.run)["job"]
    forgotten = ["scontrol", "show", "job", job]
    wait_until(lambda: subprocess.run(forgotten, capture_output=True, timeout=60).returncode, "still known")
    assert run_status(story.run)["slurm_state"] == "FAILED"  # sacct knows
    monkeypatch.setenv("SLURM_CONF", str(site.without_accounting()))
    told = run_status(story.run)  # what the script left behind
    assert (told["state"], told["exit_code"], "slurm_state" in told) == ("stopped", 75, False)
    (story.run / "job.end").unlink()
    vanished = tessera("status", story.run)
    assert vanished.returncode == 70 and "Slurm no longer lists it" in vanished.stdout


def test_preflight_may_be_started_by_srun(site: Site, tmp_path: Path) -> None:
    """Two tasks on two nodes; that one of them is slow, on a machine where others work too, is none of this test."""
    place = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--mem=100"]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port_block(1))}
    argv = ["srun", *place, *command("preflight", "--json", "--timeout", "60")]
    done = subprocess.run(  # srun's own words would stand in the middle of the line
        argv, env=environment(**where), cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    told = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert told["world"] == 2 and set(told["reports"]) == {"0", "1"}
    assert [finding for finding in told["findings"] if not finding["text"].startswith("slow")] == []
    assert done.returncode == 0 or told["findings"]
