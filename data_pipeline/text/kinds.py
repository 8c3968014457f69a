"""KINDS: the kinds of text tokenizers, each known by the name of its file."""

from collections.abc import Callable
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.text.sentencepiece import MODEL, SentencePieceTokenizer
from data_pipeline.text.tokenizer import TextTokenizer

KINDS: dict[str, Callable[[Path], TextTokenizer]] = {MODEL: SentencePieceTokenizer}
"""File name -> kind. A file of any other name is read as a SentencePiece model."""


def open_tokenizer(path: str | Path) -> TextTokenizer:
    """Open the text tokenizer in a file, or in a folder that holds a file named in KINDS.

    Raises DataError if there is none or if it cannot be used.
    """
    file = Path(path)
    if file.is_dir():
        file = next((file / name for name in KINDS if (file / name).is_file()), file / MODEL)
    if not file.is_file():
        raise DataError(f"{file}: no vocabulary; run `tessera vocab train CONFIG`")
    return KINDS.get(file.name, SentencePieceTokenizer)(file)
