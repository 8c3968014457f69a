"""What lies where checkpoints lie: names, manifests, digests, claims, retention. Knows no tensors and no ranks."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NotRequired

from pydantic import Field, StringConstraints, with_config
from typing_extensions import TypedDict

from data_pipeline import gate
from data_pipeline.errors import DataError, Overtaken
from data_pipeline.storage import Storage, open_storage
from pretrain.schema.tasks import parsed

if TYPE_CHECKING:
    from pretrain.config import TrainConfig

MANIFEST = "MANIFEST.json"
STATE = "state.json"
INDEX = "index.json"
VERSION = 3
DAMAGED = "it is damaged; go on from another checkpoint, `tessera checkpoint verify` tells which are whole"
BUFFER = 8 << 20
"""Bytes held at once while a file is hashed or read."""
FOLDER = re.compile(r"step-(\d+)\.attempt-(\d+)")
CLAIM = re.compile(r"attempt-(\d+)\.json")
NAME = re.compile(r"name-([A-Za-z0-9_.-]+)\.json")


@with_config(gate.CLOSED)
class FileEntry(TypedDict):
    """One file of a checkpoint."""

    name: gate.FileName
    bytes: gate.Count
    sha256: gate.Sha256


@with_config(gate.OPEN)
class CheckpointManifest(TypedDict):
    """What MANIFEST.json holds."""

    version: int
    step: gate.Count
    attempt: gate.Count
    world: Annotated[int, Field(ge=1, le=2**24)]
    files: list[FileEntry]


@with_config(gate.OPEN)
class _StreamState(TypedDict):
    position: gate.Count


Fingerprint = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{12,64}(@step \d{1,15})?$")]
"""Of what a run depends on; see fingerprints.py."""


@with_config(gate.OPEN)
class _State(TypedDict):
    """What of state.json is counted with; its other parts are compared with what the run has."""

    stream: NotRequired[_StreamState]
    means: NotRequired[dict[str, float]]
    fingerprints: NotRequired[dict[str, Fingerprint]]
    changes: NotRequired[list[dict[str, Any]]]


@with_config(gate.CLOSED)
class _Label(TypedDict):
    """What name-LABEL.json holds."""

    checkpoint: gate.FileName


@dataclasses.dataclass(frozen=True)
class Saved:
    """One committed checkpoint. folder: its path or URL."""

    folder: str

    @property
    def name(self) -> str:
        return self.folder.rsplit("/", 1)[1]

    @property
    def step(self) -> int:
        return numbers(self.name)[0]

    @property
    def attempt(self) -> int:
        return numbers(self.name)[1]

    @cached_property
    def storage(self) -> Storage:
        return open_storage(self.folder)

    @cached_property
    def manifest(self) -> "CheckpointManifest":
        return read_manifest(self.storage)

    @cached_property
    def state(self) -> dict[str, Any]:
        tree = read_json(self.storage, STATE)
        gate.check(_State, tree, f"{self.folder}/{STATE}", DAMAGED)
        return tree

    def passed_over_by(self, later: "Saved") -> bool:
        """Did the attempt that saved `later` start behind this one?"""
        return later.attempt > self.attempt and later.step <= self.step

    def faults(self, part: int = 0, parts: int = 1) -> list[str]:
        """What differs from the manifest, a line for each file; empty when all is whole.

        Only every `parts`-th file from `part` on is looked at: ranks share the work.
        """
        try:
            files = self.manifest["files"]
        except DataError as error:
            return [f"{MANIFEST}: {error}"]
        found = [file_fault(self.storage, entry) for entry in files[part::parts]]
        return [line for line in found if line]


def checkpoint_root(run: str | Path, elsewhere: str | None) -> str:
    """Where the checkpoints of a run lie: in its folder, unless its configuration names another place."""
    return elsewhere or f"{run}/checkpoints"


def folder_name(step: int, attempt: int) -> str:
    """The folder of a checkpoint under its root."""
    return f"step-{step:08d}.attempt-{attempt}"


def numbers(name: str) -> tuple[int, int]:
    """-> (step, attempt) of a checkpoint's folder; (-1, -1) of anything else."""
    match = FOLDER.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else (-1, -1)


