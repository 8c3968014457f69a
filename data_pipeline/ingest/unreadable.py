"""The record of a row that cannot be read: a mapping with the reason and the details instead of columns."""

from typing import Any

UNREADABLE = "\0unreadable"  # the column that says why
REASON = "\0reason"  # the column of the reason, where it is not unreadable_row


def unreadable(detail: str, reason: str = "unreadable_row") -> dict[str, Any]:
    """reason: one word with underscores, which is counted; detail: for people."""
    return {UNREADABLE: detail, REASON: reason}
