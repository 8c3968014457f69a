"""Distributed saves and choice of checkpoints: staged, written in the background, committed by rank 0.

Ranks communicate through the key-value store, never through the training group: a storage error on one rank must not
leave the others in a collective, and a slow disk must not delay a step.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import DataError, NodeFault, Overtaken, TesseraError
from data_pipeline.storage import open_storage
from pretrain.checkpoint.catalog import (
    INDEX,
    MANIFEST,
    STATE,
    VERSION,
    Retention,
    Saved,
    as_json,
    claim_attempt,
    committed,
    folder_name,
    put_once,
    refuse_overtaken,
    tidy,
)
from pretrain.checkpoint.layout import PART, RankShard, Staging, index_of, parts_of, shard_of, told_of, write_shard

if TYPE_CHECKING:
    from pretrain.engine.engine import Engine
    from pretrain.runtime.mesh import KeyValues, Mesh

COMMIT_TIMEOUT_S = 600.0
"""How long a rank waits for the others once its own part is written."""
LOAD_TIMEOUT_S = 3600.0
ABANDON_S = 5.0
"""Time given to a save in flight when the run ends with an error: enough if all its parts are already written."""
READ_S = 10.0
"""How long rank 0, which holds the store, waits for the others to read the outcome of a save."""
POLL_S = (0.005, 0.25)
ASKED_AT_ONCE = 256
ASKS_PER_S = 10_000
"""Target rate of requests to rank 0's store by all ranks that wait for one key: the store serves about 50,000."""


class Abandoned(TesseraError):
    """The run ended while a save was in progress; its folder has no manifest and is removed later."""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, root: str | Path, mesh: "Mesh", attempt: int, retention: Retention) -> None:
        self.root = str(root)
        self.mesh = mesh
        self.attempt = attempt
        self.retention = retention
        self.blocked_s = 0.0
        """Total time that saves have blocked training: staging, and waiting for the previous save."""
        self.last_save_s = 0.0
        """Duration of the newest committed save, from staging to commit; known only on rank 0."""
        self.overtaken = ""
        """Why this attempt no longer owns the run; empty while it does."""
        self._staging = Staging()
        self._sums: dict[str, list[float]] = {}
        self._save: Save | None = None
        self._saves = self._choices = 0

    def note(self, means: dict[str, float]) -> None:
        """Add one step's metrics; their means since the previous save decide which checkpoint is the best."""
        for name, value in means.items():
            self._sums.setdefault(name, []).append(value)

    def save(
        self, engine: "Engine", step: int, state: dict[str, Any], figures: Mapping[str, float] | None = None
    ) -> None:
        """Stage this rank's shard and start a thread that saves it. First wait for the previous save.

        figures: of the evaluation of this step, which may decide which checkpoint is the best.

        A failed save raises nothing here: rank 0 reports it, the run continues, and earlier checkpoints are untouched.
        """
        began = time.monotonic()
        means = {name: sum(values) / len(values) for name, values in self._sums.items()}
        self._sums = {}
        stuck = self._save is not None and not self._save.ended(COMMIT_TIMEOUT_S)
        shard = None if stuck else self._staging.copy(shard_of(engine, self.mesh))
        self._saves += 1
        self._save = Save(self, self._saves, step, shard, state | {"means": means | dict(figures or {})}, began)
        self._save.start()
        self.blocked_s += time.monotonic() - began

    def finish(self) -> Saved | None:
        """Wait for the last save -> the checkpoint, or None if there was none.

        Raises DataError if it failed, NodeFault if rank 0 was lost before it reported the outcome, Overtaken if a later
        attempt owns the run.
        """
        if self._save is None:
            return None
        if not self._save.ended(COMMIT_TIMEOUT_S):
            self._save.failure = f"not finished within {COMMIT_TIMEOUT_S:.0f} s"
        if self.overtaken:
            raise Overtaken(self.overtaken)
        if self._save.failure:
            sure = "was not" if self._save.fault is DataError else "may not be"
            raise self._save.fault(f"{self._save.folder} {sure} committed: {self._save.failure}; {UNTOUCHED}")
        return Saved(self._save.folder)

    def close(self) -> None:
        """Wait briefly for a save in flight, then abandon it. Never raises and never delays the end after an error."""
        if self._save is not None and not self._save.ended(ABANDON_S):
            self._save.abandoned.set()
            self._save.ended(ABANDON_S)

    def newest(self, every_steps: int = 1) -> Saved | None:
        """Return the newest whole checkpoint, the same on every rank; None if there is none at all.

        Only steps that are multiples of `every_steps` are considered. Every rank checks sizes and digests of an equal
        part of the files; rank 0 prints why a damaged checkpoint is skipped. Raises DataError if none is whole.
        """
        if self._save is not None:
            self._save.ended(COMMIT_TIMEOUT_S)
        self._choices += 1
        store, key = self.mesh.store, f"choice-{self._choices} {self.root}"
        if self.mesh.rank == 0:
            store.set(key, json.dumps(_outcome(lambda: self._candidates(every_steps))))
        folders = _result(_get(store, key, self.mesh.world, LOAD_TIMEOUT_S))
        for number, folder in enumerate(folders):
            if self._is_whole(Saved(folder), f"{key}/{number}"):
                return Saved(folder)
        if folders:
            raise DataError(
                f"{self.root}: none of {len(folders)} checkpoints is valid; restore one or empty the folder"
            )
        return None

    def _candidates(self, every_steps: int) -> list[str]:
        return [saved.folder for saved in reversed(committed(self.root)) if saved.step % every_steps == 0]

    def _is_whole(self, saved: Saved, key: str) -> bool:
        store, mesh = self.mesh.store, self.mesh
        store.set(f"{key}/{mesh.rank}", json.dumps(_outcome(lambda: saved.faults(mesh.rank, mesh.world))))
        if mesh.rank == 0:
            keys = [f"{key}/{rank}" for rank in range(mesh.world)]
            reports = [_result(told) for told in _gather(store, keys, LOAD_TIMEOUT_S)]
            faults = list(dict.fromkeys(line for report in reports for line in report))
            if faults:
                print(f"checkpoint {saved.name} is skipped: {'; '.join(faults)}", flush=True)
            store.set(key, json.dumps({"result": not faults}))
        return bool(_result(_get(store, key, self.mesh.world, LOAD_TIMEOUT_S)))


