"""Started once a rank by a test: every recurrent mixer, its sequence divided among the ranks.

Each process computes everything alone as well and says how far the two are apart.
"""

import json
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from model_helpers import random_model, random_tokens, resets_at, small_config
from torch import Tensor

from model.language_model import LanguageModel
from model.layers import MIXERS
from model.state import map_tensors
from train.context_parallel import pass_states
from train.together import leave_group

BATCH, TIME = 2, 24
RESETS = [(0, 5), (0, 12), (1, 19)]
"""One of them at the border of two stretches, where four or two ranks divide 24 tokens."""


def computed(model: LanguageModel, tokens: Tensor, reset: Tensor, first: int, end: int) -> Tensor:
    """Logits of a stretch, after a backward pass of all logits under fixed cotangents."""
    state = map_tensors(lambda x: x.repeat(BATCH, *(1,) * (x.dim() - 1)), model.initial_state(1))
    logits = model(tokens[:, first:end], state, reset=reset[:, first:end]).logits
    generator = torch.Generator().manual_seed(1)
    shape = (BATCH, TIME, logits.shape[-1])
    cotangent = torch.randn(shape, generator=generator, dtype=torch.float64)
    model.zero_grad()
    (logits * cotangent[:, first:end].to(logits.dtype)).sum().backward()
    return logits.detach()


def errors(mixer: str) -> Iterator[float]:
    """Of the logits of this rank's stretch, and of every gradient summed over the ranks."""
    rank, count = dist.get_rank(), dist.get_world_size()
    model = random_model(small_config(mixer))
    tokens, reset = random_tokens(BATCH, TIME), resets_at(BATCH, TIME, RESETS)
    whole = computed(model, tokens, reset, 0, TIME)
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    pass_states(model, rank - 1 if rank else None, rank + 1 if rank < count - 1 else None)
    length = TIME // count
    first = rank * length
    logits = computed(model, tokens, reset, first, first + length)
    size = whole.abs().max()
    yield ((logits - whole[:, first : first + length]).abs().max() / size).item()
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for name, parameter in model.named_parameters():
        dist.all_reduce(parameter.grad)
        yield ((parameter.grad - wanted[name]).abs().max() / largest).item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {mixer: max(errors(mixer)) for mixer in MIXERS if mixer != "attention"}
    sys.stdout.write(json.dumps(found) + "\n")
    dist.barrier()
    leave_group()
