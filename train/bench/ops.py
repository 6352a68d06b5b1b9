"""The recurrences alone, in every form, forwards and backwards."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from model.ops import OPS, native
from train.bench.machine import Machine
from train.bench.rows import Row
from train.bench.tasks import GEMM, Budget
from train.benchmark import Measurement, take_turns, timed
from train.verify.inputs import Case, has_heads, make_inputs

HEADS, WIDTH = 8, 64
FORMS = {
    "native": ("chunked", "native"),
    "chunked": ("chunked", "torch"),
    "recurrent": ("recurrent", "torch"),
}
"""Form and backend."""


def measure_op(op: str, context: int, machine: Machine, budget: Budget) -> list[Row]:
    """One text of `context` tokens, eight heads; all forms of an op take turns.

    Peak memory is not measured: it would be that of the autograd tape, not of the form.
    """
    case = Case(
        decay="weak",
        batch=1,
        time=context,
        heads=HEADS,
        key_dim=WIDTH if has_heads(op) else HEADS * WIDTH,
        value_dim=WIDTH,
    ).reduced_to(op)
    inputs = make_inputs(op, case, torch.float32)
    runs: dict[Hashable, Callable[[], Sequence[float]]] = {
        form: timed(run) for form, run in _ways(op, inputs)
    }
    forms = list(runs)
    runs[GEMM] = machine.multiply
    found = take_turns(runs, rounds=budget.rounds, seconds=budget.seconds * len(forms))
    rows = []
    for form in forms:
        speed = Measurement.of([context / seconds for seconds in found[form]])
        flops = flops_per_token(op, context)
        if flops is not None and str(form).endswith("backward"):
            flops *= 3
        gflops = None if flops is None else 1e-9 * flops * speed.median
        rows.append(
            Row(
                task="ops",
                mixer=op,
                form=str(form),
                d_model=HEADS * WIDTH,
                num_layers=None,
                vocab_size=None,
                parameters=None,
                context=context,
                batch=1,
                weights=None,
                tokens_per_s=speed.median,
                tokens_per_s_low=speed.low,
                tokens_per_s_high=speed.high,
                gflops=gflops,
                fraction_of_gemm=None if gflops is None else gflops / median(found[GEMM]),
            )
        )
    return rows


def flops_per_token(op: str, context: int) -> int | None:
    """Of the defining equation, forwards; None for wkv4, whose exponentials are no such work.

    A product and its sum count as two: S = w S + k v^T, o = q S is 5 K V a head; with the
    removal b (a S) 9 K V; attention looks at half of the context, 2 (K + V) for each token of it.
    """
    if op == "wkv4":
        return None
    a_head = {"additive": 5 * WIDTH**2, "delta": 9 * WIDTH**2}
    return HEADS * a_head.get(op, 2 * 2 * WIDTH * (context + 1) // 2)


def _ways(op: str, inputs: dict[str, Any]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every form there is, forwards alone and with the backward pass."""
    leaves = {
        name: x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    wanted = [x for x in leaves.values() if isinstance(x, Tensor) and x.requires_grad]
    for name, (form, backend) in FORMS.items():
        if name == "native" and (OPS[op].native is None or not native.is_available()):
            continue
        run = OPS[op].form(form, backend)

        def forward(run: Callable[..., Any] = run) -> None:
            with torch.no_grad():
                run(**inputs)

        def backward(run: Callable[..., Any] = run) -> None:
            torch.autograd.grad(run(**leaves)[0].sum(), wanted)

        yield f"{name}, forward", forward
        yield f"{name}, forward and backward", backward
