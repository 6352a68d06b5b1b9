"""Documents to token files: written once, memory-mapped ever after."""

import fcntl
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.corpora import Corpus, Documents
from data.errors import DataError
from data.tokenizers import Tokenizer

TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]

_FORMAT = 1
_BATCH_CHARACTERS = 1 << 21
_SIDES = ("train", "validation")
_Encode = Callable[[Sequence[str]], list[list[int]]]


@dataclass(frozen=True)
class PackedTokens:
    """The tokens of one side.

    Attributes:
        tokens: 1-D, read-only, uint16 if the vocabulary fits and uint32 otherwise: the documents
            one after the other, each followed by the end token.
        num_bytes: UTF-8 bytes of the documents.
    """

    tokens: TokenArray
    num_bytes: int


def release(tokens: TokenArray) -> None:
    """Give back the pages of a mapped file that were read: they count as memory of the process.

    Nothing is lost, since the file holds them; an array that is no file is left alone.
    """
    mapped = getattr(tokens, "_mmap", None)  # NumPy's own, which has no public name
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/ebb``, or ``~/.cache/ebb``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ebb"


def pack(
    corpus: Corpus,
    tokenizer: Tokenizer,
    cache_dir: Path,
    progress: Callable[[int], None] | None = None,
    *,
    processes: int | None = None,
) -> tuple[PackedTokens, PackedTokens]:
    """Tokenise a corpus, or map what an earlier call left in the cache.

    The cache of one corpus and tokenizer is a folder that appears whole, by a rename. A lock that
    dies with its process lets one process write while others wait for it; a damaged folder is
    written again.

    Args:
        corpus: What to tokenise.
        tokenizer: What to tokenise it with.
        cache_dir: Where the folders of all corpora lie; made if missing.
        progress: Called with the number of bytes of text done so far, of ``corpus.num_bytes``;
            not called when the cache is used.
        processes: As in ``Tokenizer.encoder``; the cache is the same whatever their number.

    Returns:
        The tokens for training and for validation.

    Raises:
        DataError: The cache cannot be written, or the text has changed since the corpus was made;
            nothing is left behind.
    """
    keys = f"{_FORMAT} {corpus.fingerprint} {tokenizer.fingerprint}"
    folder = cache_dir / hashlib.sha256(keys.encode()).hexdigest()[:32]
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            packed = _map(folder)
            if packed is None:
                with tokenizer.encoder(corpus.num_bytes, processes) as encode:
                    _write(corpus, tokenizer, encode, folder, progress or (lambda _: None))
                packed = _map(folder)
    except OSError as error:
        raise DataError(
            f"The tokens could not be written to the cache '{cache_dir}' ({error.strerror}): free "
            "some space there, or choose another cache folder (XDG_CACHE_HOME)."
        ) from error
    assert packed is not None
    return packed


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _map(folder: Path) -> tuple[PackedTokens, PackedTokens] | None:
    """Map both sides; None if they are not there or not whole."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        dtype = np.dtype(meta["dtype"])
        sides = []
        for side in _SIDES:
            path, length = folder / f"{side}.bin", meta[side]["tokens"]
            if path.stat().st_size != length * dtype.itemsize:
                return None
            tokens = np.memmap(path, dtype=dtype, mode="r", shape=(length,))
            sides.append(PackedTokens(tokens, meta[side]["bytes"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return sides[0], sides[1]


def _write(
    corpus: Corpus,
    tokenizer: Tokenizer,
    encode: _Encode,
    folder: Path,
    progress: Callable[[int], None],
) -> None:
    """Write the folder beside its place and rename it; the caller holds the lock."""
    beside = folder.with_suffix(".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    meta: dict[str, object] = {"dtype": dtype.name}
    done = 0
    try:
        beside.mkdir()
        for side, documents in zip(_SIDES, (corpus.train, corpus.validation), strict=True):
            count = num_bytes = 0
            with (beside / f"{side}.bin").open("wb") as file:
                for ids, size in _encoded(documents, encode, tokenizer.end_id):
                    file.write(np.asarray(ids, dtype=dtype).tobytes())
                    count += len(ids)
                    num_bytes += size
                    progress(done + num_bytes)
                _sync(file.fileno(), file.flush)
            done += num_bytes
            meta[side] = {"tokens": count, "bytes": num_bytes}
        if done != corpus.num_bytes:
            raise DataError(
                f"'{corpus.name}' has changed while it was read: leave it alone and start again."
            )
        with (beside / "meta.json").open("w") as file_of_meta:
            json.dump(meta, file_of_meta)
            _sync(file_of_meta.fileno(), file_of_meta.flush)
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
    except BaseException:  # Ctrl-C too must leave nothing behind
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _sync(descriptor: int, flush: Callable[[], None]) -> None:
    flush()
    os.fsync(descriptor)


def _encoded(documents: Documents, encode: _Encode, end_id: int) -> Iterator[tuple[list[int], int]]:
    """The ids and the number of bytes of each piece of text, in batches of bounded size."""
    batch: list[tuple[str, bool]] = []
    characters = 0
    for piece, is_last in documents.pieces():
        batch.append((piece, is_last))
        characters += len(piece)
        if characters >= _BATCH_CHARACTERS:
            yield from _encoded_batch(batch, encode, end_id)
            batch, characters = [], 0
    yield from _encoded_batch(batch, encode, end_id)


def _encoded_batch(
    batch: list[tuple[str, bool]], encode: _Encode, end_id: int
) -> Iterator[tuple[list[int], int]]:
    encoded = encode([piece for piece, _ in batch])
    for (piece, ends_document), ids in zip(batch, encoded, strict=True):
        yield [*ids, end_id] if ends_document else ids, len(piece.encode())
