"""The laws: invariants checked after a campaign on the files of its two runs.

A law is a function Campaign -> complaints, which yields nothing if the law holds.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_pipeline.errors import TesseraError
from data_pipeline.storage import open_storage
from launchers.chaos.campaign import Campaign, Event
from launchers.chaos.plan import Whom
from pretrain.checkpoint.catalog import CLAIM, FOLDER, MANIFEST, committed, numbers
from pretrain.runtime.goodput import ATTEMPTS, evaluations_of, lines_of, steps_of
from pretrain.schema.tasks import EVALUATED

ENDS: dict[Whom, set[int | None]] = {
    "rank": {70}, "launcher": {-9}, "tree": {-9}, "stop": {75, 0}, "freeze": {70}, "storage": {None, 0},
    "nobody": set(),
}  # fmt: skip
"""Allowed exit codes per target of a strike. A stop may hit the last step (0); a storage fault must be survived."""


def last_rows(run: Path) -> dict[int, dict[str, Any]]:
    """Return the last metrics row of each step: the last attempt that made a step counts."""
    return {row["step"]: row for row in steps_of(run)}


def same_losses(campaign: Campaign) -> Iterator[str]:
    """Every step, repeated ones included, has the reference's loss bit for bit, and no step is missing."""
    expected = last_rows(campaign.reference)
    for row in steps_of(campaign.struck):
        reference = expected.get(row["step"])
        if reference is None or row["loss_hex"] != reference["loss_hex"]:
            wanted = reference["loss_hex"] if reference else "has no such step"
            yield f"step {row['step']} of attempt {row['attempt']}: loss {row['loss_hex']}, reference {wanted}"
    missing = sorted(expected.keys() - last_rows(campaign.struck).keys())
    if missing:
        yield f"{len(missing)} steps are missing, first {missing[0]}"


def same_evaluations(campaign: Campaign) -> Iterator[str]:
    """Every evaluation in training, repeated ones included, has the reference's figures, and none is missing."""
    expected = {row["step"]: _figures(row) for row in evaluations_of(campaign.reference)}
    found = list(evaluations_of(campaign.struck))
    for row in found:
        if _figures(row) != expected.get(row["step"]):
            wanted = expected.get(row["step"], "no such evaluation")
            yield f"evaluation of step {row['step']}, attempt {row['attempt']}: {_figures(row)}, undisturbed {wanted}"
    if missing := sorted(expected.keys() - {row["step"] for row in found}):
        yield f"{len(missing)} evaluations are missing, first that of step {missing[0]}"


def _figures(row: dict[str, Any]) -> dict[str, str]:
    return {name: float(value).hex() for name, value in row.items() if name.startswith(EVALUATED)}


def same_tensors(campaign: Campaign) -> Iterator[str]:
    """Every parameter, moment and buffer of the last checkpoint has the same sha256 as in the reference."""
    mine, theirs = tensor_digests(campaign.struck), tensor_digests(campaign.reference)
    if mine.keys() != theirs.keys():
        yield f"other tensors: {sorted(mine.keys() ^ theirs.keys())[:3]}"
    for name in sorted(mine.keys() & theirs.keys()):
        if mine[name] != theirs[name]:
            yield f"{name}: sha256 {mine[name][:12]}, reference {theirs[name][:12]}"


