"""Report the differences between two states of a stream, so that a user can see which one is wrong."""

from typing import Any

from data_pipeline.errors import DataError


def check_state(saved: dict[str, Any], now: dict[str, Any], dataset: str) -> None:
    """Raise DataError with a line for each field in which two states of a stream differ, except the position."""
    pairs = [(name, saved.get(name), now.get(name)) for name in sorted({*now, *saved} - {"position"})]
    lines = [
        f"{entry}: {before!r} saved, {after!r} now"
        for name, old, new in pairs
        for entry, before, after in _entries(name, old, new)
        if before != after
    ]
    if lines:
        raise DataError(
            f"{dataset}: the checkpoint was made with another stream; "
            "use its dataset and settings, or start a new run\n  " + "\n  ".join(lines)
        )


def _entries(name: str, old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """Return what to compare under a name: the two values, or the elements of two lists of equal length."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [(f"{name}[{i}]", *pair) for i, pair in enumerate(zip(old, new, strict=True))]
    return [(name, old, new)]
