"""A text tokenizer of another kind than SentencePiece, whose special ids stand wherever a test puts them."""

import hashlib
import itertools
import json
from pathlib import Path

from data_pipeline.text.tokenizer import ordinary_ids

FILE = "pieces.json"
ORDINARY = [
    *"北京大学红色圆形左上角白背景",
    *"abcdefghijklmnopqrstuvwxyz.,", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"),
    "red", "blue", "circle", "square", "small", "big", "##dish", "at", "the", "left", "on", "white",
]  # fmt: skip
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PLACES: dict[str, tuple[int, ...]] = {
    "ours": (0, 1, 2, 3, 4),
    "bert": (0, 50, 51, 52, 53),
    "roberta": (1, 3, 0, 2, -1),
    "last": (-1, -2, -3, -4, -5),
    "reversed": (60, 40, 30, 20, 10),
}
"""Where the ids of SPECIAL are: those of BERT and RoBERTa in small, at the end, and anywhere."""


def pieces_of(places: tuple[int, ...], size: int = 200, unused: int = 0) -> list[str]:
    """Piece by id: the specials at `places`, negative ones from the end, `unused` more from 5, the others in order."""
    fixed = dict(zip((place % size for place in places), SPECIAL, strict=True))
    free = [number for number in range(size) if number not in fixed]
    fixed |= {number: f"[unused{index}]" for index, number in enumerate(free[5 : 5 + unused])}
    rest = itertools.chain(ORDINARY, (f"word{number}" for number in itertools.count()))
    return [fixed[number] if number in fixed else next(rest) for number in range(size)]


class WordPieces:
    """Splits words as WordPiece, longest piece first; a Chinese character is a word, one without pieces is [UNK]."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces, self.size = pieces, len(pieces)
        self.ids = {piece: number for number, piece in enumerate(pieces)}
        self.pad, self.unk, self.cls, self.sep, self.mask = (self.ids[name] for name in SPECIAL)
        self.specials = frozenset(number for piece, number in self.ids.items() if piece[0] == "[" and len(piece) > 1)
        self.ordinary = ordinary_ids(self.size, self.specials)
        self.fingerprint = hashlib.sha256(json.dumps(pieces).encode()).hexdigest()

    @classmethod
    def read(cls, file: Path) -> "WordPieces":
        return cls(json.loads(file.read_text(encoding="utf-8")))

    def encode(self, text: str) -> list[int]:
        parted = "".join(f" {letter} " if letter >= "\u4e00" or letter in ".," else letter for letter in text.lower())
        return [number for word in parted.split() for number in self._word(word)]

    def _word(self, word: str) -> list[int]:
        found: list[int] = []
        while word:
            front = "##" if found else ""
            length = next((n for n in range(len(word), 0, -1) if front + word[:n] in self.ids), 0)
            if not length:
                return [self.unk]
            found.append(self.ids[front + word[:length]])
            word = word[length:]
        return found

    def decode(self, ids: list[int]) -> str:
        return "".join(self.piece(number) for number in map(int, ids) if number not in self.specials).strip()

    def piece(self, number: int) -> str:
        piece = self.pieces[number]
        if piece.startswith("##"):
            return piece[2:]
        return piece if piece[0] >= "\u4e00" or number in self.specials else f" {piece}"

    def starts_word(self, number: int) -> bool:
        return not self.pieces[number].startswith("##")