def tensor_digests(run: Path) -> dict[str, str]:
    """Return the sha256 of every tensor of the newest checkpoint, by name."""
    from pretrain.checkpoint.layout import Slices
    from pretrain.checkpoint.trained import newest_whole

    slices = Slices(newest_whole(run).folder)
    tensors = {f"{kind}/{name}": slices.whole(kind, name) for name in slices.shapes for kind in slices.kinds(name)}
    tensors |= {f"buffer/{name}": slices.buffer(name) for name in slices.buffers}
    return {name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


def every_position_once(campaign: Campaign) -> Iterator[str]:
    """The steps that count consume every position of the stream exactly once, in order."""
    at, train = 0, campaign.config.train
    for step, row in sorted(last_rows(campaign.struck).items()):
        batch = train.batch_at(step - 1)
        if row["positions"] != [at, at + batch]:
            yield f"step {step} consumed positions {row['positions']}, expected [{at}, {at + batch}]"
        at = row["positions"][1]
    if at != train.samples:
        yield f"{at} positions consumed, {train.samples} expected"


def every_sample_once(campaign: Campaign) -> Iterator[str]:
    """Every sample of a dataset is consumed once in each complete epoch, at most once in the last one."""
    from pretrain.inputs.source import open_stream

    stream = open_stream(campaign.config.data, campaign.config.seed)
    seen: Counter[tuple[int, int]] = Counter()
    epochs: dict[int, dict[int, int]] = {}
    sizes: dict[int, int] = {}
    for row in last_rows(campaign.struck).values():
        for position in range(*row["positions"]):
            epoch, sample, ids = stream.locate(position)
            seen[epoch, sample] += 1
            sizes[ids.start] = len(ids)
            counts = epochs.setdefault(ids.start, {})
            counts[epoch] = counts.get(epoch, 0) + 1
    for (epoch, sample), count in seen.items():
        if count > 1:
            yield f"sample {sample} was consumed {count} times in epoch {epoch}"
    for first, counts in epochs.items():
        for epoch in range(max(counts)):
            if counts.get(epoch, 0) != sizes[first]:
                yield f"epoch {epoch} consumed {counts.get(epoch, 0)} samples of {sizes[first]}"


def always_resumable(campaign: Campaign) -> Iterator[str]:
    """Every attempt ended with an exit code that its strike allows, the last one with 0."""
    for number, event in enumerate(campaign.events, 1):
        last_save_failed = event.code == 74 and campaign.config.train.steps in event.failed
        if event.code not in ENDS[event.strike.whom] and not last_save_failed:
            yield f"strike {number} ({event.strike}): exit code {event.code}"
    if campaign.last_code != 0:
        yield f"the last attempt exited with {campaign.last_code}, see {campaign.struck.with_suffix('.log')}"


def newest_is_taken(campaign: Campaign) -> Iterator[str]:
    """Every attempt resumes from the newest checkpoint that was whole after the previous attempt's end."""
    for line, event in _starts(campaign):
        if line["from_step"] != event.newest:
            yield f"attempt {line['attempt']} resumed from {line['from_step']}, newest valid {event.newest}"


def little_is_lost(campaign: Campaign) -> Iterator[str]:
    """A restart loses at most two save intervals (the current one and the save in progress), plus one for each later
    save that failed because of a storage fault or was damaged on disk.
    """
    for line, event in _starts(campaign):
        start = line["from_step"]
        spoilt = {step for past in campaign.events for step in (*past.failed, _step_of(past.damaged)) if step > start}
        if event.reached - start > campaign.every * (2 + len(spoilt)):
            yield f"attempt {line['attempt']} resumed from step {start}, {event.reached - start} steps behind"


def _starts(campaign: Campaign) -> Iterator[tuple[dict[str, Any], Event]]:
    """Yield each attempt's line with the event that ended the previous attempt."""
    ended = [event for event in campaign.events if event.code is not None]
    for line in lines_of(campaign.struck / ATTEMPTS):
        before = [event for event in ended if event.ended_at < line["time"]]
        if before:
            yield line, before[-1]


def _step_of(damaged: str) -> int:
    return numbers(damaged.partition("/")[0])[0]


def nothing_is_left_over(campaign: Campaign) -> Iterator[str]:
    """No process outlives its launcher, no uncommitted save outlives the run, every undamaged checkpoint is whole."""
    for number, event in enumerate(campaign.events, 1):
        if event.orphans:
            yield f"strike {number} ({event.strike}) left processes {list(event.orphans)} running"
    root = campaign.root(campaign.struck)
    whole = {saved.name: saved for saved in committed(root)}
    for name in open_storage(root).folders():
        if FOLDER.fullmatch(name) and name not in whole:
            yield f"{name} has no {MANIFEST} and was not removed"
    damaged = {event.damaged.partition("/")[0] for event in campaign.events}
    for name in whole.keys() - damaged:
        yield from (f"{name}/{fault}" for fault in whole[name].faults())


def attempts_are_fenced(campaign: Campaign) -> Iterator[str]:
    """Each attempt claimed its own number, and every checkpoint was committed by the attempt that owned the run."""
    root = campaign.root(campaign.struck)
    claimed = {int(match[1]) for name in open_storage(root).list() if (match := CLAIM.fullmatch(name))}
    noted = [line["attempt"] for line in lines_of(campaign.struck / ATTEMPTS)]
    if len(set(noted)) != len(noted):
        yield f"attempts {sorted(number for number, count in Counter(noted).items() if count > 1)} were started twice"
    if missing := sorted(set(noted) - claimed):
        yield f"attempts {missing} ran without a claim"
    damaged = {event.damaged.partition("/")[0] for event in campaign.events}
    steps = [saved for saved in committed(root) if saved.name not in damaged]
    for earlier, later in zip(steps, steps[1:], strict=False):
        if later.attempt < earlier.attempt:
            yield f"{later.name} was committed by an attempt that {earlier.name} had overtaken"


LAWS: dict[str, Callable[[Campaign], Iterator[str]]] = {
    "same training: losses": same_losses,
    "same training: evaluations": same_evaluations,
    "same training: tensors": same_tensors,
    "same batches: positions": every_position_once,
    "same batches: samples": every_sample_once,
    "always resumable": always_resumable,
    "the newest is taken": newest_is_taken,
    "little is lost": little_is_lost,
    "nothing is left over": nothing_is_left_over,
    "attempts are fenced": attempts_are_fenced,
}


def broken_laws(campaign: Campaign) -> dict[str, list[str]]:
    """Check all LAWS and return the complaints by law; a law whose check fails counts as broken."""
    told = {}
    for name, law in LAWS.items():
        try:
            told[name] = list(law(campaign))
        except TesseraError as error:
            told[name] = [str(error)]
    return told
