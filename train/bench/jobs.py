"""A job: what becomes one row, in plain values that any process can be handed."""

from collections.abc import Callable
from dataclasses import dataclass

from train.bench.contenders import Contender, Running
from train.benchmark import burst


@dataclass(frozen=True)
class Job:
    """One model at one task."""

    task: str
    """train, prefill or decode."""
    contender: Contender
    context: int
    """Tokens of a sequence; decoding, tokens already read."""
    batch_size: int = 1
    precision: str = "fp32"
    """Of products in training."""


def prepared(job: Job, running: Running) -> Callable[[], object]:
    """What is done, once: a step, a prompt, or a burst of tokens."""
    if job.task == "train":
        return running.training(job.context, job.batch_size, bf16=job.precision == "bf16")
    if job.task == "prefill":
        return running.prefilling(job.context)
    begin, _ = running.decoding(job.context)
    return burst(begin, job.contender.shape.vocab_size)


def flops_per_token(task: str, running: Running) -> int:
    """Twice the weights that a token is multiplied with; training, twice that again backwards.

    A prompt needs the head for its last token only.
    """
    if task == "train":
        return 6 * running.multiplied
    return 2 * (running.multiplied - (running.head if task == "prefill" else 0))
