"""What every tokenizer does, whatever it was made from, and its decoder for streams.

All are a ``tokenizers.Tokenizer`` inside, and are saved and loaded as the same file.
"""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import AddedToken

from data.errors import DataError
from data.tokenizers.byte_level import END, byte_characters, is_byte_definition
from data.tokenizers.workers import matching_processes, usable_processes
from data.tokenizers.world import WORLD_END, LongestMatch, longest_match

_WORTH_PROCESSES = 8_000_000
"""Bytes of text: below it, starting processes takes about as long as the work."""

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
    WORLD_END,
)


class Tokenizer:
    """A ``tokenizers.Tokenizer`` with an end token, exact byte counts and a fingerprint.

    Text is only ever text: a special token that is spelled out in it is encoded as characters.

    Attributes:
        name: Short and for humans: ``bytes``, ``bpe-4096``, ``world-65536``, ``unigram-32000``.
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
        self._matching = longest_match(definition)
        self._encode_bytes, kind = _own_way(definition, self._matching)
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
        self.name: str = kind if kind == "bytes" else f"{kind}-{self.vocab_size}"

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without any token added to it."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on all cores where the library does it."""
        try:
            if self._encode_bytes is not None:
                return [self._encode_bytes(text.encode()) for text in texts]
        except UnicodeEncodeError as error:
            raise _half_a_pair() from error
        # The library takes only what is valid UTF-8, but says so in a misleading way.
        _check_pairs(texts)
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    @contextmanager
    def encoder(
        self, num_bytes: int, processes: int | None = None
    ) -> Iterator[Callable[[Sequence[str]], list[list[int]]]]:
        """`encode_batch` for a long text, on all cores with every kind of tokenizer.

        The ids are the same whatever the number of processes.

        Args:
            num_bytes: Of all that is going to be encoded: no process is started for a short text.
            processes: How many at most, where the library does not use the cores by itself; by
                the cores of this machine if not given.
        """
        count = usable_processes() if processes is None else processes
        if self._matching is None or count < 2 or num_bytes < _WORTH_PROCESSES:
            yield self.encode_batch
            return
        with matching_processes(self._matching, count) as encode:

            def checked(texts: Sequence[str]) -> list[list[int]]:
                _check_pairs(texts)
                return encode(texts)

            yield checked

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
            except BaseException:  # Ctrl-C too must leave nothing behind
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
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}
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


def _own_way(
    definition: dict[str, Any], world: LongestMatch | None
) -> tuple[Callable[[bytes], list[int]] | None, str]:
    """From bytes to ids without the library, if that is faster, and what to call this kind."""
    if world is not None:
        return world.encode, "world"
    if is_byte_definition(definition):
        return list, "bytes"
    return None, definition["model"]["type"].lower()


def _check_pairs(texts: Sequence[str]) -> None:
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        raise _half_a_pair() from error


def _half_a_pair() -> DataError:
    return DataError(
        "The text holds half of a surrogate pair, which is no character: give UTF-8 text."
    )
