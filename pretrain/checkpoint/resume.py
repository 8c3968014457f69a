"""Checks whether a run may resume from a checkpoint: settings, consented changes and fingerprints."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from data_pipeline.errors import ConfigError
from data_pipeline.stream.mixture import Source
from pretrain.checkpoint.catalog import Saved, consent_since
from pretrain.checkpoint.fingerprints import (
    IMAGE_TOKENIZER,
    INITIAL,
    TEXT_TOKENIZER,
    UNKNOWN,
    Fingerprints,
    compare,
    fingerprints_in,
    of_initial,
)
from pretrain.checkpoint.identity import Changes, check_identity, differences, refuse_idle, unchecked, values_of
from pretrain.checkpoint.saver import from_rank_0
from pretrain.config import RunConfig

if TYPE_CHECKING:
    from pretrain.runtime.mesh import Mesh


def check_resumed(
    saved: Saved, config: RunConfig, stream: Source, mesh: "Mesh", known: Fingerprints, asked: Iterable[str] = ()
) -> Changes:
    """Compare a checkpoint with the run that resumes from it -> the consented changes of settings.

    known: the fingerprints of the run; those that only the checkpoint has are added. asked: the settings of this
    attempt's `--change`. Raises ConfigError if the configuration, text tokenizer, image tokenizer or initial weights
    differ, or if a change changes nothing; DataError if the data differ.
    """
    changed = _agreed_changes(saved, config)
    refuse_idle(asked, changed, saved.state, config, saved.folder)
    _check_fingerprints(saved, config, mesh, known)
    stream.check(saved.state["stream"])
    return changed


def _agreed_changes(saved: Saved, config: RunConfig) -> Changes:
    """Return the consented changes. Raises ConfigError for other changes, and if the run ends before the checkpoint.

    Consent is read from the claims of all attempts since the checkpoint, including this one, and holds while the value
    is the one recorded there. So --change need not be repeated after an attempt that was killed before it saved.
    """
    before, root = saved.state["identity"], saved.folder.rpartition("/")[0]
    consent = consent_since(root, saved.attempt) if differences(before, config) else {}
    agreed = frozenset(key for key, value in values_of(config, consent).items() if value == consent[key])
    changed = check_identity(before, config, saved.folder, agreed)
    if config.train.steps < saved.step:
        raise ConfigError(
            f"train.steps={config.train.steps}: {saved.folder} is at step {saved.step} already; "
            f"use at least {saved.step}"
        )
    return changed


def _check_fingerprints(saved: Saved, config: RunConfig, mesh: "Mesh", known: Fingerprints) -> None:
    """Compare all fingerprints except datasets', which the stream's state covers. Rank 0 prints what is not checked."""
    before = fingerprints_in(saved.state)
    if mesh.rank == 0 and (settings := unchecked(saved.state["identity"], config)):
        print(f"{saved.folder} does not record {', '.join(settings)}: not checked", flush=True)
    files = {name: value for name, value in known.items() if name in (TEXT_TOKENIZER, IMAGE_TOKENIZER)}
    if config.initial and before is None:
        known[INITIAL] = UNKNOWN
    elif config.initial:
        files |= _initial_of_resumed((before or {}).get(INITIAL), config.initial, saved, mesh)
    compare(before, files, config, saved.folder, say=mesh.rank == 0)
    known |= (before or {}) | known


def _initial_of_resumed(before: str | None, source: str, saved: Saved, mesh: "Mesh") -> Fingerprints:
    """Return the fingerprint of `initial` to compare with the saved one; empty if unknown or its weights are gone.

    Rank 0 prints a note if the weights are gone. Raises ConfigError if the run began without `initial`.
    """
    if before is None:
        raise ConfigError(
            f"initial={source}: {saved.folder} belongs to a run without it, and initial weights are read at the "
            "start only; leave it out, or start a new run"
        )
    if before == UNKNOWN:
        return {}
    found = from_rank_0(mesh, INITIAL, lambda: of_initial(source, before))
    if found is None and mesh.rank == 0:
        print(f"initial={source}: the initial weights no longer exist: not checked", flush=True)
    return {} if found is None else {INITIAL: found}
