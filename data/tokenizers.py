"""Tokenizers: bytes, byte-level BPE trained on the spot, and any ``tokenizer.json``.

All three are a ``tokenizers.Tokenizer`` inside, and are saved and loaded as the same file.
"""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from data.errors import DataError, first_line

END = "<|end|>"
# The usual names of the token that ends a document, the more specific first: some chat models
# use <|end|> for a turn beside <|endoftext|> for a document.
_END_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eos|>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001 - DeepSeek writes it with these characters
    "</s>",
    "<eos>",
    "[EOS]",
    "<EOS>",
    END,
)
_DEFAULT_BPE_SIZE = 4096
_PIECE_CHARACTERS = 1 << 18
_LONE_SPACES = (re.compile(r"(?<=\S) (?=\S)"), re.compile(r"(?<=\S)\s(?=\S)"))


class Tokenizer:
    """A ``tokenizers.Tokenizer`` with an end token, exact byte counts and a fingerprint.

    Text is only ever text: a special token that is spelled out in it is encoded as characters.

    Attributes:
        name: Short and for humans: ``bytes``, ``bpe-4096``, ``unigram-32000``.
        vocab_size: One more than the largest id.
        end_id: The id that follows every document.
        fingerprint: sha256 of the whole definition.
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        special = [token.content for token in inner.get_added_tokens_decoder().values()]
        end = next((name for name in _END_NAMES if name in special), END)
        if end not in special:
            inner.add_special_tokens([AddedToken(END, special=True, normalized=False)])
        definition = json.loads(inner.to_str())
        self._inner = inner
        self._is_bytes = _is_byte_definition(definition)
        self._is_byte_level = (definition["decoder"] or {}).get("type") == "ByteLevel"
        self._specials = {
            token_id
            for token_id, token in inner.get_added_tokens_decoder().items()
            if token.special or token.content == end
        }
        end_id = inner.token_to_id(end)
        assert end_id is not None
        self.end_id: int = end_id
        self.vocab_size: int = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint: str = hashlib.sha256(
            json.dumps(definition, sort_keys=True).encode()
        ).hexdigest()
        kind = definition["model"]["type"].lower()
        self.name: str = "bytes" if self._is_bytes else f"{kind}-{self.vocab_size}"

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without any token added to it."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on all cores."""
        try:
            if self._is_bytes:
                return [list(text.encode()) for text in texts]
            # The library takes only what is valid UTF-8, but says so in a misleading way.
            for text in texts:
                text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                "The text holds half of a surrogate pair, which is no character: give UTF-8 text."
            ) from error
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; special tokens, the end token among them, stand for nothing.

        Bytes that are not UTF-8 become U+FFFD.
        """
        self._check(ids)
        if self._is_byte_level:
            return b"".join(self._bytes_of[i] for i in ids).decode(errors="replace")
        return str(self._inner.decode(list(ids), skip_special_tokens=True))

    def token_bytes(self) -> npt.NDArray[np.int32]:
        """How many UTF-8 bytes each token stands for, int32 ``[vocab_size]``; 0 for specials.

        Exact for byte-level tokenizers. For others it is the growth of the decoded text when the
        token is decoded twice instead of once, so that what a decoder does at the start of a text
        (such as dropping a space) is not counted; decoders that look further back than one token
        make it an approximation. Byte-fallback tokens (``<0xE2>``) count as one byte.
        """
        counts = np.zeros(self.vocab_size, dtype=np.int32)
        if self._is_byte_level:
            counts[:] = [len(raw) for raw in self._bytes_of]
            return counts
        for token, i in self._inner.get_vocab(with_added_tokens=True).items():
            if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
                counts[i] = 1
            elif i not in self._specials:
                once, twice = self.decode([i]), self.decode([i, i])
                counts[i] = len(twice.encode()) - len(once.encode())
        return counts

    def stream(self) -> "TextStream":
        """A fresh decoder that takes one id at a time."""
        return _ByteStream(self) if self._is_byte_level else TextStream(self)

    def save(self, path: Path) -> None:
        """Write a ``tokenizer.json`` that any user of ``tokenizers`` can read, whole or not at all.

        Raises:
            OSError: The file cannot be written.
        """
        with NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            try:
                file.write(self._inner.to_str(pretty=True))
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise

    def _check(self, ids: Sequence[int]) -> None:
        if len(ids) and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise DataError(
                f"A token id lies outside the vocabulary of {self.vocab_size}: is this the "
                "tokenizer that the ids were made with?"
            )

    @cached_property
    def _bytes_of(self) -> list[bytes]:
        """The bytes of each id of a byte-level tokenizer; none for specials and unused ids."""
        byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
        table = [b""] * self.vocab_size
        for token, i in self._inner.get_vocab(with_added_tokens=True).items():
            if i not in self._specials:
                known = all(character in byte_of for character in token)
                table[i] = bytes(byte_of[c] for c in token) if known else token.encode()
        return table


class TextStream:
    """Decodes ids as they come: what ``push`` and ``finish`` return adds up to the whole text.

    Text that ends in U+FFFD is held back, since the next token may complete the character. Only
    the tokens since the last text are decoded again, after those that gave it: a decoder treats
    the start of a text in its own way, so the new tokens need something before them. Invalid bytes
    of a byte-fallback tokenizer are the one exception to the sum: the library's decoder takes back
    the valid characters of such a run too, and a stream has shown them by then.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """Take one id; return the text that is now certain, perhaps none."""
        self._held.append(token_id)
        text = self._new_text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._shown, self._held = self._held, []
        return text

    def finish(self) -> str:
        """Return what was held back, and start afresh."""
        text = self._new_text()
        self._shown, self._held = [], []
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._held)[len(before) :]


