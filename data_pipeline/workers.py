"""Minimal use of Ray: a session, a bounded number of tasks in flight, and retries of tasks whose worker was lost."""

import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from data_pipeline.errors import ConfigError, NodeFault, TesseraError

OBJECT_STORE_BYTES = 500 * 1024**2
OUTER_RETRIES = 5

_IN_FLIGHT_PER_WORKER = 2
_CONNECT_S = 10.0
_LOOK_S = 2.0  # interval of checks that Ray is alive, while no task ends
_WITHOUT_ROOM_S = 300.0  # how long a cluster may lack a node that can run the tasks: one may be starting
_LEAVE_S = 20.0  # to leave Ray
_ASK_S = 60.0
_ASK = """
import sys
from ray._raylet import GcsClient
GcsClient(address=sys.argv[1]).internal_kv_keys(b"", None, 10)
"""
_PR_SET_PDEATHSIG = 1
_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # 0: Ray listens on the loopback address, on every system


@contextlib.contextmanager
def ray_session(workers: int, address: str | None = None, gpus: int = 0) -> Iterator[None]:
    """Start a local Ray with `workers` CPUs on the loopback address, or join the cluster at `address`; leave it after.

    gpus: how many a local Ray may give to its actors. Raises ConfigError for an invalid address of a cluster,
    NodeFault when no cluster answers or the local Ray does not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's records of tasks, for a dashboard, take some 100 KB per task in driver and workers
    os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
    if address is not None:
        _check_address(address)
        sign_in(address)
    else:
        # keep the command's own priority: Ray would lower its workers' by 15, which starves them on a busy machine
        os.environ.setdefault("RAY_worker_niceness", "0")
        if "ray" not in sys.modules:  # Ray reads it once, at import: later, only part of Ray would see it
            os.environ.setdefault(_CLUSTERS, "0")
    import ray

    if ray.is_initialized():  # the caller's session, for example a test's
        yield
        return
    _connect(workers, address, gpus)
    try:
        yield
    finally:
        _leave()


def _connect(workers: int, address: str | None, gpus: int) -> None:
    import ray

    common: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if address is not None:
            ray.init(address=address, **common)
            return
        ray.init(
            "local",  # even if RAY_ADDRESS is set or another Ray runs on this machine
            num_cpus=workers,
            num_gpus=gpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            **common,
        )
    except Exception as error:  # a plain Exception when a node does not start within 30 s, as on a busy machine
        if address is not None:
            raise NodeFault(
                f"ray_address={address}: {error}; check that Ray has the same version, and that RAY_AUTH_MODE and the "
                "token are the same on all nodes"
            ) from None
        raise NodeFault(f"Ray did not start here: {error}; check this machine's load, then run it again") from None


def _leave() -> None:
    """Run ray.shutdown(); kill a local raylet that does not answer, for which it would wait for ever."""
    import ray

    leaving = threading.Thread(target=ray.shutdown, daemon=True)
    leaving.start()
    leaving.join(_LEAVE_S)
    if leaving.is_alive():
        for raylet in _raylets():
            raylet.kill()
        leaving.join(_LEAVE_S)


def _raylets() -> list[psutil.Process]:
    """Return the raylet of a local Ray, running or dead; none when a cluster was joined."""
    return [child for child in psutil.Process().children() if child.name() == "raylet"]


def sign_in(address: str | None = None) -> None:
    """Make Ray use the user's token, if there is one; call it before Ray is imported or started.

    A head node requires the token as soon as ~/.ray/auth_token exists, and the first Ray that a process starts writes
    it there. A node or driver that joins by address sends it only if RAY_AUTH_MODE says so. A driver that requires a
    token while the cluster at `address` has none could not be answered by its own tasks, so the cluster is checked
    first. Without an address the token is for a cluster that this process starts.
    """
    token = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys() or (Path.home() / ".ray/auth_token").exists()
    if not token or "RAY_AUTH_MODE" in os.environ or "ray" in sys.modules:  # Ray reads it once
        return
    if address is None or _asks_for_token(address):
        os.environ["RAY_AUTH_MODE"] = "token"


def _asks_for_token(address: str) -> bool:
    """Return whether the cluster refuses clients without a token; asks in a child process, as Ray's mode is global."""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    with contextlib.suppress(subprocess.TimeoutExpired):
        asked = subprocess.run(
            [sys.executable, "-c", _ASK, address], env=environment, capture_output=True, text=True, timeout=_ASK_S
        )
        return "AuthenticationError" in asked.stderr
    return True


def in_driver(run: Callable[..., Any], *arguments: Any) -> Any:
    """Return `run(*arguments)`, called in a child process that ends with this one.

    Ray ends its driver at once, with exit code 1 and no exception, when the driver's node died or was declared dead,
    as on an overloaded machine. Raises the TesseraError of `run`, and NodeFault when the process gave no answer.
    """
    context = multiprocessing.get_context("spawn")
    answers, answer = context.Pipe(duplex=False)
    driver = context.Process(target=_drive, args=(os.getpid(), answer, run, arguments))
    try:
        driver.start()
        answer.close()
        done = answers.recv()
    except EOFError:
        driver.join()
        raise NodeFault(
            f"the process that drives Ray ended ({driver.exitcode}): its node died or was too busy to "
            "answer; check this machine's memory and load, then run the same command again"
        ) from None
    finally:
        if driver.pid is not None:  # an interrupt may come before it has started
            driver.join(_LEAVE_S)
            driver.kill()
    if isinstance(done, BaseException):
        raise done
    return done


