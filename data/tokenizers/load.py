"""What a tokenizer is made from: nothing, a text, or a file."""

from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from data.errors import DataError, first_line
from data.tokenizers.byte_level import END, byte_characters, byte_inner
from data.tokenizers.cut import pieces, without_long_words
from data.tokenizers.tokenizer import Tokenizer
from data.tokenizers.world import is_world_file, world_inner

_DEFAULT_BPE_SIZE = 4096


def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are the bytes, 256 is the end token."""
    return Tokenizer(byte_inner())


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with the word pattern of GPT-2; equal texts give an equal tokenizer.

    Args:
        texts: What to count pairs in: the training side only, or validation is not unseen.
        vocab_size: The 256 bytes, the end token and the merges; fewer come out of a short text.
    """
    if vocab_size < 257:
        raise DataError(
            f"A byte-level BPE needs a vocabulary of at least 257 tokens, not {vocab_size}."
        )
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[AddedToken(END, special=True, normalized=False)],
        initial_alphabet=sorted(byte_characters()),
    )
    cut = (part for text in texts for piece in pieces(text) for part in without_long_words(piece))
    inner.train_from_iterator(cut, trainer)
    return Tokenizer(inner)


def load_tokenizer(
    spec: str, *, texts: Iterable[str] | None = None, vocab_size: int | None = None
) -> Tokenizer:
    """Make or read a tokenizer.

    Args:
        spec: ``bytes``, ``bpe``, or the path of a ``tokenizer.json``, of a folder with one, or of
            an RWKV World vocabulary (``rwkv_vocab_v20230424.txt``).
        texts: The training documents, for ``bpe``.
        vocab_size: For ``bpe``, 4096 if not given; refused elsewhere.

    Raises:
        DataError: There is no such tokenizer, it cannot be read, or an option has no effect.
    """
    if spec == "bpe":
        if texts is None:
            raise DataError("A BPE is trained on a text: name one, or give a tokenizer.json.")
        return train_bpe(texts, _DEFAULT_BPE_SIZE if vocab_size is None else vocab_size)
    if vocab_size is not None:
        raise DataError(
            f"The tokenizer '{spec}' has a vocabulary of its own: leave out the vocabulary size, "
            "or use 'bpe'."
        )
    return byte_tokenizer() if spec == "bytes" else _read_tokenizer(spec)


def _read_tokenizer(spec: str) -> Tokenizer:
    path = Path(spec).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise DataError(
            f"There is no tokenizer '{spec}': choose 'bytes' or 'bpe', or give the path of a "
            "tokenizer.json or of an RWKV World vocabulary."
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"'{path}' cannot be read ({error.strerror}): check the file.") from error
    if is_world_file(path, content):
        return Tokenizer(world_inner(content, str(path)))
    try:
        inner = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises nothing narrower
        raise DataError(
            f"'{path}' is not a tokenizer.json ({first_line(error)}): save it again with "
            "'tokenizers'."
        ) from error
    return Tokenizer(inner)
