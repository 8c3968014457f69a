"""The laws that a kill campaign is held against: each looks at what the two runs left, and says what breaks it.

A law is a function Campaign -> complaints; none means that it held.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launchers.chaos import EXPECTED, Campaign, checkpoint_folders
from pretrain.goodput import ATTEMPTS, METRICS, lines_of

LOSSES_TOLD = 3


def last_rows(run: Path) -> dict[int, dict[str, Any]]:
    """The last line of each step: what counts is the attempt that made it last."""
    return {row["step"]: row for row in lines_of(run / METRICS)}


def same_losses(campaign: Campaign) -> Iterator[str]:
    """Every step has the undisturbed run's loss, bit for bit; steps made again had it too."""
    expected = last_rows(campaign.reference)
    for row in lines_of(campaign.struck / METRICS):
        reference = expected.get(row["step"])
        if reference is None or row["loss_hex"] != reference["loss_hex"]:
            wanted = reference["loss_hex"] if reference else "no such step"
            yield f"step {row['step']} of attempt {row['attempt']}: loss {row['loss_hex']}, undisturbed {wanted}"
    missing = sorted(expected.keys() - last_rows(campaign.struck).keys())
    if missing:
        yield f"{len(missing)} steps are missing, first {missing[0]}"


def same_tensors(campaign: Campaign) -> Iterator[str]:
    """Every parameter, moment and buffer of the last checkpoint has the same sha256."""
    mine, theirs = tensor_digests(campaign.struck), tensor_digests(campaign.reference)
    if mine.keys() != theirs.keys():
        yield f"other tensors: {sorted(mine.keys() ^ theirs.keys())[:3]}"
    for name in sorted(mine.keys() & theirs.keys()):
        if mine[name] != theirs[name]:
            yield f"{name}: sha256 {mine[name][:12]}, undisturbed {theirs[name][:12]}"


def tensor_digests(run: Path) -> dict[str, str]:
    """Name -> sha256 of every tensor of the newest checkpoint."""
    from pretrain.checkpoint.layout import Slices
    from pretrain.checkpoint.trained import newest_whole

    slices = Slices(newest_whole(run).folder)
    tensors = {f"{kind}/{name}": slices.whole(kind, name) for name in slices.shapes for kind in slices.kinds(name)}
    tensors |= {f"buffer/{name}": slices.buffer(name) for name in slices.buffers}
    return {name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


def every_sample_once(campaign: Campaign) -> Iterator[str]:
    """The ledger: the steps that count consume every position of the stream once, in order, none twice."""
    at, batch = 0, campaign.config.train.global_batch
    for step, row in sorted(last_rows(campaign.struck).items()):
        if row["positions"] != [at, at + batch]:
            yield f"step {step} consumed positions {row['positions']}, its turn were [{at}, {at + batch}]"
        at = row["positions"][1]
    if at != campaign.config.train.steps * batch:
        yield f"{at} positions consumed, {campaign.config.train.steps * batch} expected"


def always_resumable(campaign: Campaign) -> Iterator[str]:
    """Every attempt ended the way its strike ends one, the last one with 0."""
    for number, event in enumerate(campaign.events, 1):
        if event.code not in EXPECTED[event.strike.whom] | ({0} if event.strike.whom == "stop" else set()):
            yield f"strike {number} ({event.strike}): exit code {event.code}"
    if campaign.last_code != 0:
        yield f"the last attempt left with {campaign.last_code}, see {campaign.struck.with_suffix('.log')}"


def little_is_lost(campaign: Campaign) -> Iterator[str]:
    """A restart goes back one interval and the save that was under way, one more for each damaged checkpoint."""
    reached = 0
    damaged = {event.damaged.split("/")[0] for event in campaign.events if event.damaged}
    rows = list(lines_of(campaign.struck / METRICS))
    for line in lines_of(campaign.struck / ATTEMPTS):
        lost = reached - line["from_step"]
        allowed = 2 * campaign.every * (1 + len(damaged)) if damaged else 2 * campaign.every
        if lost >= allowed:
            yield f"attempt {line['attempt']} went on from step {line['from_step']}, {lost} steps behind"
        reached = max([reached, *(row["step"] for row in rows if row["attempt"] == line["attempt"])])


def nothing_is_left_over(campaign: Campaign) -> Iterator[str]:
    """No process outlives its launcher, no folder without a manifest outlives the run, every checkpoint is whole."""
    from pretrain.checkpoint.verbs import verify

    for number, event in enumerate(campaign.events, 1):
        if event.orphans:
            yield f"strike {number} ({event.strike}) left processes {list(event.orphans)}"
    for folder in checkpoint_folders(campaign.struck):
        if not (folder / "MANIFEST.json").exists():
            yield f"{folder.name} has no manifest and was not removed"
    kept = {folder.name for folder in checkpoint_folders(campaign.struck)}
    if not any(event.damaged.split("/")[0] in kept for event in campaign.events if event.damaged):
        verify(campaign.struck)


LAWS: dict[str, Callable[[Campaign], Iterator[str]]] = {
    "same training: losses": same_losses,
    "same training: tensors": same_tensors,
    "same batches": every_sample_once,
    "always resumable": always_resumable,
    "little is lost": little_is_lost,
    "nothing is left over": nothing_is_left_over,
}


def broken_laws(campaign: Campaign) -> dict[str, list[str]]:
    """Law -> complaints, for all of LAWS; a law that cannot be looked at is broken."""
    from data_pipeline.errors import TesseraError

    told = {}
    for name, law in LAWS.items():
        try:
            told[name] = list(law(campaign))
        except TesseraError as error:
            told[name] = [str(error)]
    return told
