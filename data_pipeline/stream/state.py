"""What two saved states of a stream differ in, for the person who has to see which is the wrong one."""

from typing import Any

from data_pipeline.errors import DataError


def check_state(saved: dict[str, Any], now: dict[str, Any], dataset: str) -> None:
    """Raises DataError with a line for each field in which two states of a stream differ, the position aside."""
    pairs = [(name, saved.get(name), now.get(name)) for name in sorted({*now, *saved} - {"position"})]
    lines = [
        f"{entry}: {before!r} saved, {after!r} now"
        for name, old, new in pairs
        for entry, before, after in _entries(name, old, new)
        if before != after
    ]
    if lines:
        raise DataError(
            f"{dataset}: the saved stream is another one, so its position means nothing here; "
            "use the dataset and settings it was saved with, or start a new run\n  " + "\n  ".join(lines)
        )


def _entries(name: str, old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """What is compared under a name: the values, or those of two lists of one length one by one."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [(f"{name}[{i}]", *pair) for i, pair in enumerate(zip(old, new, strict=True))]
    return [(name, old, new)]