class _ByteStream(TextStream):
    """The same for byte-level tokenizers, where a token is its bytes whatever stands around it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        self._tokenizer._check([token_id])
        return self._utf8.decode(self._tokenizer._bytes_of[token_id])

    def finish(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are the bytes, 256 is the end token."""
    return Tokenizer(_byte_inner())


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
        initial_alphabet=sorted(_byte_characters()),
    )
    inner.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    return Tokenizer(inner)


def load_tokenizer(
    spec: str, *, texts: Iterable[str] | None = None, vocab_size: int | None = None
) -> Tokenizer:
    """Make or read a tokenizer.

    Args:
        spec: ``bytes``, ``bpe``, or the path of a ``tokenizer.json`` or of a folder with one.
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


def pieces(text: str) -> Iterator[str]:
    """Cut a long text so that encoding it takes bounded memory.

    Cuts stand before a single space between two words, where the patterns of byte-level BPE cut
    anyway: the ids are those of the whole text. Where there is none for a quarter of a million
    characters, any other white space does, and without that any place; there, or with a tokenizer
    that treats the start of a text in its own way (a prefix space), the ids can differ from those
    of the whole text by a few tokens at each cut.
    """
    start = 0
    while len(text) - start > 2 * _PIECE_CHARACTERS:
        nearest, farthest = start + _PIECE_CHARACTERS, start + 2 * _PIECE_CHARACTERS
        found = (space.search(text, nearest, farthest) for space in _LONE_SPACES)
        cut = next((match.start() for match in found if match), farthest)
        yield text[start:cut]
        start = cut
    yield text[start:]


def _read_tokenizer(spec: str) -> Tokenizer:
    path = Path(spec).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise DataError(
            f"There is no tokenizer '{spec}': choose 'bytes' or 'bpe', or give the path of a "
            "tokenizer.json."
        )
    try:
        return Tokenizer(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise DataError(f"'{path}' cannot be read ({error.strerror}): check the file.") from error
    except Exception as error:  # the library raises nothing narrower
        raise DataError(
            f"'{path}' is not a tokenizer.json ({first_line(error)}): save it again with "
            "'tokenizers'."
        ) from error


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte 0 to 255 in byte-level vocabularies.

    Bytes that are printable Latin-1 stand for themselves, the others for U+0100 onwards, in order
    (GPT-2's encoder.py; ``ByteLevel.alphabet`` has the same characters but not the order).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _byte_inner() -> tokenizers.Tokenizer:
    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return inner


def _is_byte_definition(definition: object) -> bool:
    """Whether this is exactly the byte tokenizer, whose ids can be had without the library."""
    return bool(definition == json.loads(_byte_inner().to_str()))
