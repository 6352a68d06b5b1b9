"""`torch.compile` sees through a whole block: no call in it that it cannot trace."""

import pytest
import torch
from model_helpers import random_model, small_config

from model.layers.layer import Context
from model.ops import native

needs_kernels = pytest.mark.skipif(
    not native.is_available(),
    reason="PyTorch's chunked form looks at the decays to plan its blocks",
)


@pytest.mark.parametrize(
    "mixer",
    [
        "attention",
        "rwkv4",
        *(pytest.param(m, marks=needs_kernels) for m in ("rwkv6", "rwkv7")),
    ],
)
def test_a_block_is_one_graph(mixer):
    model = random_model(small_config(mixer))
    block, state = model.blocks[1], model.initial_state(2)[1]
    generator = torch.Generator().manual_seed(2)
    x, v_first = torch.randn(2, 2, 20, 32, generator=generator, dtype=torch.float64)

    def run(x):
        return block(x, state, Context(form="chunked", v_first=v_first))[0]

    def with_gradient(function):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        return y.detach(), torch.autograd.grad(y.square().sum(), leaf)[0]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for found, expected in zip(with_gradient(compiled), with_gradient(run), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
