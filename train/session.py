"""One text that a model reads and writes in turns, printed as it is made."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.tokenizers import TextStream, pieces
from model import state as states
from model.decode import engine_for
from model.generation import Generation, num_rows, prefill
from model.sampling import Sampling
from model.state import ModelState
from train.checkpoint import load_checkpoint, write_atomically
from train.interrupt import stop_on_signal

_TAIL = 16
"""Tokens to remember, so that a character that was begun before is decoded whole."""


class StopFilter:
    """Lets text through up to a stop string, and holds back only what may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False
        """Whether a stop string has come."""

    def push(self, text: str) -> str:
        """Takes more text; returns what can be shown."""
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        begun = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        shown = len(text) - max(begun, default=0)
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """What was held back in vain."""
        return self._held


@dataclass
class Stats:
    """What was done, for `--stats`."""

    read: int = 0
    read_seconds: float = 0.0
    written: int = 0
    written_seconds: float = 0.0
    state_bytes: int = 0

    def lines(self) -> list[str]:
        """For people."""
        prompt, text = f"prompt: {self.read:,} tokens", f"generated: {self.written:,} tokens"
        if self.read:
            rate = self.read / self.read_seconds
            prompt += f" in {self.read_seconds:.2f} s, {rate:,.1f} tokens/s"
        if self.written:
            rate = self.written / self.written_seconds
            text += f" in {self.written_seconds:.2f} s, {rate:,.1f} tokens/s"
            text += f", {1000 / rate:.2f} ms a token"
        return [prompt, text, f"state: {self.state_bytes:,} bytes"]


class Session:
    """The model, and how far its text has come.

    Args:
        folder: of the run.
        best: the weights with the lowest validation loss instead of the last.
        state: a file to go on from; None for a new text.
        seed: of the draws; None for 0, or to go on with the draws of the saved text.
        weights: of `model.decode.FORMATS`, what the matrices are kept in where it writes.

    Raises:
        ValueError: if checkpoint, state or weights cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        *,
        best: bool = False,
        state: Path | None = None,
        seed: int | None = None,
        weights: str = "fp32",
    ) -> None:
        self.model, self.tokenizer, _ = load_checkpoint(folder, best=best)
        self.stats = Stats()
        self._weights = weights
        if weights != "fp32":
            engine_for(self.model, weights)  # says at once what is in the way
        self._source = state
        self._generator = torch.Generator().manual_seed(seed or 0)
        self._state: ModelState = self.model.initial_state(1)
        self._logits: Tensor | None = None
        self._seen = torch.zeros(1, self.model.config.vocab_size, dtype=torch.bool)
        self._tail: list[int] = []
        if state is not None:
            self._load(state, own_draws=seed is not None)

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been read, so that nothing can be written or saved."""
        return self._logits is None

    def encode(self, text: str) -> list[int]:
        """The token ids of a prompt of any length."""
        return [i for ids in self.tokenizer.encode_batch([*pieces(text)]) for i in ids]

    def read(self, ids: Sequence[int]) -> None:
        """Adds tokens to the text. Where there is no text yet, none means a new document."""
        if not ids:
            if not self.is_empty:
                return
            if self._source is not None:
                raise ValueError(
                    f"{self._source} was saved without the next token's logits: "
                    "give a --prompt to go on with"
                )
            ids = [self.tokenizer.end_id]
        begin = time.perf_counter()
        logits, state = prefill(self.model, torch.tensor([ids]), self._state)
        self.stats.read += len(ids)
        self.stats.read_seconds += time.perf_counter() - begin
        seen = self._seen.clone()
        seen[0, ids] = True
        self._advance(logits, state, seen, ids)

    def write(
        self,
        show: Callable[[str], None],
        *,
        max_tokens: int,
        sampling: Sampling,
        stop: Sequence[str] = (),
        to_be_continued: bool = False,
    ) -> None:
        """Adds the model's tokens to the text.

        Args:
            show: called with every piece of text as soon as it is certain.
            max_tokens: how many at most; the model may end the document before.
            sampling: how to draw.
            stop: strings to end before.
            to_be_continued: keep the bytes of an unfinished character for the next call, or for
                whoever loads the state, instead of showing them as U+FFFD.

        Raises:
            KeyboardInterrupt: if a signal stopped it; the text is whole up to there.
        """
        assert self._logits is not None, "read first"
        stops, stream = StopFilter(stop), self._stream()
        generation = Generation(
            self.model,
            self._logits,
            self._state,
            max_tokens=max_tokens,
            sampling=sampling,
            generators=[self._generator],
            seen=self._seen,
            stop_ids=(self.tokenizer.end_id,),
            vocab_size=self.tokenizer.vocab_size,
            weights=self._weights,
        )
        written: list[int] = []
        begin = time.perf_counter()
        try:
            with stop_on_signal(lambda _: None) as signal:
                for (token,) in generation:
                    assert token is not None
                    written.append(token)
                    show(stops.push(stream.push(token)))
                    if stops.stopped or signal.requested:
                        break
                if not stops.stopped:
                    show(stops.push("" if to_be_continued else stream.finish()) + stops.finish())
        finally:
            self.stats.written += len(written)
            self.stats.written_seconds += time.perf_counter() - begin
            self._advance(generation.logits, generation.state, generation.seen, written)
        if signal.requested:
            raise KeyboardInterrupt

    def save(self, path: Path) -> None:
        """Writes all that it takes to go on from here.

        Raises:
            ValueError: if the file cannot be written.
        """
        assert self._logits is not None, "read first"
        extra = {
            "logits": self._logits,
            "seen": self._seen,
            "generator": self._generator.get_state(),
            "tail": torch.tensor(self._tail),
        }
        fingerprint = self.model.fingerprint()
        write_atomically(path, lambda beside: states.save(self._state, beside, fingerprint, extra))

    def _advance(self, logits: Tensor, state: ModelState, seen: Tensor, ids: Sequence[int]) -> None:
        self.stats.state_bytes = states.num_bytes(state)
        self._tail = [*self._tail, *ids][-_TAIL:]
        self._logits, self._state, self._seen = logits, state, seen
        if self._tail[-1:] == [self.tokenizer.end_id]:
            # As in training, where the end token is also the first of what the next one sees.
            self._logits, self._state = prefill(
                self.model, torch.tensor([self._tail[-1:]]), self.model.initial_state(1)
            )
            self._seen = torch.zeros_like(seen)

    def _stream(self) -> TextStream:
        """A decoder that has decoded, and nobody has seen, what the text ends with."""
        stream = self.tokenizer.stream()
        for token in self._tail:
            stream.push(token)
        return stream

    def _load(self, path: Path, *, own_draws: bool) -> None:
        self._state = states.load(path, self.model.initial_state(1), self.model.fingerprint())
        if (rows := num_rows(self._state)) != 1:
            raise ValueError(f"{path} holds {rows} texts: save one, with `select_rows`")
        extra = states.load_extra(path)
        self.stats.state_bytes = states.num_bytes(self._state)
        self._logits = extra.get("logits")
        self._seen = extra.get("seen", self._seen)
        self._tail = extra["tail"].tolist() if "tail" in extra else []
        if not own_draws and "generator" in extra:
            self._generator.set_state(extra["generator"])
