import json

import pytest
import sentencepiece

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.text.config import SPECIALS, VocabConfig
from data_pipeline.text.kinds import open_tokenizer
from data_pipeline.text.training import captions_of, train_vocabulary


@pytest.fixture
def train(build_here, tmp_path):
    """train(output, shard_size, **changes) on 60 scenes -> path of the model."""

    def make(output="vocab", shard_size=20, **changes):
        dataset = tmp_path / f"data{shard_size}"
        build_here(source={"kind": "scenes", "count": 60}, output=str(dataset), shard_size=shard_size)
        return train_vocabulary(
            VocabConfig(dataset=str(dataset), output=str(tmp_path / output), **{"size": 200, **changes})
        )

    return make


@pytest.mark.parametrize(("kind", "size"), [("unigram", 75), ("bpe", 180)])
def test_the_specials_have_their_fixed_ids(train, kind, size):
    vocabulary = open_tokenizer(train(kind=kind, size=size))
    assert tuple(vocabulary.piece(number) for number in range(5)) == SPECIALS
    assert (vocabulary.pad, vocabulary.unk, vocabulary.cls, vocabulary.sep, vocabulary.mask) == (0, 1, 2, 3, 4)
    assert vocabulary.size == size and vocabulary.specials == {0, 1, 2, 3, 4}
    assert vocabulary.ordinary.tolist() == list(range(5, size)) and vocabulary.ordinary.dtype == "int64"


def test_english_and_chinese_come_back_from_their_ids(train):
    vocabulary = open_tokenizer(train())
    for text in ("a big red circle at the top left on white", "白色背景左上角大红色圆形"):
        ids = vocabulary.encode(text)
        assert vocabulary.unk not in ids and min(ids) >= len(SPECIALS)
        assert vocabulary.decode([vocabulary.cls, *ids, vocabulary.sep, vocabulary.pad]) == text


def test_words_begin_after_spaces_and_at_chinese_characters(train):
    vocabulary = open_tokenizer(train())
    found = {}
    for number in vocabulary.encode("a red circle, at") + vocabulary.encode("红色圆形"):
        begins = vocabulary.piece(number)[0]
        found[begins] = vocabulary.starts_word(number)
        assert found[begins] == (begins == " " or "\u4e00" <= begins <= "\u9fff")
    assert len(set(found.values())) == 2


def test_the_bytes_depend_on_the_samples_not_on_how_they_are_sharded(train):
    first, second = train("one", 20), train("two", 7)
    assert first.read_bytes() == second.read_bytes()
    assert open_tokenizer(first).fingerprint == open_tokenizer(second).fingerprint
    assert train("one", 20) == first  # again: the same file, untouched


def test_another_vocabulary_is_never_written_over(train):
    train(size=70)
    with pytest.raises(DataError, match="another vocabulary exists"):
        train(size=75)


@pytest.mark.parametrize(("kind", "size"), [("unigram", 10), ("bpe", 100_000)])
def test_a_size_that_the_captions_cannot_fill_is_refused(train, kind, size):
    with pytest.raises(ConfigError, match=f"size={size}, kind='{kind}' on 120 captions"):
        train(kind=kind, size=size)


def test_the_number_of_captions_can_be_bounded(train, tmp_path):
    train()
    assert len(list(captions_of(tmp_path / "data20", 11))) == 11


@pytest.mark.parametrize("content", [None, b"not a model"])
def test_a_file_that_is_no_vocabulary_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(DataError, match="x.model"):
        open_tokenizer(tmp_path / "x.model")


def test_a_model_with_other_specials_is_refused(tmp_path):
    sentences = json.dumps(list(range(300))).split()
    with (tmp_path / "x.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(sentences), model_writer=file, vocab_size=20, hard_vocab_limit=False, minloglevel=2
        )
    with pytest.raises(DataError, match="ids 0 to 4"):
        open_tokenizer(tmp_path / "x.model")
