"""How well a model predicts a text: nats per token, perplexity, bits per byte."""

import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import tyro

from data.corpora import load_corpus
from data.loader import Batch, sequential_stretches
from data.packing import default_cache_dir, pack
from model.decode import check_weights, with_rounded_weights
from model.language_model import LanguageModel
from train.checkpoint import load_checkpoint
from train.config import at_least
from train.progress import Display


@dataclass(frozen=True)
class Evaluation:
    """A loss and what it was measured on."""

    nats: float
    """Sum of `-ln p` over all tokens."""
    tokens: int
    bytes: int
    """UTF-8 bytes of the predicted tokens; an end token has none."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """`exp(loss)`; infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, unlike the loss per token."""
        return bits_per_byte(self.nats, self.bytes)


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """A sum of `-ln p` over some tokens, by the UTF-8 bytes that they stand for."""
    return nats / math.log(2) / max(num_bytes, 1)


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    batches: Iterable[Batch],
    token_bytes: npt.NDArray[np.int32],
    *,
    carry_state: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """The loss of a model over batches of text.

    Args:
        model: switched to evaluation mode and back.
        batches: windows of tokens, and what follows each of them.
        token_bytes: `[vocab_size]`, the UTF-8 bytes that each token stands for.
        carry_state: go on from one batch to the next, as through one long text.
        progress: called with the number of tokens read so far.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    sizes = torch.from_numpy(token_bytes).to(device)
    nats, tokens, num_bytes, state = 0.0, 0, 0, None
    for batch in batches:
        inputs, targets = batch.inputs.to(device), batch.targets.to(device)
        reset = None if batch.reset is None else batch.reset.to(device)
        logits, state = model(inputs, state if carry_state else None, "chunked", reset)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        nats += losses.sum(dtype=torch.float64).item()
        tokens += targets.numel()
        num_bytes += int(sizes[targets].sum())
        if progress is not None:
            progress(tokens)
    model.train(was_training)
    return Evaluation(nats, tokens, num_bytes)


@dataclass(frozen=True)
class EvalConfig:
    """Loss, perplexity and bits per byte of a checkpoint on a text.

    The text is read from beginning to end with the state carried through, so that every token is
    predicted from all that stands before it in its document.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """Folder of a run, such as checkpoints/rwkv7-micro-sotu."""
    data: str | None = None
    """As in `ebb train`; the data it was trained on if not given."""
    column: str | None = None
    """Column or key that holds the text; as in training if not given."""
    split: str = "validation"
    """validation, train, or all."""
    stretch: int = 256
    """Tokens a forward pass; the result does not depend on it but for rounding."""
    max_tokens: int | None = None
    """Read so many at most, the first of which is not predicted; the whole text if not given."""
    weights: str = "fp32"
    """What the matrices are rounded to: fp32, bf16, int8 or int4, as `ebb generate --weights` keeps
    them. The text is read twice then, to say what the rounding costs."""
    best: bool = False
    """The weights with the lowest validation loss instead of the last."""
    threads: int | None = None
    """CPU threads; what PyTorch chooses if not given."""
    json: bool = False
    """Print one JSON object instead of lines."""

    def __post_init__(self) -> None:
        """Refuses what cannot be done.

        Raises:
            ValueError: naming the setting.
        """
        if self.split not in ("validation", "train", "all"):
            raise ValueError(f"split must be validation, train or all, but is {self.split!r}")
        for name in ("stretch", "threads"):
            at_least(name, getattr(self, name), 1)
        at_least("max_tokens", self.max_tokens, 2)
        check_weights(self.weights)


def evaluate_checkpoint(config: EvalConfig) -> None:
    """Runs `ebb eval`.

    Raises:
        ValueError: for a checkpoint or data that cannot be read.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    checkpoint = load_checkpoint(config.checkpoint, best=config.best)
    trained = checkpoint.config["train"]
    if config.data is None and "data" not in trained:
        raise ValueError(f"{config.checkpoint} does not say what it was trained on: give --data")
    corpus = load_corpus(
        config.data or trained["data"],
        column=config.column or ("text" if config.data else trained.get("column", "text")),
        stream=None if config.data else trained.get("stream"),
    )
    with Display() as display:
        with display.task("Tokenising", corpus.num_bytes) as advance:
            packed = pack(corpus, checkpoint.tokenizer, default_cache_dir(), advance)
        sides = {"train": packed[:1], "validation": packed[1:], "all": packed}[config.split]
        tokens = np.concatenate([side.tokens for side in sides])[: config.max_tokens]

        def read(name: str, model: LanguageModel) -> Evaluation:
            with display.task(name, tokens.size) as advance:
                return evaluate(
                    model,
                    sequential_stretches(
                        tokens, context=config.stretch, end_id=checkpoint.tokenizer.end_id
                    ),
                    checkpoint.tokenizer.token_bytes(),
                    carry_state=True,
                    progress=advance,
                )

        result = exact = read("Evaluating", checkpoint.model)
        if config.weights != "fp32":
            rounded = with_rounded_weights(checkpoint.model, config.weights)
            result = read(f"Evaluating {config.weights}", rounded)
    report = {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
        "bytes": result.bytes,
        "data": corpus.name,
        "split": config.split,
        "weights": config.weights,
        "perplexity_fp32": exact.perplexity,
    }
    cost = ""
    if config.weights != "fp32":
        more = 100 * math.expm1(result.loss - exact.loss)
        cost = (
            f", {more:+.3f} % against {exact.perplexity:.2f} without rounding to {config.weights}"
        )
    if config.json:
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        sys.stdout.write(
            f"{corpus.name} ({config.split}): {result.tokens:,} tokens, {result.bytes:,} bytes\n"
            f"loss           {result.loss:.4f} nats per token\n"
            f"perplexity     {result.perplexity:.2f} per token{cost}\n"
            f"bits per byte  {result.bits_per_byte:.4f}\n"
        )
