"""Texts as people have them: broken, empty, without an end of line, binary, or another kind."""

import pytest
from corpus_helpers import one_sentence, write_table
from hypothesis import given
from hypothesis import strategies as st

from data.corpora import load_corpus
from data.corpora.text import read_parts
from data.errors import DataError
from data.packing import pack
from data.tokenizers import train_bpe

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"))


@given(text=TEXT, size=st.integers(1, 9), mark=st.booleans())
def test_parts_add_up_to_the_text_wherever_they_are_cut(tmp_path_factory, text, size, mark):
    path = tmp_path_factory.getbasetemp() / "parts.txt"
    path.write_bytes(b"\xef\xbb\xbf" * mark + text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.corpora.text._PART_BYTES", size)
        assert "".join(read_parts(path)) == text


@given(before=TEXT, size=st.integers(1, 9), mark=st.booleans(), data=st.data())
def test_broken_utf8_is_found_at_its_byte(tmp_path_factory, before, size, mark, data):
    broken = data.draw(st.sampled_from([b"\xff", b"\xc3(", b"\xe2\x82", b"\xed\xa0\x80", b"\x80"]))
    start = b"\xef\xbb\xbf" * mark + before.encode()
    path = tmp_path_factory.getbasetemp() / "broken.txt"
    path.write_bytes(start + broken)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.corpora.text._PART_BYTES", size)
        with pytest.raises(DataError, match=rf"is not UTF-8 text \(byte {len(start)}\)"):
            list(read_parts(path))


@pytest.mark.parametrize("line", ["words with spaces between ", "x", "\u65e5\u672c"])
def test_one_endless_line(tmp_path, line):
    """A million characters without an end of line: cut into pieces, tokenised, put together."""
    text = (line * (1_200_000 // len(line) + 1))[:1_200_000]
    path = tmp_path / "line.txt"
    path.write_text(text, encoding="utf-8")
    corpus = load_corpus(str(path))
    assert "".join(corpus.train) + "".join(corpus.validation) == text
    assert max(len(piece) for piece in corpus.train.texts()) <= 1 << 19
    tokenizer = train_bpe(corpus.train.texts(), 300)
    sides = pack(corpus, tokenizer, tmp_path / "cache")
    assert "".join(tokenizer.decode(side.tokens.tolist()) for side in sides) == text
    assert [int((side.tokens == tokenizer.end_id).sum()) for side in sides] == [1, 1]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_nul_bytes_in_a_table_are_characters_like_any_other(tmp_path, suffix):
    rows = [f"{i}: a\0b" for i in range(20)]
    corpus = load_corpus(str(write_table(tmp_path / f"a{suffix}", rows)))
    assert sorted([*corpus.train, *corpus.validation]) == sorted(rows)


def test_empty_files_among_others_are_left_out(tmp_path):
    for name, text in (("a.txt", ""), ("b.txt", "text " * 20), ("c.md", "")):
        (tmp_path / name).write_text(text)
    corpus = load_corpus(str(tmp_path))
    assert len(list(corpus.train)) == len(list(corpus.validation)) == 1
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(DataError, match=r"side of .* would be empty"):
        load_corpus(str(tmp_path))
    for number in range(12):
        (tmp_path / f"{number}.txt").touch()
    with pytest.raises(DataError, match="holds no text: every document in it is empty"):
        load_corpus(str(tmp_path))


BAD_FILES = [
    ("empty.txt", b"", "is empty: give a file with text"),
    ("short.txt", b"x", "training side of 'short.txt' would be empty"),
    ("latin.txt", "caf\u00e9".encode("latin-1"), r"latin.txt' is not UTF-8 text \(byte 3\)"),
    ("nul.txt", b"abc\0def", "nul.txt' is a binary file"),
    ("utf16.txt", "text".encode("utf-16"), "utf16.txt' is not UTF-8 text"),
    ("empty.jsonl", b"", "holds no text"),
    ("one.jsonl", b'{"text": "a"}', "training side of 'one.jsonl' would be empty"),
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"Line 2 of '.*a.jsonl' is not JSON"),
    ("bytes.jsonl", b'{"text": "\xff"}\n', r"Line 1 of '.*bytes.jsonl' is not JSON"),
    ("deep.jsonl", b"[" * 200_000, r"Line 1 of '.*deep.jsonl' is not JSON"),
    ("list.jsonl", b'{"text": "a"}\n["text"]\n', "Line 2 of .* is not a JSON object"),
    ("half.jsonl", b'{"text": "\\ud800"}\n', "Line 1 of .* half of a surrogate pair"),
    (
        "column.jsonl",
        b'{"body": "a", "id": 1}',
        "no column 'text' in line 1 .*: choose one of body, id",
    ),
    ("type.jsonl", b'{"text": 5}', "column 'text' of line 1 .* holds int values"),
    ("empty.csv", b"", "no column 'text' in .*: choose one of none"),
    ("column.csv", b"id,body\n1,a\n", "no column 'text' in .*: choose one of id, body"),
    ("ragged.csv", b"id,text\n1,a\n2\n", "Line 3 of '.*ragged.csv' is too short"),
    ("quote.csv", b'id,text\n1,"a\n', "Line . of '.*quote.csv' is not CSV"),
    ("latin.csv", b"text\n\xff\n", "latin.csv' is not UTF-8"),
    ("a.parquet", b"PAR1 is not what this is", "a.parquet' cannot be read as .parquet"),
    ("empty.parquet", b"", "empty.parquet' cannot be read as .parquet"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=[b[0] for b in BAD_FILES])
def test_unreadable_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load_corpus(str(tmp_path / name))
    one_sentence(error)
