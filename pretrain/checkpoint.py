"""Sharded checkpoints, committed by a manifest that is written last.

RUN/checkpoints/step-S.attempt-A/ holds rRRRRR.safetensors (of each rank: float32 slices [lo, hi) of flattened
parameters and AdamW moments, intervals in the header), state.json (step, position, groups, what the run is) and
MANIFEST.json (name, size and sha256 of every file). A folder without a manifest is no checkpoint. Because slices carry
their intervals, any number of ranks at any ZeRO stage reads what any other wrote. Generator states are not saved: all
randomness is a function of (seed, position).
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from data_pipeline.errors import ConfigError, DataError, TesseraError
from data_pipeline.settings import check_settings, flatten
from pretrain.config import RunConfig
from pretrain.engine import Engine
from pretrain.interchange.folder import export_model
from pretrain.mesh import Mesh
from pretrain.models import MODELS

MANIFEST = "MANIFEST.json"
STATE = "state.json"
VERSION = 1
COMMIT_TIMEOUT_S = 600
FOLDER = re.compile(r"step-(\d+)\.attempt-(\d+)")
FREE_TO_CHANGE = {
    "run": None,
    "tracking": None,
    "deepspeed": None,
    "data": ("dataset", "vocabulary", "tokenizer", "evaluation", "prefetch_steps"),
    "train": (
        "zero_stage", "micro_batch", "checkpoint_every_steps", "keep_checkpoints", "log_every_steps",
        "sample_every_steps", "collective_timeout_s",
    ),
}  # fmt: skip
"""Settings that a resumed run may have differently: where things lie, how work is split, what is written when.
The dataset and the tokenizer are held to their fingerprints instead of their paths."""


@dataclasses.dataclass(frozen=True)
class Saved:
    """One committed checkpoint."""

    folder: Path

    @property
    def step(self) -> int:
        return _numbers(self.folder)[0]

    @property
    def attempt(self) -> int:
        return _numbers(self.folder)[1]

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return _read_json(self.folder / MANIFEST)

    @cached_property
    def state(self) -> dict[str, Any]:
        return _read_json(self.folder / STATE)

    def faults(self) -> list[str]:
        """What differs from the manifest, a line for each file; empty when all is whole."""
        try:
            files = self.manifest["files"]
        except (DataError, KeyError) as error:
            return [f"{MANIFEST}: {error}"]
        return [line for entry in files for line in _file_faults(self.folder, entry)]


class Checkpoints:
    """The checkpoints of one run, as its ranks write and read them together."""

    def __init__(self, run: Path, mesh: Mesh, attempt: int, keep: int) -> None:
        self.folder = run / "checkpoints"
        self.mesh = mesh
        self.attempt = attempt
        self.keep = keep

    def save(self, engine: Engine, step: int, state: dict[str, Any]) -> Path:
        """Every rank writes its slices, rank 0 commits -> the folder. Raises DataError on all ranks when one failed.

        The ranks report through the store, never through the training group: a storage error on one must not leave
        the others in a collective.
        """
        folder = self.folder / f"step-{step:08d}.attempt-{self.attempt}"
        files = [self._reported(folder, lambda: _write_slices(folder, self.mesh, engine))]
        if self.mesh.rank == 0:
            files += [json.loads(self._get(f"{folder.name}/{rank}")) for rank in range(1, self.mesh.world)]
            self.mesh.store.set(f"{folder.name}/commit", self._commit(folder, step, state, files))
        verdict = self._get(f"{folder.name}/commit").decode()
        if verdict:
            raise DataError(f"{folder} was not committed: {verdict}; the checkpoints before it are untouched")
        return folder

    def newest(self) -> Saved | None:
        """The newest whole checkpoint, chosen by rank 0 for all; damaged ones are passed over with a word why."""
        key = "newest"
        if self.mesh.rank == 0:
            self.mesh.store.set(key, self._choice())
        name = self._get(key).decode()
        if name.startswith("error:"):
            raise DataError(name.removeprefix("error:"))
        return Saved(self.folder / name) if name else None

    def _choice(self) -> str:
        candidates = committed(self.folder)
        for saved in reversed(candidates):
            faults = saved.faults()
            if not faults:
                return saved.folder.name
            print(f"checkpoint {saved.folder.name} is passed over: {'; '.join(faults)}", flush=True)
        if candidates:
            return (
                f"error:{self.folder}: none of {len(candidates)} checkpoints is whole; restore one or empty the folder"
            )
        return ""

    def _reported(self, folder: Path, write: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            report = write()
        except (OSError, SafetensorError) as error:
            report = {"error": f"rank {self.mesh.rank}: {error}"}
        self.mesh.store.set(f"{folder.name}/{self.mesh.rank}", json.dumps(report))
        return report

    def _commit(self, folder: Path, step: int, state: dict[str, Any], files: list[dict[str, Any]]) -> str:
        """Rank 0: state, then the manifest -> "" or what went wrong."""
        errors = [report["error"] for report in files if "error" in report]
        if errors:
            return "; ".join(errors)
        try:
            files.append(_write_file(folder / STATE, json.dumps(state, indent=1, sort_keys=True).encode()))
            manifest = {
                "version": VERSION,
                "step": step,
                "attempt": self.attempt,
                "world": self.mesh.world,
                "files": files,
            }
            create_only(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode())
            tidy(self.folder, self.keep)
        except (OSError, TesseraError) as error:
            return str(error)
        return ""

    def _get(self, key: str) -> bytes:
        self.mesh.store.wait([key], datetime.timedelta(seconds=COMMIT_TIMEOUT_S))
        return bytes(self.mesh.store.get(key))


# ------------------------------------------------------------------------------------------ reading slices


class Slices:
    """Reads any interval of any tensor of a checkpoint, whatever ranks and stage wrote it."""

    def __init__(self, folder: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.buffers: list[str] = []
        self._parts: dict[str, list[tuple[int, int, Any]]] = {}
        for path in sorted(folder.glob("r*.safetensors")):
            self._add(safe_open(path, framework="pt"))

    def _add(self, file: Any) -> None:
        header = json.loads(file.metadata()["slices"])
        for name, (shape, lo, hi) in header.items():
            self.shapes[name] = tuple(shape)
            self._parts.setdefault(name, []).append((lo, hi, file))
        for key in file.keys():  # noqa: SIM118  (a file handle, not a mapping)
            if key.startswith("buffer/"):
                self.buffers.append(key)
                self._parts[key] = [(0, 0, file)]

    def interval(self, kind: str, name: str, lo: int, hi: int) -> Tensor:
        """-> float32 [hi - lo] of "param", "exp_avg" or "exp_avg_sq"; raises DataError where a part is missing."""
        pieces, at = [], lo
        for begin, end, file in sorted(self._parts.get(name, []), key=lambda part: part[0]):
            if begin <= at < end:
                stop = min(end, hi)
                pieces.append(file.get_slice(f"{kind}/{name}")[at - begin : stop - begin])
                at = stop
        if at < hi:
            raise DataError(f"the checkpoint has {name} only up to element {at} of {hi}; it belongs to another model")
        return torch.cat(pieces)

    def whole(self, kind: str, name: str) -> Tensor:
        """-> float32 in the parameter's own shape."""
        shape = self.shapes[name]
        return self.interval(kind, name, 0, torch.Size(shape).numel()).view(shape)

    def buffer(self, key: str) -> Tensor:
        """A buffer by its key, "buffer/" and its name."""
        return self._parts[key][0][2].get_tensor(key)