def _drive(parent: int, answer: Connection, run: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Send what `run` returns or raises; print the traceback of an exception that is not for the user."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the line above
        os._exit(NodeFault.exit_code)
    try:
        done = run(*arguments)
    except (TesseraError, KeyboardInterrupt) as error:
        done = error
    except Exception:
        traceback.print_exc()
        done = SystemExit(1)
    answer.send(done)


def _check_address(address: str) -> None:
    """Raise ConfigError for an invalid address, and NodeFault when nothing answers: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if "/" in address or not (host and port.isdigit()):
        raise ConfigError(f"ray_address={address}: use HOST:PORT as `ray start --head` prints it, or auto")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise NodeFault(f"ray_address={address}: {error}; start Ray's head there, or leave it out") from None


def run_tasks(
    submit: Callable[[Any], Any],
    items: Sequence[Any],
    workers: int,
    ahead: int | None = None,
    gpus: int = 0,
    examine: Callable[[Any], None] = lambda item: None,
) -> Iterator[tuple[Any, Any]]:
    """Yield (item, result of the Ray reference `submit(item)`), in order of completion.

    At most `ahead` tasks per worker, two by default, are in flight. A task whose worker or node is lost is submitted
    again, OUTER_RETRIES times beyond Ray's own retries; then NodeFault. A TesseraError raised in a task is raised here.
    examine: called with an item the first time its worker is lost; raises an error if the item is to blame.
    gpus: per task, besides its CPU. Waits up to _WITHOUT_ROOM_S for a node of the cluster that has them.
    """
    import ray

    waiting, losses, without = list(reversed(items)), dict.fromkeys(items, 0), None
    running: dict[Any, Any] = {}
    while waiting or running:
        while waiting and len(running) < (ahead or _IN_FLIGHT_PER_WORKER) * workers:
            item = waiting.pop()
            running[submit(item)] = item
        done, _ = ray.wait(list(running), num_returns=1, timeout=_LOOK_S)
        if done:
            without = None
        else:
            _check_raylet()
            without = _without_room(gpus, without)
        for reference in done:
            item = running.pop(reference)
            try:
                result = ray.get(reference)
            except ray.exceptions.RayError as error:
                _raise_unless_lost(error)
                losses[item] += 1
                if losses[item] == 1:
                    examine(item)
                if losses[item] > OUTER_RETRIES:
                    raise NodeFault(
                        f"{item}: its worker was lost {losses[item]} times ({type(error).__name__}); "
                        "check memory and disk of the nodes, then run the same command again"
                    ) from None
                waiting.append(item)
            else:
                yield item, result


def _check_raylet() -> None:
    """Raise NodeFault when the local raylet died, before Ray ends this process because of it."""
    if any(raylet.status() == psutil.STATUS_ZOMBIE for raylet in _raylets()):
        raise NodeFault("Ray's process on this machine died; check its memory, then run the same command again")


def _without_room(gpus: int, since: float | None) -> float | None:
    """Return the time since which no node can run a task; None if one can. Raises NodeFault after _WITHOUT_ROOM_S."""
    import ray

    needed = {"CPU": 1, **({"GPU": gpus} if gpus else {})}
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(there.get(name, 0) >= number for name, number in needed.items()) for there in alive):
        return None
    lacks = f"none of the {len(alive)} live nodes of the Ray cluster offers {needed}"
    if since is None:
        print(f"{lacks}; waiting up to {_WITHOUT_ROOM_S:.0f} s for one", file=sys.stderr, flush=True)
        return time.monotonic()
    if time.monotonic() - since > _WITHOUT_ROOM_S:
        raise NodeFault(f"{lacks}; add a node, then run the same command again")
    return since


def _raise_unless_lost(error: Any) -> None:
    """Raise what a task or the constructor of its actor raised; return if a process or node was lost."""
    import ray

    if isinstance(error, ray.exceptions.RayTaskError):
        if isinstance(error.cause, TesseraError):
            raise error.cause from None
        if not isinstance(error.cause, ray.exceptions.RayError):
            raise error
        error = error.cause  # a task whose input was lost with the actor that produces it
    if getattr(error, "actor_init_failed", False):
        raise NodeFault(f"an actor could not start, and a retry would not help: {error}") from None


class Counter:
    """A progress line on the terminal: samples, rate, time left, rejects by reason; silent where `shown` is False.

    before: part of the total done by an earlier run, which does not count in the rate.
    """

    def __init__(self, title: str, total: int, shown: bool, before: int = 0) -> None:
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rejects]}"),
        )
        self._before = before
        self._progress = Progress(*columns, disable=not shown)
        self._task: TaskID = self._progress.add_task(title, total=total, completed=before, rate="", rejects="")

    def __enter__(self) -> "Counter":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def add(self, count: int, rejected: dict[str, int] | None = None) -> None:
        """Count `count` more done; `rejected` are the totals so far."""
        self._progress.advance(self._task, count)
        task = self._progress.tasks[0]
        rate = (task.completed - self._before) / task.elapsed if task.elapsed else 0.0
        rejects = " ".join(f"{reason}={number}" for reason, number in sorted((rejected or {}).items()))
        self._progress.update(self._task, rate=f"{rate:.0f}/s", rejects=rejects)
