"""The token cache: content, reuse, damage, full disks and races, with real files and processes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.corpora import Corpus, Documents, load_corpus
from data.errors import DataError
from data.packing import default_cache_dir, pack
from data.tokenizers import Tokenizer, byte_tokenizer, train_bpe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"row {i} é {'x ' * i}"}) for i in range(40)))
    return load_corpus(str(path))


def expected(documents: Documents, tokenizer: Tokenizer) -> list[int]:
    return [i for text in documents for i in [*tokenizer.encode(text), tokenizer.end_id]]


def unread() -> Documents:
    def read():
        raise AssertionError("the cache should have been used")

    return Documents(read)


def entries(cache: Path) -> list[str]:
    return sorted(path.suffix or "folder" for path in cache.iterdir())


def test_tokens_are_documents_each_with_its_end(corpus, tmp_path):
    for tokenizer in (byte_tokenizer(), train_bpe(corpus.train, 300)):
        done: list[int] = []
        sides = pack(corpus, tokenizer, tmp_path / "cache", done.append)
        for packed, documents in zip(sides, (corpus.train, corpus.validation), strict=True):
            assert packed.tokens.tolist() == expected(documents, tokenizer)
            assert packed.tokens.dtype == np.uint16
            assert isinstance(packed.tokens, np.memmap)
            assert packed.num_bytes == sum(len(text.encode()) for text in documents)
            assert tokenizer.token_bytes()[packed.tokens].sum() == packed.num_bytes
        assert done == sorted(done)
        assert done[-1] == corpus.num_bytes


def test_large_vocabulary_takes_uint32(corpus, tmp_path):
    inner = byte_tokenizer()._inner
    inner.add_tokens([f"[token {i}]" for i in range(1 << 16)])
    train, _ = pack(corpus, Tokenizer(inner), tmp_path / "cache")
    assert train.tokens.dtype == np.uint32
    assert train.tokens.tolist() == expected(corpus.train, byte_tokenizer())


def test_cache_is_reused_for_equal_content_only(corpus, tmp_path):
    first, _ = pack(corpus, byte_tokenizer(), tmp_path / "cache")
    same = replace(corpus, name="other", train=unread(), validation=unread())
    again, _ = pack(same, byte_tokenizer(), tmp_path / "cache")
    np.testing.assert_array_equal(first.tokens, again.tokens)
    with pytest.raises(AssertionError, match="should have been used"):
        pack(same, train_bpe(corpus.train, 300), tmp_path / "cache")
    with pytest.raises(AssertionError, match="should have been used"):
        pack(replace(same, fingerprint="other"), byte_tokenizer(), tmp_path / "cache")
    assert entries(tmp_path / "cache") == [".lock", ".lock", ".lock", "folder"]


@pytest.mark.parametrize("damage", ["cut", "grown", "gone", "meta", "meta type", "empty", "tmp"])
def test_damaged_cache_is_written_again(corpus, tmp_path, damage):
    cache = tmp_path / "cache"
    first = [side.tokens.tolist() for side in pack(corpus, byte_tokenizer(), cache)]
    folder = next(path for path in cache.iterdir() if path.is_dir())
    path, meta = folder / "validation.bin", folder / "meta.json"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-2])
    elif damage == "grown":
        path.write_bytes(path.read_bytes() + b"\0\0")
    elif damage == "gone":
        path.unlink()
    elif damage == "meta":
        meta.write_text(meta.read_text()[:-5])
    elif damage == "meta type":
        meta.write_text("[]")
    elif damage == "empty":
        for file in folder.iterdir():
            file.unlink()
    else:
        # What a killed process leaves behind.
        folder.rename(folder.with_suffix(".tmp"))
    assert [side.tokens.tolist() for side in pack(corpus, byte_tokenizer(), cache)] == first
    assert entries(cache) == [".lock", "folder"]
    assert path.stat().st_size == 2 * len(first[1])


def test_interrupt_leaves_nothing(corpus, tmp_path):
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(corpus, byte_tokenizer(), tmp_path / "cache", interrupt)
    assert entries(tmp_path / "cache") == [".lock"]


def test_text_that_changes_after_it_was_read_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("some text " * 100)
    corpus = load_corpus(str(path))
    path.write_text("some text " * 150)
    with pytest.raises(DataError, match=r"'a.txt' has changed while it was read"):
        pack(corpus, byte_tokenizer(), tmp_path / "cache")
    assert entries(tmp_path / "cache") == [".lock"]


def test_full_disk_gives_one_sentence_and_leaves_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 100_000)
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from data.corpora import load_corpus; from data.packing import pack\n"
        "from data.tokenizers import byte_tokenizer\n"
        "corpus = load_corpus(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: pack(corpus, byte_tokenizer(), Path(sys.argv[2]))\n"
        "except ValueError as error: print(error)"
    )
    result = run(script, tmp_path / "a.txt", tmp_path / "cache")
    assert result.count("\n") == 1
    assert "could not be written to the cache" in result
    assert "free some space" in result
    assert entries(tmp_path / "cache") == [".lock"]


def test_cache_that_cannot_be_made_gives_one_sentence(corpus, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="could not be written to the cache"):
        pack(corpus, byte_tokenizer(), tmp_path / "file" / "cache")


def test_racing_processes_write_once(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 300_000)
    script = (
        "import sys; from pathlib import Path\n"
        "from data.corpora import load_corpus; from data.packing import pack\n"
        "from data.tokenizers import byte_tokenizer\n"
        "done = []\n"
        "train, _ = pack(load_corpus(sys.argv[1]), byte_tokenizer(), Path(sys.argv[2]), "
        "done.append)\n"
        "print(train.tokens.size, bool(done))"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path / "a.txt"), str(tmp_path / "cache")]
    racing = [
        subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    results = sorted(process.communicate()[0].strip() for process in racing)
    assert results == ["2700001 False", "2700001 False", "2700001 True"]
    assert entries(tmp_path / "cache") == [".lock", "folder"]


def test_memory_does_not_grow_with_the_text(tmp_path):
    """From the file to the batches of an epoch: the text is 40 MB, its tokens 80 MB."""
    (tmp_path / "a.txt").write_bytes(b"a few words of text, again and again\n" * 1_100_000)
    script = (
        "import sys; from pathlib import Path\n"
        "from data.corpora import load_corpus; from data.packing import pack\n"
        "from data.loader import TrainingBatches; from data.tokenizers import byte_tokenizer\n"
        "def peak():\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return next(int(x.split()[1]) for x in lines if x.startswith('VmHWM'))\n"
        "before = peak()\n"
        "train, _ = pack(load_corpus(sys.argv[1]), byte_tokenizer(), Path(sys.argv[2]))\n"
        "batches = TrainingBatches(train.tokens, context=512, batch_size=64, seed=0, end_id=256)\n"
        "for step in range(batches.steps_per_epoch): batches[step]\n"
        "print(train.tokens.size, peak() - before)"
    )
    tokens, kilobytes = map(int, run(script, tmp_path / "a.txt", tmp_path / "cache").split())
    assert tokens > 36_000_000
    assert kilobytes < 45_000


def test_default_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "ebb"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "ebb"


def run(script: str, *arguments: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout
