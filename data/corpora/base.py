"""What a corpus is, and the ways to split documents that do not depend on luck or order."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import compress

import numpy as np

from data.errors import DataError


@dataclass(frozen=True)
class Documents:
    """Non-empty documents that can be read again and again: each iteration calls ``read``."""

    read: Callable[[], Iterator[str]]

    def __iter__(self) -> Iterator[str]:
        return (text for text in self.read() if text)


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
        for text in documents:
            encoded = text.encode()
            side_bytes += len(encoded)
            fingerprint.update(hashlib.sha256(encoded).digest())
        if not side_bytes:
            raise DataError(
                f"The {side} side of '{name}' would be empty: give more text, or documents that "
                "differ, or another validation fraction."
            )
        num_bytes += side_bytes
    return Corpus(name, train, validation, fingerprint.hexdigest(), num_bytes)


def split_text(text: str, validation_fraction: float) -> tuple[str, str]:
    """The first ``int(n * (1 - validation_fraction))`` characters, and the rest."""
    cut = int(len(text) * (1 - validation_fraction))
    return text[:cut], text[cut:]


def split_by_hash(name: str, documents: Documents, validation_fraction: float) -> Corpus:
    """Split by whole document: those with the smallest hashes validate, at least one.

    The order of the documents plays no part, and equal documents fall on the same side.
    """
    keys = np.fromiter(
        (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) for text in documents),
        dtype=np.uint64,
    )
    if not keys.size:
        raise DataError(f"'{name}' holds no text: every document in it is empty.")
    count = max(1, round(keys.size * validation_fraction))
    in_validation = keys <= np.partition(keys, count - 1)[count - 1]
    return make_corpus(
        name,
        Documents(lambda: compress(documents, ~in_validation)),
        Documents(lambda: compress(documents, in_validation)),
    )
