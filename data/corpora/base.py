"""What a corpus is, and the ways to split documents that do not depend on luck or order."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, compress

import numpy as np

from data.errors import DataError
from data.tokenizers.cut import pieces


@dataclass(frozen=True)
class Documents:
    """Non-empty documents that can be read again and again: each iteration calls ``read``.

    Attributes:
        read: Gives the documents, empty ones too. One that may be too long for the memory comes as
            an iterable of its parts, which is read to its end before the next document.
    """

    read: Callable[[], Iterator[str | Iterable[str]]]

    def __iter__(self) -> Iterator[str]:
        """Whole documents."""
        return (text if isinstance(text, str) else "".join(text) for text in self.unread())

    def unread(self) -> Iterator[str | Iterable[str]]:
        """The non-empty ones of ``read``; what is passed over is not read to its end."""
        for document in self.read():
            parts = iter([document] if isinstance(document, str) else document)
            first = next(filter(None, parts), None)
            if first is not None:
                yield first if isinstance(document, str) else chain([first], parts)

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """Documents in pieces of bounded size, and whether each is the last of its document."""
        for document in self.unread():
            cut = pieces(document)
            piece = next(cut)
            for following in cut:
                yield piece, False
                piece = following
            yield piece, True

    def texts(self) -> Iterator[str]:
        """The same pieces alone."""
        return (piece for piece, _ in self.pieces())

    def digests(self) -> Iterator[tuple[bytes, int]]:
        """The sha256 of each document in UTF-8, and its length in bytes."""
        digest, num_bytes = hashlib.sha256(), 0
        for piece, is_last in self.pieces():
            encoded = piece.encode()
            digest.update(encoded)
            num_bytes += len(encoded)
            if is_last:
                yield digest.digest(), num_bytes
                digest, num_bytes = hashlib.sha256(), 0


@dataclass(frozen=True)
class Corpus:
    """Documents for training and for validation.

    Attributes:
        name: Short and for humans; holds no absolute path.
        train: The documents to learn from.
        validation: The documents to measure on; none of them is in ``train``.
        fingerprint: sha256 of the content and the split: equal contents, equal fingerprints.
        num_bytes: UTF-8 bytes of both sides together.
    """

    name: str
    train: Documents
    validation: Documents
    fingerprint: str
    num_bytes: int


def check_fraction(validation_fraction: float) -> None:
    """Refuse a share that leaves one side empty whatever the text."""
    if not 0 < validation_fraction < 1:
        raise DataError(
            f"The validation fraction is {validation_fraction}: choose one between 0 and 1."
        )


def make_corpus(name: str, train: Documents, validation: Documents) -> Corpus:
    """Read both sides once, for their fingerprint and size, and refuse an empty one."""
    fingerprint, num_bytes = hashlib.sha256(), 0
    for side, documents in (("training", train), ("validation", validation)):
        side_bytes = 0
        fingerprint.update(side.encode())
        for digest, size in documents.digests():
            side_bytes += size
            fingerprint.update(digest)
        if not side_bytes:
            raise DataError(
                f"The {side} side of '{name}' would be empty: give more text, or documents that "
                "differ, or another validation fraction."
            )
        num_bytes += side_bytes
    return Corpus(name, train, validation, fingerprint.hexdigest(), num_bytes)


def split_by_hash(name: str, documents: Documents, validation_fraction: float) -> Corpus:
    """Split by whole document: those with the smallest hashes validate, at least one.

    The order of the documents plays no part, and equal documents fall on the same side.
    """
    keys = np.fromiter(
        (int.from_bytes(digest[:8]) for digest, _ in documents.digests()),
        dtype=np.uint64,
    )
    if not keys.size:
        raise DataError(f"'{name}' holds no text: every document in it is empty.")
    count = max(1, round(keys.size * validation_fraction))
    in_validation = keys <= np.partition(keys, count - 1)[count - 1]
    return make_corpus(
        name,
        Documents(lambda: compress(documents.unread(), ~in_validation)),
        Documents(lambda: compress(documents.unread(), in_validation)),
    )
