"""Round trips, streams and byte counts of every kind of tokenizer."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from data.errors import DataError
from data.tokenizers import (
    END,
    Tokenizer,
    byte_tokenizer,
    load_tokenizer,
    pieces,
    train_bpe,
)

TEXTS = [
    "the quick brown fox jumps over the lazy dog " * 20,
    f"naïve café 日本語 \U0001f600\r\n\t  two  spaces {END} <|endoftext|> " * 20,
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def sentencepiece_like() -> Tokenizer:
    """BPE with a prefix space and byte fallback, as Llama 2 has it; its end token is </s>."""
    inner = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    inner.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog"] * 3,
        trainers.BpeTrainer(
            vocab_size=330, show_progress=False, special_tokens=["<unk>", "<s>", "</s>", *fallback]
        ),
    )
    # The fallback bytes are ordinary tokens of the vocabulary in such a file, not special ones.
    definition = json.loads(inner.to_str())
    definition["added_tokens"] = definition["added_tokens"][:3]
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(definition)))


BYTES, BPE, FALLBACK = byte_tokenizer(), train_bpe(TEXTS, 320), sentencepiece_like()
BYTE_LEVEL = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
ALL = pytest.mark.parametrize(
    "tokenizer", [BYTES, BPE, FALLBACK], ids=["bytes", "bpe", "byte_fallback"]
)


@BYTE_LEVEL
@given(text=TEXT)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_id not in ids
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_round_trip_with_byte_fallback(text):
    """Of all but the character that stands for a space in such a file: it comes back as one."""
    ids = FALLBACK.encode(text)
    assert FALLBACK.decode(ids) == text
    assert FALLBACK.end_id not in ids


@BYTE_LEVEL
@given(data=st.data())
def test_stream_equals_whole_for_any_ids(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=60))
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)
    assert stream.finish() == ""


@given(ids=st.lists(st.integers(0, FALLBACK.vocab_size - 1), max_size=60))
def test_stream_gets_over_invalid_fallback_bytes(ids):
    stream, after = FALLBACK.stream(), FALLBACK.encode("the dog")
    shown, last = "".join(map(stream.push, ids)), "".join(map(stream.push, after))
    whole = FALLBACK.decode([*ids, *after])
    assert last.endswith("the dog")
    assert stream.finish() == ""
    assert "\ufffd" in whole or shown + last == whole


@ALL
@given(text=TEXT)
def test_stream_equals_whole_for_any_text(tokenizer, text):
    stream, ids = tokenizer.stream(), tokenizer.encode(text)
    assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)


@ALL
def test_stream_gives_a_character_with_its_last_byte_and_no_later(tokenizer):
    # The last four: a prefix space would come first where there is one.
    ids = tokenizer.encode("\U00010348")[-4:]
    assert len(ids) == 4
    stream = tokenizer.stream()
    assert [stream.push(i) for i in ids] == ["", "", "", "\U00010348"]
    stream.push(ids[0])
    assert stream.push(tokenizer.encode("x")[-1]).endswith("x")


@BYTE_LEVEL
@given(data=st.data())
def test_decode_agrees_with_the_library(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=60))
    assert tokenizer.decode(ids) == tokenizer._inner.decode(ids, skip_special_tokens=True)


@given(text=TEXT)
def test_byte_ids_are_the_bytes_and_those_of_the_library(text):
    assert BYTES.encode(text) == list(text.encode())
    assert BYTES._inner.encode(text, add_special_tokens=False).ids == list(text.encode())


def test_byte_tokenizer_facts():
    assert (BYTES.vocab_size, BYTES.end_id, BYTES.name) == (257, 256, "bytes")
    np.testing.assert_array_equal(BYTES.token_bytes(), [1] * 256 + [0])
    assert BYTES.token_bytes().dtype == np.int32


@ALL
def test_spelled_out_special_tokens_are_text(tokenizer):
    text = f"a {END} b </s> <|endoftext|> c"
    ids = tokenizer.encode(text)
    assert tokenizer.end_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.end_id, *tokenizer.encode("x")]).startswith(text)


@ALL
def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    tokenizer.save(tmp_path / "tokenizer.json")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    for spec in (str(tmp_path), str(tmp_path / "tokenizer.json")):
        loaded = load_tokenizer(spec)
        for field in ("fingerprint", "vocab_size", "end_id", "name"):
            assert getattr(loaded, field) == getattr(tokenizer, field)
        for text in TEXTS:
            assert loaded.encode(text) == tokenizer.encode(text)


def test_bpe_is_the_same_in_another_process():
    script = (
        "from data.tokenizers import train_bpe; import json, sys\n"
        "print(train_bpe(json.load(sys.stdin), 320).fingerprint)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(TEXTS),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == BPE.fingerprint


def test_bpe_compresses_within_its_size():
    assert (BPE.vocab_size, BPE.name) == (320, "bpe-320")
    # With room for every merge each word of the text is one token.
    assert len(train_bpe(TEXTS, 1000).encode(" quick brown fox jumps")) == 4
    assert train_bpe(["ab"], 1000).vocab_size < 262


def test_token_bytes_with_byte_fallback_and_prefix_space():
    counts = FALLBACK.token_bytes()
    ids = FALLBACK.encode("the quick \U0001f680 dog")
    # The prefix space that the tokenizer adds, and its decoder drops, is one byte more.
    assert counts[ids].sum() == len(" the quick \U0001f680 dog".encode())
    assert counts[FALLBACK.end_id] == 0
    assert FALLBACK._inner.id_to_token(FALLBACK.end_id) == "</s>"


def test_end_token_is_added_where_there_is_none():
    inner = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 5}, merges=[]))
    tokenizer = Tokenizer(inner)
    assert tokenizer.decode([0, 5, tokenizer.end_id]) == "a b"
    assert tokenizer.vocab_size == 6
    assert tokenizer.end_id not in (0, 5)


def test_truncation_and_padding_of_a_file_are_undone(tmp_path):
    inner = tokenizers.Tokenizer.from_str(BYTES._inner.to_str())
    inner.enable_truncation(4)
    inner.enable_padding(length=8)
    inner.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).encode("abcdef") == list(b"abcdef")


def test_pieces_give_the_ids_of_the_whole(monkeypatch):
    monkeypatch.setattr("data.tokenizers.cut._PIECE_CHARACTERS", 50)
    random.seed(1)
    words = ["the", "fox", "don't", "日本", "12", "...", "\n", "\n\n", "  ", " \t", "x" * 9]
    text = " ".join(random.choices(words, k=2000))
    cut = list(pieces(text))
    assert "".join(cut) == text
    assert len(cut) > 50
    assert max(map(len, cut)) <= 100
    assert [i for piece in cut for i in BPE.encode(piece)] == BPE.encode(text)
    for unbroken in ("x" * 1001, "x\n" * 500, " " * 1001, ""):
        cut = list(pieces(unbroken))
        assert "".join(cut) == unbroken
        assert max(map(len, cut)) <= 100


def test_mistakes_give_one_sentence(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    for spec, size, message in (
        ("gpt2", None, "There is no tokenizer 'gpt2': choose 'bytes' or 'bpe'"),
        (str(tmp_path / "gone.json"), None, "There is no tokenizer"),
        (str(tmp_path), None, "is not a tokenizer.json"),
        (str(tmp_path / "binary.json"), None, "is not a tokenizer.json"),
        ("bytes", 300, "'bytes' has a vocabulary of its own"),
        (str(tmp_path), 300, "has a vocabulary of its own"),
        ("bpe", 256, "at least 257 tokens, not 256"),
    ):
        with pytest.raises(DataError, match=message) as error:
            load_tokenizer(spec, texts=TEXTS, vocab_size=size)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="trained on a text"):
        load_tokenizer("bpe")


@ALL
def test_what_cannot_be_encoded_or_decoded(tokenizer):
    with pytest.raises(DataError, match="half of a surrogate pair"):
        tokenizer.encode("a\ud800")
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(DataError, match="outside the vocabulary"):
            tokenizer.decode([0, bad])
        with pytest.raises(DataError, match="outside the vocabulary"):
            tokenizer.stream().push(bad)


@settings(max_examples=20)
@given(texts=st.lists(TEXT, max_size=5))
def test_batch_equals_one_by_one(texts):
    for tokenizer in (BYTES, BPE, FALLBACK):
        assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_byte_level_with_a_prefix_space_keeps_its_bytes():
    inner = tokenizers.Tokenizer.from_str(BPE._inner.to_str())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.add_tokens(["日本"])
    tokenizer = Tokenizer(inner)
    assert tokenizer.decode(tokenizer.encode("x 日本")) == inner.decode(inner.encode("x 日本").ids)
    assert tokenizer.token_bytes()[inner.token_to_id("日本")] == 6