UNTOUCHED = "the checkpoints before it are untouched"


class Save(threading.Thread):
    """One save in progress: this rank's files, their report, and on rank 0 the commit."""

    def __init__(
        self, owner: Checkpoints, number: int, step: int, shard: RankShard | None, state: dict[str, Any], began: float
    ) -> None:
        super().__init__(name=f"save-{step}", daemon=True)  # a dead disk must not keep the process alive
        self.owner = owner
        self.step = step
        self.folder = f"{owner.root}/{folder_name(step, owner.attempt)}"
        self.shard = shard
        self.state = state
        self.began = began
        self.failure = "it ended without a report"
        self.fault: type[TesseraError] = DataError
        self.abandoned = threading.Event()
        self.heard: list[int] = []
        """On rank 0: the ranks that have reported."""
        self.key = f"save-{number} {self.folder}"  # unique, so that keys of an earlier save are not read

    def ended(self, timeout_s: float) -> bool:
        """Wait for the thread to end -> whether it did within `timeout_s`."""
        self.join(timeout_s)
        return not self.is_alive()

    def run(self) -> None:
        """Write, report, and on rank 0 commit. An error is kept in `failure` and printed by rank 0."""
        try:
            store = self.owner.mesh.side_store()
            store.set(f"{self.key}/{self.owner.mesh.rank}", json.dumps(_outcome(self._write)))
            if self.owner.mesh.rank == 0:
                store.set(self.key, json.dumps(_outcome(lambda: self._commit(store))))
            told = _get(store, self.key, self.owner.mesh.world, COMMIT_TIMEOUT_S, self.abandoned)
            store.set(f"{self.key}/read/{self.owner.mesh.rank}", "{}")
            _result(told)
            self.failure = ""
        except Overtaken as error:
            self.failure = self.owner.overtaken = str(error)
        except (OSError, TesseraError) as error:
            self.failure = str(error)
        except RuntimeError as error:  # from the store
            self.failure, self.fault = f"rank 0, whose process holds the store, is lost ({error})", NodeFault
        if self.owner.mesh.rank == 0:
            self._follow()
            with contextlib.suppress(RuntimeError, TesseraError):  # a lost rank reads nothing
                list(_gather(store, [f"{self.key}/read/{rank}" for rank in self.heard], READ_S, self.abandoned))

    def _follow(self) -> None:
        """Rank 0: print the outcome; after a commit apply retention, after a failure remove the folder."""
        if self.failure:
            then = "" if self.owner.overtaken else f"; {UNTOUCHED}, the run goes on"
            print(f"{self.folder} was not committed: {self.failure}{then}", flush=True)
            self._discard()
        else:
            print(f"saved {self.folder}", flush=True)
            self.owner.last_save_s = time.monotonic() - self.began
            self._tidy()

    def _write(self) -> list[dict[str, Any]]:
        if self.shard is None:
            raise DataError(f"the previous save is still being written after {COMMIT_TIMEOUT_S:.0f} s")
        storage = open_storage(self.folder)
        return told_of([write_shard(storage, part) for part in parts_of(self.shard, PART)], self.owner.mesh.world)

    def _commit(self, store: "KeyValues") -> None:
        """Rank 0: collect all reports; write index, state, and last the manifest."""
        owner, storage = self.owner, open_storage(self.folder)
        reports, errors = self._reports(store)
        if errors:
            raise DataError("; ".join(errors))
        files = [{key: report[key] for key in ("name", "bytes", "sha256")} for report in reports]
        files.append(put_once(storage, INDEX, json.dumps(index_of(reports, storage)).encode()))
        files.append(put_once(storage, STATE, as_json(self.state)))
        refuse_overtaken(owner.root, owner.attempt)
        manifest = {"version": VERSION, "step": self.step, "attempt": owner.attempt, "world": owner.mesh.world}
        put_once(storage, MANIFEST, as_json(manifest | {"files": files}))

    def _reports(self, store: "KeyValues") -> tuple[list[dict[str, Any]], list[str]]:
        """Return the reports of all written files, and the errors, in rank order."""
        reports, errors = [], []
        keys = [f"{self.key}/{rank}" for rank in range(self.owner.mesh.world)]
        for rank, told in enumerate(_gather(store, keys, COMMIT_TIMEOUT_S, self.abandoned)):
            if told is not None:
                self.heard.append(rank)
            try:
                reports += _result(told or {"error": f"no report within {COMMIT_TIMEOUT_S:.0f} s"})
            except DataError as error:
                errors.append(f"rank {rank}: {error}")
        return reports, errors

    def _discard(self) -> None:
        """Remove what a failed save wrote: on a full disk it would leave no space for the next one."""
        storage = open_storage(self.folder)
        with contextlib.suppress(OSError, TesseraError):  # what remains is removed after the next commit
            if not storage.exists(MANIFEST):
                storage.remove_all()

    def _tidy(self) -> None:
        """Apply retention. An error in removing old checkpoints is only printed: the new one is committed."""
        owner = self.owner

        def may_go(step: int, attempt: int) -> bool:
            return attempt < owner.attempt or (attempt == owner.attempt and step < self.step)

        try:
            refuse_overtaken(owner.root, owner.attempt)
            tidy(owner.root, owner.retention, may_go, new=Saved(self.folder).name)
        except (OSError, TesseraError) as error:
            print(f"{owner.root}: old checkpoints could not be removed: {error}", flush=True)


