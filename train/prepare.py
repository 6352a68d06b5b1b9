"""From the settings of a run to tokens and a tokenizer, each made once and cached."""

import hashlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.corpora import Corpus, load_corpus
from data.packing import PackedTokens, default_cache_dir, pack
from data.tokenizers import Tokenizer, load_tokenizer
from train.progress import Display

BPE_BYTES = 1 << 26
"""Text that a BPE is trained on, about, spread evenly over a longer one: its counts hold every
word, numbers and names too, and grow with the text."""


@dataclass(frozen=True)
class PreparedData:
    """What a run reads."""

    name: str
    fingerprint: str
    """Changes with the text."""
    train: PackedTokens
    validation: PackedTokens
    tokenizer: Tokenizer
    token_bytes: npt.NDArray[np.int32]
    """`[vocab_size]`: UTF-8 bytes that each token stands for."""


def prepare_data(
    data: str,
    column: str,
    tokenizer: str,
    vocab_size: int | None,
    display: Display,
    fixed_tokenizer: Path | None = None,
    stream: int | None = None,
) -> PreparedData:
    """Reads, tokenises and maps a corpus.

    Args:
        data: the corpus, as `ebb train --data` takes it.
        column: where its text is.
        tokenizer: `bpe`, `bytes` or a path.
        vocab_size: of a `bpe` to train.
        display: for progress.
        fixed_tokenizer: a tokenizer.json that stands above the other settings: a resumed run's.
        stream: of a hub data set, the first so many documents, as they come.

    Raises:
        ValueError: for data or a tokenizer that cannot be read.
    """
    corpus = load_corpus(data, column=column, stream=stream)
    cache = default_cache_dir()
    if fixed_tokenizer is not None:
        made = load_tokenizer(str(fixed_tokenizer))
    elif tokenizer == "bpe":
        made = _cached_bpe(corpus, vocab_size, cache, display)
    else:
        made = load_tokenizer(tokenizer, vocab_size=vocab_size)
    with display.task(f"Tokenising {corpus.name}", corpus.num_bytes) as advance:
        train, validation = pack(corpus, made, cache, advance)
    return PreparedData(
        corpus.name, corpus.fingerprint, train, validation, made, made.token_bytes()
    )


def _cached_bpe(corpus: Corpus, vocab_size: int | None, cache: Path, display: Display) -> Tokenizer:
    """The BPE of a corpus: the same every time, so it is trained only once."""
    key = hashlib.sha256(f"bpe {vocab_size} {corpus.fingerprint}".encode()).hexdigest()[:32]
    path = cache / f"{key}.json"
    if path.exists():
        return load_tokenizer(str(path))
    every = -(-corpus.num_bytes // BPE_BYTES)
    part = "" if every == 1 else f"one in {every} pieces of "
    display.say(f"Training a byte-level BPE on {part}{corpus.name} ...")
    texts = islice(corpus.train.texts(), 0, None, every)
    made = load_tokenizer("bpe", texts=texts, vocab_size=vocab_size)
    cache.mkdir(parents=True, exist_ok=True)
    made.save(path)
    return made