@torch.no_grad()
def restore(saved: Saved, engine: Engine) -> None:
    """Fill the engine's masters, moments, working copies and buffers.

    Raises DataError for another model's checkpoint.
    """
    slices = Slices(saved.folder)
    unknown = sorted(set(engine.names.values()) ^ set(slices.shapes))
    if unknown:
        raise DataError(f"{saved.folder} belongs to another model: {len(unknown)} names differ, first {unknown[:3]}")
    for owned in engine.owned():
        if slices.shapes[owned.name] != owned.shape:
            was = list(slices.shapes[owned.name])
            raise DataError(f"{saved.folder}: {owned.name} has shape {was}, this model {list(owned.shape)}")
        for kind, view in owned.tensors.items():
            view.copy_(slices.interval(kind, owned.name, owned.lo, owned.hi))
    engine.refresh(lambda name: slices.whole("param", name).view(-1))
    buffers = dict(engine.deepspeed.module.named_buffers())
    for key in slices.buffers:
        buffers[key.removeprefix("buffer/")].copy_(slices.buffer(key))
    engine.set_updates(saved.state["updates"])


def load_trained(run: str | Path) -> tuple[nn.Module, RunConfig]:
    """The model of a run's newest whole checkpoint, in evaluation mode on the CPU, and the run's configuration."""
    folder = Path(run)
    config = run_config(folder)
    whole = [saved for saved in committed(folder / "checkpoints") if not saved.faults()]
    if not whole:
        raise DataError(f"{run}: no whole checkpoint; train it first, or look with `tessera checkpoint verify {run}`")
    slices = Slices(whole[-1].folder)
    prefix = "model."
    state = {
        name.removeprefix(prefix): slices.whole("param", name) for name in slices.shapes if name.startswith(prefix)
    }
    for key in slices.buffers:
        name = key.removeprefix("buffer/")
        if name.startswith(prefix):
            state[name.removeprefix(prefix)] = slices.buffer(key)
    model = MODELS[config.model.kind](config.model)
    model.load_state_dict(state, strict=False)
    absent = {name for name, _ in model.named_parameters()} - set(state)
    if absent:
        raise DataError(f"{whole[-1].folder} lacks {len(absent)} tensors of the model, first {sorted(absent)[0]}")
    return model.eval(), config


