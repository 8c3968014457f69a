"""Record of an unreadable row: a mapping with reason and detail instead of columns."""

from typing import Any

UNREADABLE = "\0unreadable"  # column of the detail
REASON = "\0reason"  # column of the reason; unreadable_row if missing


def unreadable(detail: str, reason: str = "unreadable_row") -> dict[str, Any]:
    """Make the record of an unreadable row. reason: one word with underscores, which is counted; detail: for people."""
    return {UNREADABLE: detail, REASON: reason}
