"""How ranks find each other's store: the next attempt's, whoever counts the attempts, and never a process twice."""

import threading
from typing import Any

import pytest

from data_pipeline.errors import NodeFault
from launchers.local import free_port
from pretrain.mesh import Place, _attempt_store


def place(rank: int, port: int, attempt: str) -> Place:
    return Place(rank, 0, 2, "127.0.0.1", port, attempt)


def test_nodes_that_count_attempts_differently_meet_where_rank_0_says() -> None:
    port = free_port()
    first = _attempt_store(place(0, port, "0.0.3"), 20)
    second = _attempt_store(place(1, port, "0.0.1"), 20)
    first.set("word", "heard")
    assert second.get("word") == b"heard"


def test_a_rank_that_comes_again_waits_until_the_attempt_that_knew_it_is_gone() -> None:
    """Its node was quicker to start again than rank 0's: the old store's addresses are of the dead."""
    port = free_port()
    old: Any = [_attempt_store(place(0, port, "0"), 20), _attempt_store(place(1, port, "0"), 20)]
    found: list[Any] = []
    again = threading.Thread(target=lambda: found.append(_attempt_store(place(1, port, "1"), 60)), daemon=True)
    again.start()
    again.join(1.5)
    assert again.is_alive()
    old.clear()  # with the last user of it the server ends
    new = _attempt_store(place(0, port, "1"), 20)
    again.join(60)
    new.set("word", "of the new one")
    assert found[0].get("word") == b"of the new one"


def test_a_second_process_of_a_rank_is_refused() -> None:
    port = free_port()
    stores = [_attempt_store(place(rank, port, "0"), 20) for rank in (0, 1)]
    with pytest.raises(NodeFault, match=f"rank 1 found no store at 127.0.0.1:{port}: it holds an attempt"):
        _attempt_store(place(1, port, "0"), 1)
    assert stores


@pytest.mark.slow
def test_no_server_is_a_node_fault() -> None:
    with pytest.raises(NodeFault, match="rank 1 found no store"):
        _attempt_store(place(1, free_port(), "0"), 2)
