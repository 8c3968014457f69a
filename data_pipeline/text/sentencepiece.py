"""SentencePiece vocabularies as `tessera vocab train` makes them: the first five ids are special."""

import hashlib
from pathlib import Path

import sentencepiece

from data_pipeline.errors import DataError
from data_pipeline.text.config import SPECIALS
from data_pipeline.text.tokenizer import ordinary_ids

MODEL = "vocab.model"
_SPACE = "\u2581"


class SentencePieceTokenizer:
    """A TextTokenizer read from a SentencePiece model. Raises DataError if the file is damaged or has other specials.

    Text is NFKC-normalised. A Chinese character begins a word; so does a special token.
    """

    pad, unk, cls, sep, mask = range(len(SPECIALS))
    specials = frozenset(range(len(SPECIALS)))

    def __init__(self, file: Path) -> None:
        data = file.read_bytes()
        self.fingerprint = hashlib.sha256(data).hexdigest()
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(data)
        except RuntimeError as error:
            raise DataError(f"{file}: not a SentencePiece model ({error})") from None
        self.size: int = len(self._model)
        first = tuple(self._model.IdToPiece(number) for number in range(min(len(SPECIALS), self.size)))
        if first != SPECIALS:
            raise DataError(f"{file}: ids 0 to 4 are {first}, not {SPECIALS}; train it with `tessera vocab train`")
        self.ordinary = ordinary_ids(self.size, self.specials)
        self._starts = [self._starts_word(number) for number in range(self.size)]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special ids except [UNK]."""
        return list(self._model.EncodeAsIds(text))

    def decode(self, ids: list[int]) -> str:
        """Return the text of the ids, leaving out special ids."""
        return str(self._model.DecodeIds([number for number in map(int, ids) if number not in self.specials]))

    def piece(self, number: int) -> str:
        """Return the text of an id, with spaces as spaces: SentencePiece writes U+2581."""
        return str(self._model.IdToPiece(number)).replace(_SPACE, " ")

    def starts_word(self, number: int) -> bool:
        """Return whether this id begins a word: it follows a space, or is a Chinese character or a special token."""
        return self._starts[number]

    def _starts_word(self, number: int) -> bool:
        piece = self.piece(number)
        return number in self.specials or piece.startswith(" ") or "\u3400" <= piece[0] <= "\u9fff"
