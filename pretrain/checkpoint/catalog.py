"""Contents of a checkpoint root: names, manifests, digests, claims, retention. Independent of tensors and ranks."""

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
DAMAGED = "it is damaged; resume from another checkpoint, `tessera checkpoint verify` lists valid ones"
BUFFER = 8 << 20
"""Bytes held in memory at once while a file is hashed or read."""
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
    """Contents of MANIFEST.json."""

    version: int
    step: gate.Count
    attempt: gate.Count
    world: Annotated[int, Field(ge=1, le=2**24)]
    files: list[FileEntry]


@with_config(gate.OPEN)
class _StreamState(TypedDict):
    position: gate.Count


Fingerprint = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{12,64}(@step \d{1,15})?$")]
"""Fingerprint of something a run depends on; see fingerprints.py."""


@with_config(gate.OPEN)
class _Evaluations(TypedDict):
    """The evaluations made so far, see pretrain/evaluations/patience.py."""

    watched: str
    step: Annotated[int, Field(ge=-1, lt=2**63)]
    misses: gate.Count
    best: NotRequired[float]
    best_step: NotRequired[gate.Count]


@with_config(gate.OPEN)
class _State(TypedDict):
    """The fields of state.json that are computed with; the other fields are compared with those of the run."""

    stream: NotRequired[_StreamState]
    means: NotRequired[dict[str, float]]
    fingerprints: NotRequired[dict[str, Fingerprint]]
    changes: NotRequired[list[dict[str, Any]]]
    evaluations: NotRequired[_Evaluations]


@with_config(gate.CLOSED)
class _Label(TypedDict):
    """Contents of name-LABEL.json."""

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
        """Return whether the attempt that saved `later` resumed from before this checkpoint."""
        return later.attempt > self.attempt and later.step <= self.step

    def faults(self, part: int = 0, parts: int = 1) -> list[str]:
        """Return the differences from the manifest, one line per file; empty when all files are whole.

        Only every `parts`-th file from `part` on is checked: ranks share the work.
        """
        try:
            files = self.manifest["files"]
        except DataError as error:
            return [f"{MANIFEST}: {error}"]
        found = [file_fault(self.storage, entry) for entry in files[part::parts]]
        return [line for line in found if line]


def folder_name(step: int, attempt: int) -> str:
    """Return the name of a checkpoint's folder under its root."""
    return f"step-{step:08d}.attempt-{attempt}"


def numbers(name: str) -> tuple[int, int]:
    """Return (step, attempt) of a checkpoint's folder name; (-1, -1) for any other name."""
    match = FOLDER.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else (-1, -1)


def committed(root: str | Path) -> list[Saved]:
    """Return the checkpoints that have a manifest, sorted by step and attempt."""
    found = (Saved(f"{root}/{name}") for name in _folders(root))
    return [saved for saved in found if saved.storage.exists(MANIFEST)]


def _folders(root: str | Path) -> list[str]:
    return sorted((name for name in open_storage(root).folders() if FOLDER.fullmatch(name)), key=numbers)


def read_manifest(storage: Storage) -> CheckpointManifest:
    """Return the manifest of a checkpoint. Raises DataError if it is missing, invalid, or of another format version."""
    manifest: CheckpointManifest = gate.parse(CheckpointManifest, storage.get(MANIFEST), storage.root, DAMAGED)
    if manifest["version"] != VERSION:
        raise DataError(
            f"{storage.root}: format {manifest['version']}, supported is {VERSION}; "
            "use the version of tessera that saved it"
        )
    folder, saved_at = str(storage.root).rstrip("/").rsplit("/", 1)[-1], (manifest["step"], manifest["attempt"])
    if numbers(folder) not in (saved_at, (-1, -1)):
        raise DataError(
            f"{storage.root}: its manifest is of {folder_name(*saved_at)}; rename the folder back, or use another "
            "checkpoint"
        )
    names = [entry["name"] for entry in manifest["files"]]
    if len(set(names)) != len(names) or not {INDEX, STATE} <= set(names):
        raise DataError(f"{storage.root}: lists a file twice, or lacks {INDEX} or {STATE}; {DAMAGED}")
    return manifest


def read_json(storage: Storage, name: str) -> dict[str, Any]:
    """Read a JSON object. Raises DataError if it is missing or not a JSON object."""
    data = storage.get(name)
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{storage.root}/{name} cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise DataError(f"{storage.root}/{name} cannot be read: it holds {type(tree).__name__}, not an object")
    return tree


def as_json(tree: Any) -> bytes:
    """Serialise a tree as JSON bytes, the same bytes for equal trees."""
    return json.dumps(tree, indent=1, sort_keys=True).encode()


