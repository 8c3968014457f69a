"""`tessera preflight`: every rank of a run is checked before the expensive part, and rank 0 reports what is wrong.

Ranks communicate through the store and synchronize before each collective check, so that an absent rank is named
instead of waited for. Every check has a deadline; a check that exceeds it is left behind in its thread.
"""

import contextlib
import dataclasses
import functools
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console

from data_pipeline.errors import ConfigError, NodeFault, TesseraError
from launchers import findings
from launchers.local import ExitPatience, Group, attend, check_rendezvous, free_port
from launchers.spec import LocalCluster, check_names, load_cluster
from pretrain.config import RunConfig, check_initial, load_run, micro_batch_of
from pretrain.runtime.signals import StopSignals

if TYPE_CHECKING:
    from pretrain.runtime.mesh import Mesh

CLOCK_ROUNDS = 5
MARGIN_S = 5.0


@dataclasses.dataclass(frozen=True)
class Asked:
    """The arguments of the command line."""

    config: Path | None
    overrides: Sequence[str]
    timeout_s: float
    json: bool


def inside_group() -> bool:
    """Return whether this process was started as one of a group, by torchrun, srun or `start_group`."""
    return "RANK" in os.environ or {"SLURM_PROCID", "SLURM_STEP_ID"} <= os.environ.keys()


def read_config(asked: Asked) -> RunConfig | None:
    """Load the configuration, if one was named. Raise ConfigError for one that cannot run."""
    if asked.config is None:
        return None
    config = load_run(asked.config, asked.overrides)
    check_initial(config)
    check_names(config)
    return config


def start_group(
    asked: Asked, nodes: int | None, procs_per_node: int | None, node_rank: int, master_addr: str, master_port: int
) -> int:
    """Start this machine's processes, wait for their verdict and return the exit code."""
    cluster = load_cluster(LocalCluster, None)
    nodes, procs = nodes or cluster.nodes, procs_per_node or cluster.procs_per_node
    if config := read_config(asked):
        try:
            micro_batch_of(config.train, nodes * procs)
        except ValueError as error:
            raise ConfigError(f"{asked.config}: {error}") from None
    check_rendezvous(nodes, node_rank, master_addr, master_port)
    arguments = ["preflight", *([str(asked.config)] if asked.config else []), *asked.overrides]
    options = ["--timeout", f"{asked.timeout_s:g}", *(["--json"] if asked.json else [])]
    group = Group(
        command=(sys.executable, "-m", "launchers.cli", *arguments, *options),
        procs=procs,
        world_size=nodes * procs,
        first_rank=node_rank * procs,
        master_addr=master_addr,
        master_port=master_port or free_port(),
        env=tuple(sorted(cluster.env.items())),
    )
    with StopSignals() as stops:  # ranks exit by themselves; rank 0 needs time to report
        return attend(group, stops, ExitPatience(MARGIN_S, 4 * asked.timeout_s, MARGIN_S)).exit_code


# ------------------------------------------------------------------------------------------------ one rank


def run_rank(asked: Asked) -> int:
    """Run this rank's checks; return the exit code, the same on every rank that reports. Leaves hanging threads."""
    began = time.monotonic()
    from pretrain.runtime.mesh import Mesh

    config = read_config(asked)
    rank = Rank(Mesh.start(asked.timeout_s, asked.timeout_s), asked.timeout_s)
    rank.look(config)
    return rank.conclude(began, asked.json)


def run_rank_and_leave(asked: Asked) -> NoReturn:
    """Run `run_rank`, then exit at once: a thread that hangs in a collective must not keep the process alive."""
    try:
        code = run_rank(asked)
    except TesseraError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """Return the result of `call`, or raise what it raises; raise Hangs, a NodeFault, after `seconds`."""
    box: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            box.put((call(), None))
        except Exception as error:
            box.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        result, error = box.get(timeout=seconds)
    except queue.Empty:
        raise Hangs(f"not finished within {seconds:g} s") from None
    if error is not None:
        raise error
    return result


class Hangs(NodeFault):
    """A call did not return before its deadline."""


