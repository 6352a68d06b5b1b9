"""Time mixers and whole models as something to check, with random weights or their own.

What their gradients are measured against: a gradient can be nearly nothing by cancellation (that of
a decay whose past nothing reads, that through the norm of a head with one token behind it) and is
then rounding noise in every form. So in float64 it is measured against 1e-4 of the largest gradient
at least, in float32 against that largest one. A gradient that is lost or wrong in float32 alone is
as large as the others, and one that is small and wrong shows in float64.
"""

import copy
import inspect
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.language_model import LanguageModel
from model.layers import MIXERS, Mixer
from model.layers.layer import Context, Layer
from model.ops import FORMS, OPS
from train.verify.inputs import Case
from train.verify.random_networks import VOCABULARY, disturb
from train.verify.running import Function, Inputs, flatten, map_tensors, to_dtype
from train.verify.situations import (
    Situation,
    causality,
    lengths,
    prefill_then_steps,
    resets,
    rows,
    splitting,
)

BEFORE = 7
"""Tokens that leave the state behind from which a sequence goes on."""
LONGEST_CHUNK = 64
"""Where an op's chunks are longer, the lengths around C are only checked in full."""


@dataclass(frozen=True)
class NetworkSubject:
    """What a layer and a model have in common: parameters, and a state that tokens leave behind."""

    name: str
    own: nn.Module
    """In float64."""
    chunk_size: int
    modules: dict[torch.dtype, nn.Module] = field(default_factory=dict)
    states: dict[Case, Any] = field(default_factory=dict)
    """What the tokens before a case leave behind, which takes as long as a short case."""

    has_own_weights: bool = False
    forms = FORMS

    def module(self, dtype: torch.dtype) -> Any:
        """The module in that dtype."""
        if dtype not in self.modules:
            self.modules[dtype] = copy.deepcopy(self.own).to(dtype)
        return self.modules[dtype]

    def exceptions(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """A state has the dtype of its initial one: some are kept in float64 always."""
        state = flatten("state", self.module(dtype).initial_state(1))
        kinds = {name: x.dtype for name, x in state.items() if x.dtype != dtype}
        return {
            f"{kind}_{name}": x for name, x in kinds.items() for kind in ("final", "grad initial")
        }

    def against_largest(self, dtype: torch.dtype) -> float:
        """See the head of this file."""
        return 1e-4 if dtype == torch.float64 else 1.0

    def parameters(self, dtype: torch.dtype) -> Inputs:
        """Those that learn, by name."""
        named = self.own.named_parameters()
        return {n: x.detach().to(dtype) for n, x in named if x.requires_grad}

    def tokens(self, case: Case, dtype: torch.dtype) -> Inputs:
        """The inputs with a time axis, but for `reset`."""
        raise NotImplementedError

    def function(self, form: str, dtype: torch.dtype, chunk_size: int | None) -> Function:
        """One form."""
        raise NotImplementedError

    def inputs(self, case: Case, dtype: torch.dtype) -> Inputs:
        """Tokens, resets, all parameters, and a state that other tokens have left behind."""
        inputs = self.tokens(case, dtype)
        if case.reset:
            generator = torch.Generator().manual_seed(case.seed)
            reset = torch.rand(case.batch, case.time, generator=generator) < 0.06
            reset[-1, 0] = True
            reset[0, case.time // 2] |= case.time > 1
            inputs["reset"] = reset
        if case.state:
            kinds = iter(flatten("", self.module(dtype).initial_state(1)).values())
            state = self._state_before(case)
            inputs["initial_state"] = map_tensors(lambda x: x.to(next(kinds).dtype), state)
        return inputs | self.parameters(dtype)

    def _state_before(self, case: Case) -> Any:
        """A state that other tokens, with resets, have left behind, in float32."""
        before = replace(
            case, seed=case.seed + 100, scale=1.0, time=BEFORE, state=False, reset=True
        )
        if before not in self.states:
            recurrent = self.function("recurrent", torch.float64, None)
            with torch.no_grad():
                _, state = recurrent(**self.inputs(before, torch.float64))
            self.states[before] = to_dtype(state, torch.float32)
        return self.states[before]

    def situations(self, *, full: bool) -> list[Situation]:
        """The same for layers and models; lengths around a chunk only where they are not long."""
        raise NotImplementedError


@dataclass(frozen=True)
class LayerSubject(NetworkSubject):
    """A time mixer alone."""

    width: int = 0

    @classmethod
    def all_of(
        cls, name: str, kind: type[Layer], config: ModelConfig, op: str | None
    ) -> list["LayerSubject"]:
        """The second layer, and the first where it has other parameters."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            first, second = kind(config, 0), kind(config, 1)
        layers = {f"{name} layer": second}
        if {n for n, _ in first.named_parameters()} != {n for n, _ in second.named_parameters()}:
            layers[f"{name} layer, first"] = first
        subjects = []
        for part_name, layer in layers.items():
            layer = layer.double()
            disturb(layer)
            chunk = chunk_size_of(op)
            subjects.append(cls(part_name, layer, chunk, width=config.d_model))
        return subjects

    def tokens(self, case: Case, dtype: torch.dtype) -> Inputs:
        """`x [B, T, D]`, and the first layer's values for those layers that want them."""
        generator = torch.Generator().manual_seed(case.seed)
        shape = (case.batch, case.time, self.width)
        x = case.scale * torch.randn(shape, generator=generator)
        return {"x": x.to(dtype), "v_first": torch.randn(shape, generator=generator).to(dtype)}

    def function(self, form: str, dtype: torch.dtype, chunk_size: int | None) -> Function:
        """One form; chunks have the op's own size."""
        layer = self.module(dtype)

        def call(
            *,
            x: Tensor,
            v_first: Tensor,
            reset: Tensor | None = None,
            initial_state: Any = None,
            **parameters: Tensor,
        ) -> tuple[Tensor, Any]:
            state = layer.initial_state(x.shape[0]) if initial_state is None else initial_state
            context = Context(form, reset, v_first)
            result: tuple[Tensor, Any] = torch.func.functional_call(
                layer, parameters, (x, state, context)
            )
            return result

        return call

    def situations(self, *, full: bool) -> list[Situation]:
        """Lengths, arguments, strong inputs, and what holds for any sequence."""
        case = Case(state=True, reset=True)
        chunk = self.chunk_size
        times = [1, 2, chunk - 1, chunk, chunk + 1, 97, 1000]
        times = [t for t in times if full or t <= min(chunk + 1, LONGEST_CHUNK + 1)]
        found = lengths(case, [t for t in times if t > 2]) + lengths(Case(state=True), [1, 2])
        found += [
            Situation("arguments", f"{name}, T = 37", replace(other, time=37))
            for name, other in {"no state, no reset": Case(), "no reset": Case(state=True)}.items()
        ]
        found.append(
            Situation("large inputs", "x twice as large, T = 37", replace(case, time=37, scale=2.0))
        )
        return found + contract(replace(case, time=37), full=full)


@dataclass(frozen=True)
class ModelSubject(NetworkSubject):
    """A whole model."""

    vocab_size: int = VOCABULARY

    @classmethod
    def random(cls, name: str, mixer: Mixer, config: ModelConfig) -> "ModelSubject":
        """A small model with random weights; its mixer must have a seat."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LanguageModel(config).double()
        disturb(model)
        return cls(f"{name} model", model, chunk_size_of(mixer.op))

    @classmethod
    def of(cls, name: str, model: LanguageModel) -> "ModelSubject":
        """A model with its own weights."""
        chunk = chunk_size_of(MIXERS[model.config.mixer].op)
        vocab_size = model.config.vocab_size
        return cls(
            f"{name} model",
            copy.deepcopy(model).double(),
            chunk,
            has_own_weights=True,
            vocab_size=vocab_size,
        )

    def tokens(self, case: Case, dtype: torch.dtype) -> Inputs:
        """`[B, T]`."""
        generator = torch.Generator().manual_seed(case.seed)
        shape = (case.batch, case.time)
        return {"tokens": torch.randint(self.vocab_size, shape, generator=generator)}

    def function(self, form: str, dtype: torch.dtype, chunk_size: int | None) -> Function:
        """One form; chunks have the op's own size."""
        model = self.module(dtype)

        def call(
            *,
            tokens: Tensor,
            reset: Tensor | None = None,
            initial_state: Any = None,
            **parameters: Tensor,
        ) -> tuple[Tensor, Any]:
            logits, state = torch.func.functional_call(
                model, parameters, (tokens, initial_state, form, reset)
            )
            return logits, state

        return call

    def situations(self, *, full: bool) -> list[Situation]:
        """The forms over more than a chunk, what holds for any sequence, and bfloat16."""
        time = min(self.chunk_size, LONGEST_CHUNK) + 6
        case = Case(state=True, reset=True, time=time)
        found = [Situation("forms", f"state and resets, T = {time}", case)]
        if full:
            found += lengths(case, [3, 97, 257])  # the layers alone have the longer ones
            found.append(Situation("forms", f"no state, T = {time}", Case(time=time)))
        found.append(
            Situation(
                "logits",
                f"T = {time}",
                replace(case, state=False),
                compared=lambda results: {"o": results["o"]},
                gradients=False,
                dtypes=(torch.bfloat16,),
            )
        )
        return found + contract(replace(case, time=37 if full else 20), full=full)


def contract(case: Case, *, full: bool) -> list[Situation]:
    """What holds for any sequence: cuts, continuation, time, rows, documents."""
    last = case.time - 8
    return [
        *splitting(case, 4 if full else 1, steps=6 if full else 3),
        prefill_then_steps(case, 4 if full else 2),
        *causality(case, [1, last] if full else [last]),
        rows(replace(case, batch=3 if full else 2)),
        rows(case, poison=("initial_state",)),
        resets(case, (1, 9, 10)),
        *([resets(case, (0, last))] if full else []),
    ]


def chunk_size_of(op: str | None) -> int:
    """C of an op's chunked form; 64 where it is unknown."""
    if op not in OPS:
        return 64
    parameter = inspect.signature(OPS[op].chunked).parameters.get("chunk_size")
    return int(parameter.default) if parameter is not None else 64
