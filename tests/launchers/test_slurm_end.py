"""What the end of a job's attempt means: a table of what srun left with and what the ranks had written."""

import json
from pathlib import Path
from typing import Any

import pytest

from launchers.slurm_end import EXCLUDED, blamed_ranks, main

LOST = {"time": 2.0, "cause": "node", "why": "rank 0 lost a peer", "rank": 0}
USER = {"time": 1.0, "cause": "user code", "why": "ValueError: no", "rank": 1}
FULL = {"time": 1.0, "cause": "storage", "why": "disk full", "rank": 1}
HANG = {"time": 1.0, "cause": "node", "why": "rank 2 hangs", "rank": 0, "blamed": [2]}


def write(path: Path, faults: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(fault) + "\n" for fault in faults))


def ask(
    run: Path, status: int, faults: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], **more: str
) -> tuple[str, str]:
    """Two nodes of two ranks -> (verdict, what is said about it)."""
    write(run / "faults.jsonl", faults)
    options = {
        "job": "7", "status": str(status), "faults-from": "0", "metrics-before": "0", "nodes": "red\nblue", "out": "",
        "procs-per-node": "2", "may-exclude": "2",
    } | {name.replace("_", "-"): value for name, value in more.items()}  # fmt: skip
    main([str(run), *(f"--{name}={value}" for name, value in options.items())])
    out, err = capsys.readouterr()
    return out.strip(), err


@pytest.mark.parametrize(
    ("status", "faults", "verdict", "why"),
    [
        (75, [], "requeue", "cause preemption: stopped and saved"),
        (138, [], "requeue", "cause preemption: time limit reached"),
        (64, [], "end", "cause configuration"),
        (74, [], "end", "cause storage"),
        (1, [], "end", "cause user code: rank 0 exited with code 1"),
        (70, [], "requeue", "cause node: rank 0 exited with code 70"),
        (70, [HANG], "requeue blue", "rank 2 hangs; requeued without blue"),
        (137, [LOST, LOST | {"rank": 1}], "requeue blue", "cause node: rank 2 was killed by SIGKILL"),
        (70, [LOST, USER], "end", "cause user code: ValueError: no; not requeued"),
        (74, [FULL, LOST], "end", "cause storage: disk full"),
    ],
)
def test_an_end_is_judged_by_what_the_ranks_wrote_first(
    status: int,
    faults: list[dict[str, Any]],
    verdict: str,
    why: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found, said = ask(tmp_path, status, faults, capsys)
    assert found == verdict and why in said


def test_storage_that_worked_is_worth_another_attempt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert ask(tmp_path, 74, [FULL], capsys)[0] == "requeue"
    assert ask(tmp_path, 74, [FULL], capsys, metrics_before="12")[0] == "end"


def test_faults_of_earlier_attempts_do_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    length = len(json.dumps(USER)) + 1
    assert ask(tmp_path, 75, [USER], capsys, faults_from=str(length))[0] == "requeue"


def test_nodes_are_left_out_within_a_budget_beside_those_that_the_site_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(tmp_path, 70, [HANG], capsys, out="green[1-2]")[0] == "requeue blue,green[1-2]"
    assert ask(tmp_path, 70, [HANG], capsys, nodes="red white", out="blue,green[1-2]")[0].startswith("requeue white,")
    assert ask(tmp_path, 70, [HANG], capsys, nodes="red black")[0] == "end"
    assert ask(tmp_path, 70, [HANG], capsys, nodes="red black", job="8")[0] == "requeue black"
    told = [json.loads(line)["nodes"] for line in (tmp_path / EXCLUDED).read_text().splitlines()]
    assert told == [["blue"], ["white"], ["black"]]


def test_silence_is_blamed_only_where_most_spoke() -> None:
    assert blamed_ranks([LOST], 2) == [1]
    assert blamed_ranks([LOST], 4) == [] == blamed_ranks([], 2)
    assert blamed_ranks([LOST, HANG], 8) == [2]


CRASH = """Fatal Python error: Aborted

Thread 0x00007f0000000001 (most recent call first):
  File "/site/threading.py", line 331 in wait

Current thread 0x00007f0000000002 (most recent call first):
  File "{where}", line 190 in decode
  File "/site/pretrain/inputs/feed.py", line 70 in at

Thread 0x00007f0000000003 (most recent call first):
  File "/site/data_pipeline/images.py", line 190 in decode
"""


@pytest.mark.parametrize(
    ("where", "attempt", "verdict"),
    [
        ("/site/data_pipeline/images.py", 3, "requeue"),
        ("/site/torch/autograd/graph.py", 3, "requeue blue"),  # an image was decoded meanwhile, elsewhere
        ("/site/data_pipeline/images.py", 2, "requeue blue"),  # of an attempt before
    ],
)
def test_the_node_of_a_rank_that_an_image_killed_stays(
    where: str, attempt: int, verdict: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "attempts.jsonl").write_text('{"attempt": 3, "time": 1.0}\n')
    (tmp_path / "faults").mkdir()
    for rank in (2, 3):
        (tmp_path / f"faults/attempt-{attempt:05d}.rank-{rank:05d}.txt").write_text(CRASH.format(where=where))
    found, said = ask(tmp_path, 134, [LOST, LOST | {"rank": 1}], capsys)
    assert found == verdict and "rank 2 was killed by SIGABRT" in said
    assert ("while decoding an image" in said) == (verdict == "requeue")
