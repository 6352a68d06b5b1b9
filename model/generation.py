"""Generation: read a prompt in stretches, then take one step of constant cost a token.

Token ids only. The state can be kept, branched and saved at any time: it is a value.
"""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from model.decode import Decoder, engine_for, engine_if_any
from model.language_model import LanguageModel
from model.sampling import Sampling, sample
from model.state import ModelState, concatenate, map_tensors, select_rows, tensors


def prefill(
    model: LanguageModel, tokens: Tensor, state: ModelState | None = None, chunk: int = 1024
) -> tuple[Tensor, ModelState]:
    """Reads tokens in the chunked form, a stretch after the other.

    Activations take the memory of one stretch, whatever T is; only a KV cache grows with T.

    Args:
        model: which reads.
        tokens: `[B, T]` int64, T >= 1.
        state: of the tokens before these; None for none.
        chunk: tokens of a stretch.

    Returns:
        Logits `[B, V]` of the token after the last, and the state after the last.

    Raises:
        ValueError: for no tokens, tokens outside the vocabulary, or a stretch below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, but is {chunk}")
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise ValueError(f"tokens must be [B, T] with at least one, but are {[*tokens.shape]}")
    if not 0 <= tokens.min() <= tokens.max() < model.config.vocab_size:
        raise ValueError(
            f"a token lies outside the model's vocabulary of {model.config.vocab_size}: "
            "encode with the tokenizer that it was trained with"
        )
    with torch.no_grad():
        for stretch in torch.split(tokens.to(model.embedding.weight.device), chunk, dim=1):
            x, state = model.features(stretch, state, form="chunked")
        logits: Tensor = model.head(x[:, -1])
    own: ModelState = map_tensors(_without_surroundings, state)
    return logits, own


def step(model: LanguageModel, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
    """Reads one token a row in the recurrent form: `[B]` -> logits `[B, V]` of the next, state.

    One row goes through the native step where there is one, and equals PyTorch but for rounding.
    """
    if engine := engine_if_any(model, state):
        return engine.step(int(tokens), state)
    with torch.no_grad():
        output = model(tokens[:, None].to(model.embedding.weight.device), state, form="recurrent")
    return output.logits[:, -1], output.state


class Generation(Iterator[list[int | None]]):
    """Draws a token for each row, reads it, and so on; iterate for the tokens.

    At any time `state` has read all tokens that were given out, and `logits` are those of the next.
    A row ends with the first of `stop_ids`, which is given out and read too; after that it gives
    None and costs nothing.

    Args:
        model: which reads.
        logits: `[B, V]` of the next token.
        state: of everything before it, B rows.
        max_tokens: how many a row at most.
        sampling: how to draw.
        generators: one a row; they move on.
        seen: `[B, V]` bool, for the repetition penalty: the tokens so far. None for none.
        stop_ids: the tokens that end a row.
        vocab_size: draw ids below this only: an official model has more than its tokenizer. None
            for all.
        weights: what the model's matrices are rounded to, of `model.decode.FORMATS`; other than
            fp32 for one row only, and only where there is a native step.

    The weights are those of when this is made, if there is one row.

    Raises:
        ValueError: for a negative number of tokens, a `vocab_size` that the model has not, or
            weights that cannot be had.
    """

    def __init__(
        self,
        model: LanguageModel,
        logits: Tensor,
        state: ModelState,
        *,
        max_tokens: int,
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        seen: Tensor | None = None,
        stop_ids: Collection[int] = (),
        vocab_size: int | None = None,
        weights: str = "fp32",
    ) -> None:
        if vocab_size is not None and not 1 <= vocab_size <= logits.shape[1]:
            raise ValueError(
                f"vocab_size must be between 1 and {logits.shape[1]}, but is {vocab_size}"
            )
        if max_tokens < 0:
            raise ValueError(f"max_tokens must be at least 0, but is {max_tokens}")
        self.model, self.sampling, self.stop_ids = model, sampling, frozenset(stop_ids)
        self._vocab_size = logits.shape[1] if vocab_size is None else vocab_size
        self._left, self._generators = max_tokens, generators
        self._seen = torch.zeros(logits.shape, dtype=torch.bool) if seen is None else seen.clone()
        self._rows = list(range(logits.shape[0]))
        self._logits, self._state = logits, state
        self._decoder = _decoder(model, state, weights)
        self._ended: dict[int, tuple[Tensor, ModelState]] = {}

    @property
    def logits(self) -> Tensor:
        """`[B, V]`, of each row's next token."""
        if not self._ended:
            return self._logits
        return torch.cat([logits for logits, _ in self._in_order()])

    @property
    def state(self) -> ModelState:
        """After everything given out so far, B rows."""
        if not self._ended:
            return self._state if self._decoder is None else self._decoder.state
        return concatenate([s for _, s in self._in_order()])

    @property
    def seen(self) -> Tensor:
        """`[B, V]` bool: which tokens have come, those of the prompts included."""
        return self._seen.clone()

    def __next__(self) -> list[int | None]:
        if self._left == 0 or not self._rows:
            raise StopIteration
        known = slice(self._vocab_size)
        seen = self._seen[self._rows, known] if self.sampling.repetition_penalty != 1 else None
        generators = [self._generators[row] for row in self._rows]
        tokens = sample(self._logits[:, known], self.sampling, generators, seen)
        if self._decoder is None:
            self._logits, self._state = step(self.model, tokens, self._state)
        else:
            self._logits = self._decoder.step(int(tokens))
        self._seen[self._rows, tokens] = True
        self._left -= 1
        drawn: list[int | None] = [None] * self._seen.shape[0]
        for row, token in zip(self._rows, tokens.tolist(), strict=True):
            drawn[row] = token
        if any(drawn[row] in self.stop_ids for row in self._rows):
            self._end_rows(drawn)
        return drawn

    def _end_rows(self, drawn: Sequence[int | None]) -> None:
        """Takes the rows that drew a stop token out of the batch."""
        going = []
        for place, row in enumerate(self._rows):
            if drawn[row] in self.stop_ids:
                self._ended[row] = self._row(place)
            else:
                going.append(place)
        if going:
            self._logits, self._state = self._logits[going], select_rows(self._state, going)
        self._rows = [self._rows[place] for place in going]

    def _row(self, place: int) -> tuple[Tensor, ModelState]:
        if self._decoder is not None:
            return self._logits, self._decoder.state
        return self._logits[place : place + 1], select_rows(self._state, [place])

    def _in_order(self) -> list[tuple[Tensor, ModelState]]:
        rows = self._ended | {row: self._row(place) for place, row in enumerate(self._rows)}
        return [rows[row] for row in sorted(rows)]


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    state: ModelState | None = None,
    stop_ids: Collection[int] = (),
    vocab_size: int | None = None,
    weights: str = "fp32",
) -> Generation:
    """Goes on from one prompt or many, of any lengths; the rows do not influence each other.

    Args:
        model: in evaluation mode.
        prompts: B lists of token ids, none of them empty.
        max_tokens: how many to draw for each at most.
        sampling: how to draw; `Sampling()` if None.
        seed: row r draws with seed + r, and so can be repeated alone.
        state: B rows, of what stands before the prompts; None for nothing.
        stop_ids: the tokens that end a row.
        vocab_size: draw ids below this only; None for all that the model has.
        weights: as of `Generation`; the prompt is read in full precision.

    Returns:
        An iterator of B tokens a step, None for a row that has ended. The prompts have been read.

    Raises:
        ValueError: for an empty prompt, a token outside the vocabulary, a state of other than B
            rows, a seed that is negative or above 2^62, a `vocab_size` that the model has not, or
            weights that cannot be had.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("every prompt needs a token: start a text with the end token")
    if not 0 <= seed <= 1 << 62:
        raise ValueError(f"seed must be between 0 and 2^62, but is {seed}")
    if state is not None and (rows := num_rows(state)) != len(prompts):
        raise ValueError(f"the state has {rows} rows, but there are {len(prompts)} prompts")
    seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool)
    all_logits, states = [], []
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([list(prompt)], dtype=torch.long)
        before = None if state is None else select_rows(state, [row])
        logits, after = prefill(model, ids, before)
        all_logits.append(logits)
        states.append(after)
        seen[row, ids[0]] = True
    return Generation(
        model,
        torch.cat(all_logits),
        concatenate(states),
        max_tokens=max_tokens,
        sampling=Sampling() if sampling is None else sampling,
        generators=[torch.Generator().manual_seed(seed + row) for row in range(len(prompts))],
        seen=seen,
        stop_ids=stop_ids,
        vocab_size=vocab_size,
        weights=weights,
    )


def num_rows(state: ModelState) -> int:
    """B."""
    return next(tensor.shape[0] for _, tensor in tensors(state))


def _decoder(model: LanguageModel, state: ModelState, weights: str) -> Decoder | None:
    """For one row, where there is a native step.

    Raises:
        ValueError: for weights other than fp32 where there is none.
    """
    if weights == "fp32":
        engine = engine_if_any(model, state)
    elif (rows := num_rows(state)) != 1:
        raise ValueError(f"weights in {weights} are for one text at a time, not for {rows}")
    else:
        engine = engine_for(model, weights)
    return None if engine is None else Decoder(engine, state)


def _without_surroundings(tensor: Tensor) -> Tensor:
    """The tensor, copied if it is a part of a larger one that it would keep in memory."""
    is_part = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
    return tensor.clone() if is_part else tensor
