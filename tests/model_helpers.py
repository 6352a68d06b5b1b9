"""What the tests of the network share: random models, one run with all its gradients, closeness."""

import dataclasses
from collections.abc import Iterable, Mapping
from itertools import pairwise

import torch
from torch import Tensor

from model.config import ModelConfig
from model.language_model import LanguageModel
from model.layers import MIXERS
from model.state import ModelState, tensors

ALL_MIXERS = sorted(MIXERS)
RECURRENT = [mixer for mixer in ALL_MIXERS if MIXERS[mixer].op != "attention"]
FORMS = ("parallel", "chunked", "recurrent")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
VOCAB = 29


RATES = {
    "rwkv4": {"decay": 2.0, "bonus": 3.0},
    "rwkv5": {"decay": 2.0},
    "rwkv6": {"decay.bias": 2.0},
    "rwkv7": {"decay.bias": 2.0},
}
"""Parameters of time mixers that learn faster than the others, in the official code."""


def small_config(mixer: str, *, calm: bool = False, **changes: object) -> ModelConfig:
    """Three layers of four heads: the least that has a first, a middle and a last layer.

    `calm` gives the norm over a head a large eps. With the official one, a head whose output is by
    chance near zero multiplies float32's rounding errors by 100, in all forms alike.
    """
    options = MIXERS[mixer].time_mix.Options
    names = [f.name for f in dataclasses.fields(options) if f.name.endswith("norm_eps")]
    norm = dict.fromkeys(names, 0.1) if calm else {}
    settings = {
        "mixer": mixer,
        "vocab_size": VOCAB,
        "d_model": 32,
        "num_layers": 3,
        "head_dim": 8,
        "options": options(**norm),
    }
    return ModelConfig(**{**settings, **changes})


@torch.no_grad()
def random_model(
    config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64
) -> LanguageModel:
    """A model in which no weight is zero: the official values start all output matrices there."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LanguageModel(config).to(torch.float64)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float64)
            if name == "embedding.weight" or parameter.dim() == 1:
                parameter.add_(noise * (1.0 if name == "embedding.weight" else 0.3))
            else:  # keeps the size of activations: divided by the root of the inputs
                inputs = parameter.shape[-1] if name.endswith(".weight") else parameter.shape[-2]
                parameter.add_(noise * inputs**-0.5)
    return model.to(dtype)


def random_tokens(batch: int, time: int, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    """`[B, T]`."""
    return torch.randint(vocab, (batch, time), generator=torch.Generator().manual_seed(seed))


def resets_at(batch: int, time: int, places: Iterable[tuple[int, int]]) -> Tensor:
    """`[B, T]` bool, True at the given (row, token)."""
    reset = torch.zeros(batch, time, dtype=torch.bool)
    for row, token in places:
        reset[row, token] = True
    return reset


def with_gradients(
    model: LanguageModel,
    tokens: Tensor,
    form: str,
    state: ModelState | None = None,
    reset: Tensor | None = None,
    pieces: Iterable[int] = (),
) -> dict[str, Tensor]:
    """Logits, final state and the gradient of every parameter, under random cotangents.

    `pieces` are places where the sequence is cut and the state carried over the cut.
    """
    bounds = [0, *sorted(pieces), tokens.shape[1]]
    logits = []
    for begin, end in pairwise(bounds):
        part = None if reset is None else reset[:, begin:end]
        output = model(tokens[:, begin:end], state, form=form, reset=part)
        logits.append(output.logits)
        state = output.state
    assert state is not None
    found = {"logits": torch.cat(logits, dim=1), **dict(tensors(state))}
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64)
    for tensor in found.values():
        if tensor.is_floating_point():
            cotangent = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            loss = loss + (tensor * cotangent.to(tensor.dtype)).sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    found |= {f"gradient of {n}": g for n, g in zip(names, gradients, strict=True)}
    return {name: tensor.detach() for name, tensor in found.items()}


def assert_close(
    actual: Tensor, expected: Tensor, tolerance: float, name: str = "", least: float = 1e-30
) -> None:
    """Same shape and dtype, finite, and within `tolerance` of the largest reference value.

    `least` is the size below which a reference value counts as zero.
    """
    assert actual.shape == expected.shape, f"{name}: {actual.shape} is not {expected.shape}"
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype} is not {expected.dtype}"
    if actual.numel() == 0:
        return
    if not actual.is_floating_point():
        assert torch.equal(actual, expected), name
        return
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=least)
    assert error <= tolerance, f"{name}: {error:.2e} of the largest value is more than {tolerance}"


def assert_all_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float
) -> None:
    """`assert_close` for all tensors of two mappings with the same names.

    A gradient can be nearly nothing by cancellation (that of a decay whose past nothing reads, that
    through the norm of a head with one token behind it) and is then rounding noise in every form.
    In float64 it counts as zero below 1e-4 of the model's largest gradient; in float32 all are
    measured against that largest one.
    """
    assert actual.keys() == expected.keys()
    sizes = {name: x.abs().max().item() for name, x in expected.items() if name[:4] == "grad"}
    single = any(x.dtype == torch.float32 for x in expected.values())
    least = (1.0 if single else 1e-4) * max(sizes.values(), default=0.0)
    for name in expected:
        floor = least if name in sizes else 1e-30
        assert_close(actual[name], expected[name], tolerance, name, floor)


def assert_states_close(actual: ModelState, expected: ModelState, tolerance: float) -> None:
    """`assert_close` for all tensors of two states."""
    assert_all_close(dict(tensors(actual)), dict(tensors(expected)), tolerance)


def same_bits(first: ModelState, second: ModelState) -> bool:
    """Whether two states hold exactly the same."""
    pairs = zip(tensors(first), tensors(second), strict=True)
    return all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)