class Rank:
    """The checks of one rank."""

    def __init__(self, mesh: "Mesh", timeout_s: float) -> None:
        self.mesh = mesh
        self.timeout_s = timeout_s
        self.store = mesh.side_store()
        self.values: dict[str, Any] = {}
        self.errors: dict[str, tuple[int, str]] = {}
        self.together = True
        """False once a rank was lost: collective checks are skipped from then on."""

    def look(self, config: RunConfig | None) -> None:
        """Run all checks, cheap ones first and collective ones last."""
        from pretrain.inputs.source import open_all
        from pretrain.runtime import probes

        mesh = self.mesh
        absent = probes.absent_places(config) if config else []  # before the ranks synchronize to compare clocks
        self.check("clock", self._clock)
        self.check("program", lambda: probes.program(config, mesh))
        if config is not None:
            self.check("data", lambda: probes.data(config, mesh, open_all))
            self.check("storage", lambda: probes.storage(config, mesh))
            self.check("disk", lambda: probes.disk(config, mesh))
        self.check("health", lambda: probes.health(mesh))
        self.check("matmul", lambda: probes.matmul(mesh), together=True)
        if self.together:  # all ranks have finished their storage checks
            probes.remove_places(absent)
        if mesh.world > 1:
            for name in findings.COLLECTIVES:
                self.check(name, functools.partial(probes.collective, mesh, name), together=True)
            if self.together and (hosts := self._hosts()):
                self.check("link", lambda: probes.link(mesh, probes.peers_of(mesh.rank, hosts)), together=True)

    def check(self, name: str, probe: Callable[[], dict[str, Any]], together: bool = False) -> None:
        """Record the probe's result or error; a collective (`together`) probe runs only while all ranks are there."""
        if together and not self.together:
            return
        try:
            within(MARGIN_S, lambda: self.store.set(f"at/{self.mesh.rank}", name))
            if together:
                self.meet(name)
            self.values[name] = within(self.timeout_s, self._bound(probe))
        except Absent as error:
            self.together = False
            self._note(name, error)
        except Exception as error:
            self.together &= not (together or name == "clock")
            self._note(name, error)

    def _bound(self, probe: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        def call() -> dict[str, Any]:
            self.mesh.bind()
            return probe()

        return call

    def _note(self, name: str, error: Exception) -> None:
        ours = isinstance(error, TesseraError)
        code = error.exit_code if isinstance(error, TesseraError) and not isinstance(error, Hangs) else None
        self.errors[name] = (code or findings.code_of(name), f"{'' if ours else f'{type(error).__name__}: '}{error}")

    # ---------------------------------------------------------------------------- messages between ranks

    def meet(self, name: str) -> float:
        """Wait for all ranks; return the seconds by which this clock is ahead of rank 0's, plus the message's latency.

        Rank 0 waits for the others as long as a check may take; the others wait twice as long for rank 0's message.
        Raise Absent if a rank is missing.
        """
        store, mesh = self.mesh.store, self.mesh
        keys = [f"{name}/{rank}" for rank in range(mesh.world)]
        store.set(keys[mesh.rank], "")
        if mesh.rank == 0:
            gone = [] if self._all(keys, self.timeout_s + MARGIN_S) else self._gone(keys)
            store.set(f"{name}/word", json.dumps({"now": time.time(), "gone": gone}))
        elif not self._all([f"{name}/word"], 2 * (self.timeout_s + MARGIN_S)):
            raise Absent("rank 0, which holds the store, does not answer")
        word = json.loads(store.get(f"{name}/word"))
        now = time.time()
        if word["gone"]:
            raise Absent("; ".join(word["gone"]))
        return now - float(word["now"])

    def _all(self, keys: list[str], seconds: float) -> bool:
        """Return whether all keys are set in time. A suspended store never answers, hence the deadline around it."""
        with contextlib.suppress(RuntimeError, Hangs):
            within(seconds + MARGIN_S, lambda: self.mesh.store.wait(keys, timedelta(seconds=seconds)))
            return True
        return False

    def _gone(self, keys: list[str]) -> list[str]:
        gone = [rank for rank, key in enumerate(keys) if not self.mesh.store.check([key])]
        last = {rank: self.store.get(f"at/{rank}").decode() for rank in gone if self.store.check([f"at/{rank}"])}
        return [f"rank {rank} is missing, last seen at {last.get(rank, 'the start')!r}" for rank in gone]

    def _clock(self) -> dict[str, Any]:
        """Return the clock's offset in seconds: the least of several rounds, since latency only adds to it."""
        offsets = [self.meet(f"clock-{number}") for number in range(CLOCK_ROUNDS)]
        return {"offset_s": 0.0 if self.mesh.rank == 0 else min(offsets)}

    def _hosts(self) -> dict[str, list[int]]:
        """Return host -> its ranks, the same on every rank; empty if a rank is missing."""
        from pretrain.runtime.mesh import read_all

        store, mesh = self.mesh.store, self.mesh
        keys = [f"host/{rank}" for rank in range(mesh.world)]
        store.set(keys[mesh.rank], socket.gethostname())
        hosts: dict[str, list[int]] = {}
        if self._all(keys, self.timeout_s):
            for rank, name in enumerate(read_all(store, keys)):
                hosts.setdefault(name.decode(), []).append(rank)
        return hosts

    # ------------------------------------------------------------------------------------------ the end

    def conclude(self, began: float, as_json: bool) -> int:
        """Report; rank 0 gathers, judges and prints. Return the exit code, the same on every rank."""
        report = {"host": socket.gethostname(), "values": self.values, "errors": self.errors}
        if self.mesh.rank > 0:
            return self._await_verdict(report)
        reports = {0: report} | self._gather()
        found = findings.judge(reports, self.mesh.world)
        code = findings.exit_code(found)
        self._print(reports, found, code, time.monotonic() - began, as_json)
        self.mesh.store.set("verdict", str(code))
        self._all([f"read/{rank}" for rank in reports if rank], MARGIN_S)  # the store ends with this process
        return code

    def _await_verdict(self, report: dict[str, Any]) -> int:
        store = self.mesh.store
        try:
            within(MARGIN_S, lambda: store.set(f"report/{self.mesh.rank}", json.dumps(report)))
            if not self._all(["verdict"], 3 * (self.timeout_s + MARGIN_S)):
                raise NodeFault("rank 0 sends no verdict")
            code = int(within(MARGIN_S, lambda: store.get("verdict")))
            within(MARGIN_S, lambda: store.set(f"read/{self.mesh.rank}", ""))
            return code
        except (RuntimeError, TesseraError) as error:
            raise NodeFault(f"rank {self.mesh.rank}: {error}; check the node of rank 0") from None

    def _gather(self) -> dict[int, dict[str, Any]]:
        """Return rank -> report, for the other ranks that report in time."""
        from pretrain.runtime.mesh import read_all

        store, others = self.mesh.store, range(1, self.mesh.world)
        keys = [f"report/{rank}" for rank in others]
        if not keys or not self._all(keys, (self.timeout_s if self.together else 0) + MARGIN_S):
            keys = [key for key in keys if store.check([key])]
        texts = read_all(store, keys)
        return {int(key.partition("/")[2]): json.loads(text) for key, text in zip(keys, texts, strict=True)}

    def _print(
        self, reports: findings.Reports, found: list[findings.Finding], code: int, seconds: float, as_json: bool
    ) -> None:
        if as_json:
            rows = [dataclasses.asdict(finding) for finding in found]
            told = {"exit_code": code, "seconds": round(seconds, 2), "world": self.mesh.world, "findings": rows}
            print(json.dumps(told | {"reports": reports}, sort_keys=True), flush=True)
            return
        findings.show(Console(soft_wrap=True), reports, self.mesh.world, found)
        verdict = f"{len(found)} findings, exit code {code}" if code else "no findings"
        print(f"{verdict}; {seconds:.1f} s", flush=True)


class Absent(NodeFault):
    """A rank did not reach the point where all ranks synchronize."""
