"""Quote configuration text in rendered jobs, so that it is never run as code; all templates use this module alone.

`quoted` makes a bash word, `directive` an #SBATCH line, `comment` a comment, `kubelet` a word of a pod's command.
"""

import re
import shlex
from collections.abc import Iterable

from data_pipeline.errors import ConfigError

PLAIN_OPTION = re.compile(r"[\w@%+=:,./<>-]*", re.ASCII)


class Shell(str):
    """Bash source that is already quoted: a variable for the job's shell to expand."""


def quoted(*parts: str) -> Shell:
    """Join `parts` into one bash word; only `Shell` parts are expanded. Raise ConfigError for what is no text."""
    return Shell("".join(part if isinstance(part, Shell) else shlex.quote(_text(part)) for part in parts))


def command_line(words: Iterable[str]) -> Shell:
    """Join words into a bash command."""
    return Shell(" ".join(quoted(word) for word in words))


def directive(name: str, value: object = None) -> str:
    """Return one #SBATCH line. sbatch supports quotation marks and backslashes in a value, but no line breaks.

    Raise ConfigError for a value that such a line cannot hold.
    """
    if value is None:
        return f"#SBATCH --{name}"
    text = _text(str(value))
    if not text.isprintable():
        raise ConfigError(f"{name}={text!r}: sbatch takes no line breaks or control characters; remove them")
    if not PLAIN_OPTION.fullmatch(text):
        text = '"' + re.sub(r'([\\"])', r"\\\1", text) + '"'
    return f"#SBATCH --{name}={text}" if len(name) > 1 else f"#SBATCH -{name} {text}"


def comment(text: str) -> str:
    """Return a one-line comment; line breaks and other unprintable characters are shown as escapes."""
    shown = (letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
    return "# " + "".join(shown)


def kubelet(word: str) -> str:
    """Escape a word of a pod's command or environment, in which Kubernetes would expand $(NAME)."""
    return _text(word).replace("$", "$$")


def _text(word: str) -> str:
    """Return `word`. Raise ConfigError if a command line cannot hold it."""
    if "\0" in word or not word.isascii() and word.encode("utf-8", "replace").decode() != word:
        raise ConfigError(f"{word!r} has a zero byte or is not UTF-8, which a command line cannot hold; type it again")
    return word