def committed(root: str | Path) -> list[Saved]:
    """Checkpoints that have a manifest, by step and attempt."""
    found = (Saved(f"{root}/{name}") for name in _folders(root))
    return [saved for saved in found if saved.storage.exists(MANIFEST)]


def _folders(root: str | Path) -> list[str]:
    return sorted((name for name in open_storage(root).folders() if FOLDER.fullmatch(name)), key=numbers)


def read_manifest(storage: Storage) -> CheckpointManifest:
    """The manifest of a checkpoint. Raises DataError where it is missing, something else, or of another format."""
    manifest: CheckpointManifest = gate.parse(CheckpointManifest, storage.get(MANIFEST), storage.root, DAMAGED)
    if manifest["version"] != VERSION:
        raise DataError(
            f"{storage.root}: format {manifest['version']}, this program reads {VERSION}; "
            "use the version of tessera that saved it"
        )
    names = [entry["name"] for entry in manifest["files"]]
    if len(set(names)) != len(names) or not {INDEX, STATE} <= set(names):
        raise DataError(f"{storage.root}: lists a file twice, or lacks {INDEX} or {STATE}; {DAMAGED}")
    return manifest


def read_json(storage: Storage, name: str) -> dict[str, Any]:
    """Raises DataError where the object is missing or is no JSON object."""
    data = storage.get(name)
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{storage.root}/{name} cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise DataError(f"{storage.root}/{name} cannot be read: it holds {type(tree).__name__}, not an object")
    return tree


def as_json(tree: Any) -> bytes:
    """The bytes under which a tree is stored: the same for equal trees."""
    return json.dumps(tree, indent=1, sort_keys=True).encode()


