"""`ebb train --compile`: the blocks of a model as `torch.compile` makes them."""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from data.loader import Batch
from model.language_model import Block, LanguageModel
from train import snapshot
from train.loss import next_token_loss
from train.precision import both_passes

REASON_LENGTH = 200
"""Characters of a compiler's message that are shown."""


def compile_blocks(
    model: LanguageModel,
    batches: list[Batch],
    say: Callable[[str], None],
    *,
    bf16: bool = False,
    must: bool = False,
) -> bool:
    """Compiles every block, in place: one compilation serves all of the same kind.

    A forward and a backward pass over each batch make the compiler work now, so that what it cannot
    do shows before the first step. They change nothing.

    Args:
        model: to train.
        batches: of each kind that training will see.
        say: hears why it failed.
        bf16: training multiplies in bfloat16.
        must: a run that is compiled goes on, which would not be the same without.

    Returns:
        Whether it worked. If not, the model is as it was.

    Raises:
        ValueError: if it must work and does not.
    """
    torch.compiler.reset()  # what other models have left counts against a limit
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    states = snapshot.generator_states()
    for block in blocks:
        block.compile()
    try:
        with warnings.catch_warnings():
            # PyTorch's tracer looks at it in every tensor that comes in, and warns of itself.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            for batch in batches:
                loss_of = partial(next_token_loss, model, *batch)
                both_passes(loss_of, batch.inputs.device, bf16=bf16)
    except (RuntimeError, OSError) as error:  # the compiler's own are RuntimeErrors
        uncompile(model)
        reason = _reason(error)
        if must:
            raise ValueError(
                f"the blocks of this run are compiled, which fails here ({reason}); to go on "
                "without, add --no-compile"
            ) from error
        say(f"The blocks cannot be compiled, so training goes on without ({reason}).")
        return False
    finally:
        model.zero_grad(set_to_none=True)
        snapshot.set_generator_states(states)
    return True


def uncompile(model: LanguageModel) -> None:
    """Every block as it is written."""
    for block in model.blocks:
        block._compiled_call_impl = None


@contextmanager
def uncompiled() -> Iterator[None]:
    """Validation and samples: other shapes, without gradients, not worth a compilation."""
    with torch.compiler.set_stance("force_eager"):
        yield


def _reason(error: Exception) -> str:
    """What a compiler says, without the names of exceptions and its advice to developers."""
    text = " ".join(str(error).partition("Set TORCHDYNAMO_VERBOSE")[0].split())
    return re.sub(r"\b[\w.]+(Error|Exception): ", "", text)[:REASON_LENGTH]