def put_once(storage: Storage, name: str, data: bytes) -> dict[str, Any]:
    """Create an object -> its entry in the manifest. Raises DataError if the name is taken."""
    if not storage.put_if_absent(name, data):
        raise DataError(f"{storage.root}/{name} exists already; another attempt committed it")
    return {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def file_fault(storage: Storage, entry: Mapping[str, Any]) -> str:
    """Return how an object differs from its entry in a manifest; empty when it does not."""
    name = entry["name"]
    try:
        if not storage.exists(name):
            return f"{name}: missing"
        size, _ = storage.stat(name)
        if size != entry["bytes"]:
            return f"{name}: {size} bytes, the manifest has {entry['bytes']}"
        digest = hashlib.sha256()
        for start in range(0, size, BUFFER):
            digest.update(storage.get_range(name, start, min(start + BUFFER, size)))
    except DataError as error:
        return f"{name}: {error}"
    same = digest.hexdigest() == entry["sha256"]
    return "" if same else f"{name}: sha256 {digest.hexdigest()[:12]}, the manifest says another"


# ------------------------------------------------------------------------------------------------- claims


def claim_attempt(root: str | Path, at_least: int, by: dict[str, Any]) -> int:
    """Claim the next free attempt number from `at_least` on, exclusively; earlier attempts can no longer commit."""
    storage = open_storage(root)
    number = max(at_least, newest_claim(root) + 1)
    while not storage.put_if_absent(f"attempt-{number:05d}.json", as_json(by)):
        number += 1
    return number


def newest_claim(root: str | Path) -> int:
    """Return the number of the attempt that owns the run; -1 without any claim."""
    return max((int(match[1]) for name in open_storage(root).list() if (match := CLAIM.fullmatch(name))), default=-1)


def consent_since(root: str | Path, attempt: int) -> dict[str, Any]:
    """Return the changes that attempts after `attempt` were given consent for, by dotted key; the newest value wins."""
    storage = open_storage(root)
    later = {int(match[1]): name for name in storage.list() if (match := CLAIM.fullmatch(name))}
    consent: dict[str, Any] = {}
    for number in sorted(number for number in later if number > attempt):
        told = read_json(storage, later[number]).get("changes")
        consent |= told if isinstance(told, dict) else {}
    return consent


def refuse_overtaken(root: str | Path, attempt: int) -> None:
    """Raise Overtaken if a later attempt has claimed the run: then this one must neither commit nor remove anything."""
    owner = newest_claim(root)
    if owner > attempt:
        raise Overtaken(
            f"attempt {owner} has taken over the run from attempt {attempt}, which stops; "
            "for a second run, set another `run`"
        )


# ---------------------------------------------------------------------------------------------- retention


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept: the last ones, every M-th step, the best by the metric `best`, and named ones.

    best: as `train.keep_best`: NAME, min:NAME or max:NAME; the lowest value wins if no direction is known.

    `last` counts only regular checkpoints, whose step is a multiple of `regular`: a roll-back needs them, and a save
    requested by a stop signal must not displace them. Of the others the newest is kept. A checkpoint is not counted if
    a later attempt resumed from before it: had it been whole, that attempt would have resumed from it.
    """

    last: int
    every_steps: int = 0
    best: str = ""
    regular: int = 1

    @classmethod
    def of(cls, train: "TrainConfig") -> "Retention":
        """Return the retention that a run's configuration asks for."""
        regular = train.checkpoint_every_steps
        return cls(train.keep_checkpoints, train.keep_every_steps, train.keep_best, regular)

    def reasons(self, root: str | Path, rows: list[Saved], new: str = "") -> dict[str, list[str]]:
        """Return folder name -> reasons to keep it, empty if none. new: the checkpoint just saved, always kept."""
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
    """Return the metric's mean since the previous save; None if not finite, which excludes the checkpoint from best."""
    try:
        mean = saved.state.get("means", {}).get(metric) if metric else None
    except DataError:
        return None
    return mean if mean is not None and math.isfinite(mean) else None


def names(root: str | Path) -> Iterator[tuple[str, str]]:
    """Yield (folder name, label) of every named checkpoint."""
    storage = open_storage(root)
    for entry in storage.list():
        if match := NAME.fullmatch(entry):
            label = gate.parse(_Label, storage.get(entry), f"{storage.root}/{entry}", "name the checkpoint again")
            yield label["checkpoint"], match[1]


def tidy(root: str | Path, retention: Retention, may_go: Callable[[int, int], bool], new: str = "") -> list[str]:
    """Remove checkpoints without a reason to keep, and uncommitted folders if `may_go(step, attempt)` -> their names.

    new: the checkpoint that was just saved, which is kept.

    The manifest is removed first, so that a checkpoint never looks committed while it is incomplete.
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