def run_config(run: Path) -> RunConfig:
    """The configuration that a run folder was trained with."""
    path = run / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; give the folder that a configuration names as `run:`")
    return check_settings(RunConfig, _read_json(path), str(path))


# ------------------------------------------------------------------------------- what a checkpoint belongs to


def identity(config: RunConfig) -> dict[str, Any]:
    """The settings that decide what is computed; a checkpoint is continued only under equal ones."""
    tree = config.model_dump(mode="json")
    for section, keys in FREE_TO_CHANGE.items():
        if keys is None:
            del tree[section]
        else:
            tree[section] = {key: value for key, value in tree[section].items() if key not in keys}
    return tree


def check_identity(saved: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """Raises ConfigError listing every setting that differs."""
    before, after = flatten(saved), flatten(now)
    lines = [
        f"{key}: {before.get(key)!r} saved, {after.get(key)!r} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    if lines:
        remedy = "restore these values, or give the run another folder"
        raise ConfigError(f"{where} was made under another configuration; {remedy}\n  " + "\n  ".join(lines))


# ---------------------------------------------------------------------------------- the command line's verbs


def list_(run: str | Path) -> list[dict[str, Any]]:
    """The committed checkpoints of a run, oldest first."""
    rows = committed(Path(run) / "checkpoints")
    return [
        {"step": saved.step, "attempt": saved.attempt, "world": saved.manifest["world"], "folder": str(saved.folder),
         "bytes": sum(entry["bytes"] for entry in saved.manifest["files"])}
        for saved in rows
    ]  # fmt: skip


def verify(run: str | Path) -> dict[str, Any]:
    """Sizes and digests of all checkpoints. Raises DataError naming each file that is off, or when there is none."""
    rows = committed(Path(run) / "checkpoints")
    if not rows:
        raise DataError(f"{run}: no committed checkpoint; train the run first")
    faults = [f"{saved.folder.name}/{line}" for saved in rows for line in saved.faults()]
    if faults:
        raise DataError(f"{run}: {len(faults)} files are off\n  " + "\n  ".join(faults))
    return {"checkpoints": len(rows), "newest_step": rows[-1].step, "whole": True}


def export(run: str | Path, output: str | Path) -> Path:
    """The newest checkpoint's weights as config.json and model.safetensors, without optimizer state."""
    model, config = load_trained(run)
    return export_model(output, config.model, model.state_dict())


def gc(run: str | Path, keep: int | None = None) -> dict[str, Any]:
    """Remove checkpoints beyond the newest `keep` and folders that were never committed."""
    folder = Path(run) / "checkpoints"
    before = {path.name for path in folder.glob("step-*")}
    tidy(folder, keep or run_config(Path(run)).train.keep_checkpoints)
    newest = committed(folder)[-1:]
    for path in folder.glob("step-*"):
        # A folder newer than the newest commit may be one that a live run is writing.
        if not (path / MANIFEST).exists() and newest and _numbers(path) < _numbers(newest[0].folder):
            shutil.rmtree(path)
    return {"removed": sorted(before - {path.name for path in folder.glob("step-*")})}


def committed(folder: Path) -> list[Saved]:
    """Checkpoints that have a manifest, by step and attempt."""
    found = [path for path in folder.glob("step-*.attempt-*") if (path / MANIFEST).is_file()]
    return [Saved(path) for path in sorted(found, key=_numbers)]


def tidy(folder: Path, keep: int) -> None:
    """Keep the newest `keep`; of the others the manifest goes first, so that none is ever half a checkpoint."""
    for saved in committed(folder)[:-keep]:
        (saved.folder / MANIFEST).unlink()
        shutil.rmtree(saved.folder)


# -------------------------------------------------------------------------------------------------- files


def create_only(path: Path, data: bytes) -> None:
    """Write a file that must not exist yet, whole or not at all. Raises DataError when it exists."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    _write_file(draft, data)
    try:
        os.link(draft, path)
    except FileExistsError:
        raise DataError(f"{path} exists already; another attempt committed it") from None
    finally:
        draft.unlink()
    _sync_folder(path.parent)


def _write_slices(folder: Path, mesh: Mesh, engine: Engine) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    header: dict[str, Any] = {}
    for name, shape, lo, hi, views in _shares(engine, mesh):
        header[name] = [shape, lo, hi]
        tensors |= {f"{kind}/{name}": view.detach().cpu().contiguous() for kind, view in views.items()}
    if mesh.rank == 0:
        named = engine.deepspeed.module.named_buffers()
        tensors |= {f"buffer/{name}": buffer.detach().cpu().contiguous() for name, buffer in named}
    path = folder / f"r{mesh.rank:05d}.safetensors"
    save_file(tensors, path, metadata={"slices": json.dumps(header)})
    return _described(path)


def _shares(engine: Engine, mesh: Mesh) -> Iterator[tuple[str, tuple[int, ...], int, int, dict[str, Tensor]]]:
    """What this rank writes: its own parts; of what every rank keeps whole (stage 0), an even part."""
    for owned in engine.owned():
        lo, hi = owned.lo, owned.hi
        if engine.stage == 0:
            part = -(-hi // mesh.world)
            lo, hi = min(mesh.rank * part, owned.hi), min((mesh.rank + 1) * part, owned.hi)
        if lo < hi:
            views = {kind: view[lo - owned.lo : hi - owned.lo] for kind, view in owned.tensors.items()}
            yield owned.name, owned.shape, lo, hi, views


def _write_file(path: Path, data: bytes) -> dict[str, Any]:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"name": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}


def _file_faults(folder: Path, entry: dict[str, Any]) -> list[str]:
    path = folder / entry["name"]
    if not path.is_file():
        return [f"{entry['name']}: missing"]
    if path.stat().st_size != entry["bytes"]:
        return [f"{entry['name']}: {path.stat().st_size} bytes, the manifest says {entry['bytes']}"]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return [] if digest == entry["sha256"] else [f"{entry['name']}: sha256 {digest[:12]}, the manifest says another"]


def _numbers(folder: Path) -> tuple[int, int]:
    match = FOLDER.fullmatch(folder.name)
    return (int(match[1]), int(match[2])) if match else (-1, -1)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some network file systems cannot
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