def start_attempt(root: str | Path, mesh: "Mesh", at_least: int, changes: Mapping[str, Any] | None = None) -> int:
    """Return the number of this attempt, which rank 0 claims for all ranks; earlier attempts can no longer commit.

    changes: consented changes of settings by dotted key; they are stored in the claim (see `consent_since`).
    """
    by = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time(), "world": mesh.world}
    by |= {"changes": dict(changes)} if changes else {}
    return int(from_rank_0(mesh, "attempt", lambda: claim_attempt(root, at_least, by)))


def from_rank_0(mesh: "Mesh", key: str, call: Callable[[], Any]) -> Any:
    """Call on rank 0 and return its JSON result on every rank; an error is a DataError or Overtaken on every rank."""
    if mesh.rank == 0:
        mesh.store.set(key, json.dumps(_outcome(call)))
    return _result(_get(mesh.store, key, mesh.world, LOAD_TIMEOUT_S))


# ------------------------------------------------------------------------------------ messages between ranks


def _outcome(call: Callable[[], Any]) -> dict[str, Any]:
    """Call and return a message for other ranks: the result, or the error and whether the run was overtaken."""
    try:
        return {"result": call()}
    except Abandoned:
        raise
    except (OSError, RuntimeError, TesseraError) as error:
        return {"error": str(error), "overtaken": isinstance(error, Overtaken)}
    except Exception as error:  # a bug: without a message the other ranks would wait for this one
        return {"error": f"{type(error).__name__}: {error}"}


def _result(told: dict[str, Any] | None) -> Any:
    if told is None:
        raise DataError("no report in time")
    if "error" in told:
        raise (Overtaken if told.get("overtaken") else DataError)(told["error"])
    return told["result"]


def _get(
    store: "KeyValues", key: str, world: int, timeout_s: float, abandoned: threading.Event | None = None
) -> dict[str, Any]:
    """Wait for a key, as all ranks may do at once, and return its value. Raises DataError after `timeout_s`."""
    if not _wait(store, [key], time.monotonic() + timeout_s, abandoned, world / ASKS_PER_S):
        raise DataError(f"no report within {timeout_s:.0f} s")
    return dict(json.loads(store.get(key)))


def _gather(
    store: "KeyValues", keys: list[str], timeout_s: float, abandoned: threading.Event | None = None
) -> Iterator[dict[str, Any] | None]:
    """Yield the values of all keys in order, requested in batches; None for a key not set within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    for first in range(0, len(keys), ASKED_AT_ONCE):
        some = keys[first : first + ASKED_AT_ONCE]
        if _wait(store, some, deadline, abandoned):
            yield from (json.loads(text) for text in store.multi_get(some))
        else:
            yield from (json.loads(store.get(key)) if store.check([key]) else None for key in some)


def _wait(
    store: "KeyValues", keys: list[str], deadline: float, abandoned: threading.Event | None, pause_s: float = 0.0
) -> bool:
    """Return whether all keys are set before the deadline. Polls, since a blocking wait could not be abandoned.

    The polling interval doubles up to the longer of `pause_s` and POLL_S[1].
    """
    pause, longest = POLL_S[0], max(POLL_S[1], pause_s)
    while not store.check(keys):
        if abandoned is not None and abandoned.is_set():
            raise Abandoned("the run ended before all parts were written")
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, longest)
    return True
