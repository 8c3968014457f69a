"""Paths as users write them: addresses, and `{00..99}` for ranges."""

import re


def is_remote(path: str) -> bool:
    """Return whether the path has a scheme, such as s3:// or https://."""
    return "://" in path


def expand_braces(pattern: str) -> list[str]:
    """Expand `a-{08..11}.tar` to a-08.tar ... a-11.tar; the width is that of the first number."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    heads = [f"{pattern[: match.start()]}{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return [head + tail for head in heads for tail in expand_braces(pattern[match.end() :])]
