"""Token files read as if they were one: nothing is copied but what is cut out."""

from collections.abc import Sequence
from typing import cast

import numpy as np

from data.packing import TokenArray, release


class JoinedTokens:
    """Token arrays one after the other, to be cut like one array.

    Attributes:
        size: Tokens in all.
    """

    def __init__(self, parts: Sequence[TokenArray]) -> None:
        self._parts = tuple(parts)
        self.size: int = sum(part.size for part in parts)

    def __getitem__(self, cut: slice) -> "JoinedTokens":
        """The same part by part, still where the tokens lie; steps are not supported."""
        start, stop, step = cut.indices(self.size)
        assert step == 1, "tokens are read in order"
        parts, before = [], 0
        for part in self._parts:
            here = part[max(start - before, 0) : max(stop - before, 0)]
            if here.size:
                parts.append(here)
            before += part.size
        return JoinedTokens(parts)

    def read(self) -> TokenArray:
        """The tokens in memory, 1-D."""
        return cast("TokenArray", np.concatenate(self._parts))

    def release(self) -> None:
        """Give back the pages that were read, as `data.packing.release` does."""
        for part in self._parts:
            release(part)


Tokens = TokenArray | JoinedTokens


def cut_out(tokens: Tokens, start: int, length: int) -> TokenArray:
    """A stretch of tokens, 1-D; it may cross from one file to the next."""
    piece = tokens[start : start + length]
    return piece.read() if isinstance(piece, JoinedTokens) else piece


def release_all(tokens: Tokens) -> None:
    """Give back the pages of mapped files that were read."""
    if isinstance(tokens, JoinedTokens):
        tokens.release()
    else:
        release(tokens)
