"""Who is to blame, out of reports that are written down here by hand."""

import io
from typing import Any

import pytest
from rich.console import Console

from data_pipeline.errors import NodeFault
from launchers.findings import exit_code, judge, show
from pretrain.runtime.probes import peers_of, read_health


def report(host: str = "a", **values: dict[str, Any]) -> dict[str, Any]:
    return {"host": host, "values": values, "errors": {}}


def found(reports: list[dict[str, Any]], world: int | None = None) -> list[tuple[str, int, tuple[int, ...]]]:
    findings = judge(dict(enumerate(reports)), world or len(reports))
    return [(finding.check, finding.code, finding.ranks) for finding in findings]


def test_equal_and_quick_ranks_give_nothing_to_say() -> None:
    same = [report(clock={"offset_s": 0.01 * i}, matmul={"seconds": 0.1 + 0.01 * i}) for i in range(5)]
    assert found(same) == []
    assert exit_code([]) == 0


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [
        ([0.10, 0.16], (1,)),  # more than half as much again, and by more than the floor
        ([0.10, 0.14], ()),
        ([0.010, 0.025], ()),  # three times as long, but of no account
        ([0.3, 0.1, 0.1, 0.1], (0,)),
        ([0.1, 0.1, 0.5, 0.6], (2, 3)),
    ],
)
def test_slow_is_who_takes_much_longer_than_is_typical(seconds: list[float], slow: tuple[int, ...]) -> None:
    blamed = found([report(matmul={"seconds": value}) for value in seconds])
    assert blamed == [("matmul", 70, (rank,)) for rank in slow]


@pytest.mark.parametrize(("offsets", "off"), [([0, 3600, 0.1], 1), ([0, -7, -7.1, -6.9], 0), ([0, 2], 1)])
def test_a_clock_is_held_against_those_of_most(offsets: list[float], off: int) -> None:
    """Rank 0, by whose clock the others are measured, may be the wrong one."""
    assert found([report(clock={"offset_s": value}) for value in offsets]) == [("clock", 70, (off,))]


def test_who_differs_is_named_and_data_outweigh_nodes() -> None:
    reports = [report(program={"torch": "2"}, data={"d": "x"}) for _ in range(4)]
    reports[2]["values"]["program"]["torch"] = reports[3]["values"]["data"]["d"] = "other"
    assert found(reports) == [("program", 70, (2,)), ("data", 74, (3,))]
    assert exit_code(judge(dict(enumerate(reports)), 4)) == 74


def test_the_same_words_of_many_ranks_are_one_finding_and_the_missing_are_named() -> None:
    reports = [report() for _ in range(8)]
    for each in reports:
        each["errors"]["storage"] = (74, "s3://b: permission denied")
    assert found(reports, world=10) == [("join", 70, (8, 9)), ("storage", 74, tuple(range(8)))]
    out = io.StringIO()
    reports_by_rank = dict(enumerate(reports))
    show(Console(file=out, width=100), reports_by_rank, 10, judge(reports_by_rank, 10))
    assert "storage: ranks 0, 1, 2, 3, 4, 5 and 2 more (host a): s3://b: permission denied" in out.getvalue()


def test_the_fastest_turn_tells_a_node_from_its_neighbours() -> None:
    """Five hosts of two ranks in a ring: the time of a swap is that of the slower end."""
    hosts = {f"h{n}": [2 * n, 2 * n + 1] for n in range(5)}
    turns = {rank: peers_of(rank, hosts) for rank in range(10)}
    for rank, peers in turns.items():
        for turn, peer in enumerate(peers):
            assert peer is None or (turns[peer][turn] == rank and peer % 2 == rank % 2 and peer != rank)
    for slow in range(5):
        speed = {rank: 1.0 if rank // 2 == slow else 0.1 for rank in range(10)}
        times = {
            rank: min(max(speed[rank], speed[peer]) for peer in peers if peer is not None)
            for rank, peers in turns.items()
        }
        blamed = found([report(f"h{rank // 2}", link={"seconds": times[rank]}) for rank in range(10)])
        assert blamed == [("link", 70, (2 * slow,)), ("link", 70, (2 * slow + 1,))]


@pytest.mark.parametrize(
    "hosts", [{"a": [0]}, {"a": [0, 1]}, {"a": [0, 1, 2], "b": [3]}, {"a": [0], "b": [1], "c": [2]}]
)
def test_whatever_the_hosts_every_swap_has_two_ends(hosts: dict[str, list[int]]) -> None:
    ranks = [rank for group in hosts.values() for rank in group]
    turns = {rank: peers_of(rank, hosts) for rank in ranks}
    for rank, peers in turns.items():
        for turn, peer in enumerate(peers):
            assert peer is None or turns[peer][turn] == rank
    if len(ranks) > 1:
        assert all(any(peer is not None for peer in peers) for peers in turns.values())


# What nvidia-smi prints, by its documentation: no GPU here.


def test_a_driver_line_is_read_and_its_faults_are_named() -> None:
    assert read_health("580.95, 0, 0x0000000000000004, 41\n") == {"driver": "580.95", "ecc": "0", "temperature": "41"}
    assert read_health("580.95, [N/A], 0x0000000000000000, 41")["ecc"] == "not visible"
    with pytest.raises(NodeFault, match="3 uncorrected memory errors"):
        read_health("580.95, 3, 0x0, 41")
    with pytest.raises(NodeFault, match="throttled at 91 degrees C: software thermal, hardware thermal"):
        read_health("580.95, 0, 0x0000000000000060, 91")
