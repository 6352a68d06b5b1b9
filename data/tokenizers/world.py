"""The RWKV "World" vocabulary: greedy longest match over bytes.

The text is read from left to right, and the longest token that it goes on with comes next
(``rwkv_vocab_v20230424.txt`` and ``rwkv_tokenizer.py`` in the ``rwkv`` package). ``tokenizers``
can say the same, as a WordPiece over the characters that stand for bytes, without a prefix and
without words. The library tries the longest piece of the rest of the text first, so that its time
grows with more than the square of the length: it serves as the definition and the file, and
``LongestMatch`` does the work.
"""

import ast
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from data.errors import DataError
from data.tokenizers.byte_level import byte_characters

# No text becomes a token with a space in it: the character for the byte is another one.
WORLD_END = "<|end of text|>"
_UNUSED = "<|unused {}|>"
_MULTIPLE = 64
_LARGEST_ID = (1 << 20) - 1
_LINE = re.compile(r"""(\d{1,9}) (b?(?:'.*'|".*")) (\d{1,9})""")
_WITHOUT_LIMIT = 10**9
_ONE_BYTE = (1,)


class LongestMatch:
    """Cuts bytes into tokens, the longest that fits first; every single byte is a token."""

    def __init__(self, id_of: Mapping[bytes, int]) -> None:
        self._id_of = dict(id_of)
        lengths: dict[bytes, set[int]] = {}
        for token in self._id_of:
            if len(token) > 1:
                lengths.setdefault(token[:2], {1}).add(len(token))
        self._lengths = {start: sorted(found)[::-1] for start, found in lengths.items()}

    def encode(self, data: bytes) -> list[int]:
        """The ids of some bytes, in time proportional to their number."""
        ids: list[int] = []
        start, id_of, lengths = 0, self._id_of, self._lengths
        while start < len(data):
            for length in lengths.get(data[start : start + 2], _ONE_BYTE):
                piece = data[start : start + length]
                if piece in id_of:
                    break
            ids.append(id_of[piece])
            start += len(piece)  # a piece at the end of the data is shorter than it might be
        return ids


def is_world_file(path: Path, content: bytes) -> bool:
    """Whether a file is to be read as such a vocabulary: it is no JSON, by name or by sight."""
    return path.suffix != ".json" and content.lstrip()[:1] != b"{"


def world_inner(content: bytes, source: str) -> tokenizers.Tokenizer:
    """The tokenizer of a vocabulary file: lines of ``ID 'TOKEN' LENGTH``, a Python literal each.

    Id 0 is the end of a text and not in the file. The vocabulary is filled up with unused ids to
    a multiple of 64, as the embeddings of the official models are: the 65530 ids of
    ``rwkv_vocab_v20230424.txt`` become 65536.

    Args:
        content: Of the file.
        source: Its name, for messages.

    Raises:
        DataError: It is not such a vocabulary.
    """
    try:
        lines = content.decode().replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{source}' is neither a tokenizer.json nor UTF-8 text, as a World vocabulary is: "
            "check the path."
        ) from error
    id_of = _parse(lines, source)
    missing = [byte for byte in range(256) if bytes([byte]) not in id_of]
    if missing:
        raise DataError(
            f"'{source}' has no token for the single byte 0x{missing[0]:02x}, so that it could not "
            "encode every text: get a complete copy of the vocabulary."
        )
    return _definition(id_of)


def longest_match(definition: Mapping[str, Any]) -> LongestMatch | None:
    """The fast way to the ids of a tokenizer, if it is one of these."""
    every_byte = {bytes([byte]): byte + 1 for byte in range(256)}
    expected = json.loads(_definition(every_byte).to_str())
    if _frame(definition) != _frame(expected):
        return None
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    vocab: dict[str, int] = definition["model"]["vocab"]
    known = all(character in vocab for character in byte_of)
    if not known or not all(token["special"] for token in definition["added_tokens"]):
        return None
    return LongestMatch(
        {
            bytes(byte_of[character] for character in token): i
            for token, i in vocab.items()
            if byte_of.keys() >= set(token)
        }
    )


def _parse(lines: Iterable[str], source: str) -> dict[bytes, int]:
    id_of: dict[bytes, int] = {}
    line_of: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        i, token = _parse_line(line, f"'{source}', line {number},")
        if not 0 < i <= _LARGEST_ID:
            raise DataError(
                f"'{source}', line {number}, has the id {i}, but ids of a World vocabulary run "
                f"from 1 to {_LARGEST_ID} (0 is the end of a text): correct it."
            )
        if i in line_of or token in id_of:
            what, other = (f"id {i}", i) if i in line_of else ("token", id_of[token])
            raise DataError(
                f"'{source}' has the {what} of line {number} a second time, after line "
                f"{line_of[other]}: remove one of them."
            )
        id_of[token] = i
        line_of[i] = number
    return id_of


def _parse_line(line: str, where: str) -> tuple[int, bytes]:
    match = _LINE.fullmatch(line)
    try:
        literal = ast.literal_eval(match[2]) if match else None
        token = literal.encode() if isinstance(literal, str) else literal
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        token = None
    if match is None or not isinstance(token, bytes) or not token:
        raise DataError(
            f"{where} is not ID 'TOKEN' LENGTH, as in an RWKV World vocabulary: give such a file "
            "or a tokenizer.json."
        )
    if len(token) != int(match[3]):
        raise DataError(
            f"{where} gives the length {match[3]} for a token of {len(token)} bytes: get an "
            "undamaged copy of the vocabulary."
        )
    return int(match[1]), token


def _definition(id_of: Mapping[bytes, int]) -> tokenizers.Tokenizer:
    characters = byte_characters()
    size = -(-(max(id_of.values()) + 1) // _MULTIPLE) * _MULTIPLE
    name_of = {i: "".join(characters[byte] for byte in token) for token, i in id_of.items()}
    specials = {i: _UNUSED.format(i) if i else WORLD_END for i in range(size) if i not in name_of}
    vocab = {name: i for i, name in sorted({**name_of, **specials}.items())}
    inner = tokenizers.Tokenizer(
        models.WordPiece(
            vocab=vocab,
            unk_token=WORLD_END,  # never met: every byte is a token
            continuing_subword_prefix="",
            max_input_chars_per_word=_WITHOUT_LIMIT,
        )
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in specials.values()]
    )
    return inner


def _frame(definition: Mapping[str, Any]) -> dict[str, Any]:
    """A definition without its tokens."""
    return {**definition, "added_tokens": [], "model": {**definition["model"], "vocab": {}}}
