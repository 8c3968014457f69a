"""Put text of a configuration into a rendered job so that it stays text: the only quoting for every template.

`quoted` makes a word of bash, `directive` a line that sbatch reads, `comment` a comment, `kubelet` a word of a pod.
"""

import re
import shlex
from collections.abc import Iterable

from data_pipeline.errors import ConfigError

PLAIN_OPTION = re.compile(r"[\w@%+=:,./<>-]*", re.ASCII)


class Shell(str):
    """Source text of bash, quoted already: a variable that the shell of the job expands."""


def quoted(*parts: str) -> Shell:
    """Join `parts` into one word of bash; only what is `Shell` is expanded. Raises ConfigError for what is no text."""
    return Shell("".join(part if isinstance(part, Shell) else shlex.quote(_text(part)) for part in parts))


def command_line(words: Iterable[str]) -> Shell:
    """Join words into a command of bash."""
    return Shell(" ".join(quoted(word) for word in words))


def directive(name: str, value: object = None) -> str:
    """One line of options for sbatch, which knows quotation marks and backslashes, but no line breaks in a value.

    Raises ConfigError for a value that no such line can hold.
    """
    if value is None:
        return f"#SBATCH --{name}"
    text = _text(str(value))
    if not text.isprintable():
        raise ConfigError(f"{name}={text!r}: a line break or control character cannot be given to sbatch; take it out")
    if not PLAIN_OPTION.fullmatch(text):
        text = '"' + re.sub(r'([\\"])', r"\\\1", text) + '"'
    return f"#SBATCH --{name}={text}" if len(name) > 1 else f"#SBATCH -{name} {text}"


def comment(text: str) -> str:
    """A comment of one line: what would end the line, or cannot be seen, is shown as its escape."""
    shown = (letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
    return "# " + "".join(shown)


def kubelet(word: str) -> str:
    """A word of a pod's command or environment, in which Kubernetes would expand $(NAME)."""
    return _text(word).replace("$", "$$")


def _text(word: str) -> str:
    """`word`, if a command line can hold it."""
    if "\0" in word or not word.isascii() and word.encode("utf-8", "replace").decode() != word:
        raise ConfigError(f"{word!r} holds a zero byte or is no UTF-8; a command line cannot hold it, write it anew")
    return word
