"""How ranks find each other: in the next attempt, which nobody counts, and never beside a process of their own rank."""

import datetime
import re
import socket
import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from data_pipeline.errors import NodeFault
from launchers.local import free_port
from pretrain.runtime.mesh import Mesh, RankPlace, _attempt_store, _check_resolves, _join

AGENT = "torchrun's job"


def place(rank: int, port: int, agent: str = "") -> RankPlace:
    return RankPlace(rank, 0, 2, "127.0.0.1", port, agent)


class Joining(threading.Thread):
    """A rank on its way to the others."""

    def __init__(self, where: RankPlace) -> None:
        super().__init__(daemon=True)
        self.where, self.found = where, []
        self.start()

    def run(self) -> None:
        self.found.append(_join(self.where, 60))

    @property
    def store(self) -> Any:
        self.join(60)
        return self.found[0]


def assert_together(first: Joining, second: Joining) -> None:
    first.store.set("word", "of this attempt")
    assert second.store.get("word") == b"of this attempt"


@pytest.fixture
def torchrun() -> Any:
    """torchrun's store, which serves its ranks and outlives their attempts -> its port."""
    seconds = datetime.timedelta(seconds=30)
    server = dist.TCPStore("127.0.0.1", 0, None, True, timeout=seconds, wait_for_workers=False)
    yield server.port
    del server


@pytest.mark.slow
def test_a_rank_that_comes_again_waits_until_the_attempt_that_knew_it_is_gone() -> None:
    """Its node was quicker to start again than rank 0's: the old store's addresses are of the dead."""
    port = free_port()
    old: Any = [_attempt_store(place(0, port), 20), _attempt_store(place(1, port), 20)]
    again = Joining(place(1, port))
    again.join(0.7)
    assert again.is_alive()
    old.clear()  # with the last user of it the server ends
    assert_together(Joining(place(0, port)), again)


@pytest.mark.slow
@pytest.mark.parametrize("died", ["after they met", "before rank 1 came", "while rank 1 waited"])
@pytest.mark.parametrize("first", [0, 1])
def test_ranks_under_torchrun_meet_in_the_next_attempt_whoever_of_them_is_there_first(
    torchrun: int, died: str, first: int
) -> None:
    """torchrun does not tell them which attempt it is: its nodes count differently."""
    ranks = [place(rank, torchrun, AGENT) for rank in (0, 1)]
    if died == "after they met":
        assert_together(*map(Joining, ranks))
    else:
        _attempt_store(ranks[0], 20)
        if died == "while rank 1 waited":
            _attempt_store(ranks[1], 20)
    ahead = Joining(ranks[first])
    ahead.join(0.7)
    assert ahead.is_alive()
    assert_together(ahead, Joining(ranks[1 - first]))


@pytest.mark.slow
def test_two_jobs_on_one_torchrun_store_do_not_meet(torchrun: int) -> None:
    _attempt_store(place(0, torchrun, "another job"), 20)
    with pytest.raises(NodeFault, match="rank 1 found no store"):
        _attempt_store(place(1, torchrun, AGENT), 1)


@pytest.mark.slow
def test_a_second_process_of_a_rank_is_refused() -> None:
    port = free_port()
    stores = [_attempt_store(place(rank, port), 20) for rank in (0, 1)]
    with pytest.raises(NodeFault, match=f"rank 1 found no store at 127.0.0.1:{port}: it serves an attempt"):
        _attempt_store(place(1, port), 1)
    assert stores


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "x" * 64, "with space"])
@pytest.mark.parametrize("limits", [(0.3, 300.0), (300.0, 0.3)], ids=["timeout", "join"])
def test_an_address_that_does_not_resolve_is_named_within_the_timeout(
    host: str, limits: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": host, "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with pytest.raises(NodeFault, match=rf"address of rank 0, '{re.escape(host)}', does not resolve .* --master-addr"):
        Mesh.start(*limits)
    assert time.monotonic() - began < 30


def test_a_resolver_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        asked.set()
        go_on.wait(60)

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    with pytest.raises(NodeFault, match="does not resolve"):
        _check_resolves(RankPlace(1, 0, 2, "node-1", 29500), 0.2)
    assert asked.is_set()
    go_on.set()


@pytest.mark.slow
def test_a_name_that_is_new_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [socket.gaierror(-2, "Name or service not known"), []]

    def answer(*_: object) -> Any:
        found = answers.pop(0)
        if isinstance(found, OSError):
            raise found
        return found

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    _check_resolves(RankPlace(1, 0, 2, "node-1", 29500), 60)
    assert not answers


@pytest.mark.slow
def test_no_server_is_a_node_fault() -> None:
    with pytest.raises(NodeFault, match="rank 1 found no store"):
        _attempt_store(place(1, free_port()), 2)