def put_once(storage: Storage, name: str, data: bytes) -> dict[str, Any]:
    """Create an object -> its entry in the manifest. Raises DataError where the name is taken."""
    if not storage.put_if_absent(name, data):
        raise DataError(f"{storage.root}/{name} exists already; another attempt committed it")
    return {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def file_fault(storage: Storage, entry: Mapping[str, Any]) -> str:
    """How an object differs from its entry in a manifest; empty when it does not."""
    name = entry["name"]
    try:
        if not storage.exists(name):
            return f"{name}: missing"
        size, _ = storage.stat(name)
        if size != entry["bytes"]:
            return f"{name}: {size} bytes, the manifest says {entry['bytes']}"
        digest = hashlib.sha256()
        for start in range(0, size, BUFFER):
            digest.update(storage.get_range(name, start, min(start + BUFFER, size)))
    except DataError as error:
        return f"{name}: {error}"
    same = digest.hexdigest() == entry["sha256"]
    return "" if same else f"{name}: sha256 {digest.hexdigest()[:12]}, the manifest says another"


# ------------------------------------------------------------------------------------------------- claims


def claim_attempt(root: str | Path, at_least: int, by: dict[str, Any]) -> int:
    """Take the next free attempt number, from `at_least` on, for this process alone; earlier attempts are fenced."""
    storage = open_storage(root)
    number = max(at_least, newest_claim(root) + 1)
    while not storage.put_if_absent(f"attempt-{number:05d}.json", as_json(by)):
        number += 1
    return number


def newest_claim(root: str | Path) -> int:
    """The attempt that owns the run; -1 when none was made."""
    return max((int(match[1]) for name in open_storage(root).list() if (match := CLAIM.fullmatch(name))), default=-1)


def consent_since(root: str | Path, attempt: int) -> dict[str, Any]:
    """What attempts after `attempt` were told to change, by dotted key; the newest word on a key counts."""
    storage = open_storage(root)
    later = {int(match[1]): name for name in storage.list() if (match := CLAIM.fullmatch(name))}
    consent: dict[str, Any] = {}
    for number in sorted(number for number in later if number > attempt):
        told = read_json(storage, later[number]).get("changes")
        consent |= told if isinstance(told, dict) else {}
    return consent


def refuse_overtaken(root: str | Path, attempt: int) -> None:
    """Raises Overtaken when a later attempt has claimed the run: it must neither see our commits nor our removals."""
    owner = newest_claim(root)
    if owner > attempt:
        raise Overtaken(
            f"attempt {owner} has taken over the run from attempt {attempt}, which ends here; "
            "to train beside it, give another `run`"
        )


# ---------------------------------------------------------------------------------------------- retention


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the last ones, every M-th step, the best by the metric `best`, and named ones.

    best: as `train.keep_best`, a name or min:NAME or max:NAME; the least where no direction is known.

    The last are counted among the regular ones, whose step `regular` divides: a roll back needs them, and a save that a
    stop signal asked for must not push them out. Of the others the newest stays. None is counted that a later attempt
    started behind: it would have started there, had that one been whole.
    """

    last: int
    every_steps: int = 0
    best: str = ""
    regular: int = 1

    @classmethod
    def of(cls, train: "TrainConfig") -> "Retention":
        """As a run's configuration has it."""
        regular = train.checkpoint_every_steps
        return cls(train.keep_checkpoints, train.keep_every_steps, train.keep_best, regular)

    def reasons(self, root: str | Path, rows: list[Saved], new: str = "") -> dict[str, list[str]]:
        """Folder name -> why it stays; no reason, no stay. new: the one just saved, whatever lies beside it."""
        kept: dict[str, list[str]] = {saved.name: [] for saved in rows}
        line = [saved for saved in rows if not any(saved.passed_over_by(later) for later in rows)]
        regular = [saved for saved in line if saved.step % self.regular == 0]
        for saved in regular[-self.last :]:
            kept[saved.name].append("last")
        for saved in rows:
            if saved.name in (new, line[-1].name) and not kept[saved.name]:
                kept[saved.name].append("newest")
        for saved in rows:
            if self.every_steps and saved.step % self.every_steps == 0:
                kept[saved.name].append(f"every {self.every_steps}")
        metric, direction = parsed(self.best)
        scores = {saved.name: score for saved in rows if (score := _mean(saved, metric)) is not None}
        if scores:
            sign = -1 if direction == "max" else 1
            winner = min(scores, key=lambda name: (sign * scores[name], name))
            kept[winner].append(f"best {metric}={scores[winner]:.6g}")
        for name, label in names(root):
            kept.get(name, []).append(f"named {label}")
        return kept


def _mean(saved: Saved, metric: str) -> float | None:
    """Mean of the metric over the steps before the save; without a finite one a checkpoint cannot be the best."""
    try:
        mean = saved.state.get("means", {}).get(metric) if metric else None
    except DataError:
        return None
    return mean if mean is not None and math.isfinite(mean) else None


def names(root: str | Path) -> Iterator[tuple[str, str]]:
    """-> (folder name, label) of every named checkpoint."""
    storage = open_storage(root)
    for entry in storage.list():
        if match := NAME.fullmatch(entry):
            label = gate.parse(_Label, storage.get(entry), f"{storage.root}/{entry}", "name the checkpoint again")
            yield label["checkpoint"], match[1]


def tidy(root: str | Path, retention: Retention, may_go: Callable[[int, int], bool], new: str = "") -> list[str]:
    """Remove what nothing keeps, and folders without a manifest for which `may_go(step, attempt)` -> their names.

    new: the checkpoint that was just saved, which stays.

    The manifest goes first, so that no checkpoint is ever half there.
    """
    rows = committed(root)
    kept = retention.reasons(root, rows, new)
    gone = [saved for saved in rows if not kept[saved.name]]
    for saved in gone:
        saved.storage.remove(MANIFEST)
        saved.storage.remove_all()
    whole = {saved.name for saved in rows}
    orphans = [name for name in _folders(root) if name not in whole and may_go(*numbers(name))]
    for name in orphans:
        open_storage(f"{root}/{name}").remove_all()
    return sorted([saved.name for saved in gone] + orphans)
