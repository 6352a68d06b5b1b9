"""The fused pieces between the recurrences are their definitions, in values and all gradients."""

import pytest
import torch
from helpers import TOLERANCE, assert_close
from marks import needs_kernels

from model.ops import elementwise, fused, native
from model.ops.native import loading
from model.ops.native.rows import PARAMETERS, rows, rows_backward

SHAPES = [(2, 37, 3, 8), (1, 70, 1, 13), (3, 33, 2, 64), (1, 1, 2, 16)]
"""B, T, H and K: whole vectors and parts, heads wider and narrower, within a block and across."""


class Inputs:
    """Random tensors of some B, T, H and K."""

    def __init__(self, shape, seed=0):
        self.batch, self.time, self.heads, self.head_dim = shape
        self.width = self.heads * self.head_dim
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def rows(self):
        return self.normal(self.batch, self.time, self.width)

    def parameter(self):
        return self.normal(self.width)

    def by_head(self):
        return self.rows().view(self.batch, self.time, self.heads, self.head_dim)

    def reset(self):
        """At the first token, the last, either side of a block's end, and here and there."""
        found = torch.rand(self.batch, self.time, generator=self.generator) < 0.1
        found[0, [0, -1]] = True
        found[:, 31:33] = True
        return found


def shift(x, reset):
    tensors = [x.rows(), x.normal(x.batch, x.width), x.normal(6, x.width)]
    starts = x.reset() if reset else None
    return tensors, lambda room: lambda *given: room.interpolations(*given, starts)


def varied_shift(x, reset):
    tensors = [x.rows(), x.normal(x.batch, x.width), x.normal(5, x.width)]
    tensors += [x.rows() for _ in range(5)]
    starts = x.reset() if reset else None

    def of(room):
        def piece(token, last, mix, *offsets):
            return room.varied_interpolations(token, last, mix, offsets, starts)

        return piece

    return tensors, of


def convolution(x, size, has_bias, reset):
    tensors = [x.rows(), x.normal(x.batch, size - 1, x.width), x.normal(size, x.width)]
    tensors += [x.parameter() for _ in range(has_bias)]
    starts = x.reset() if reset else None

    def of(room):
        def piece(*given):
            bias = given[3] if has_bias else None
            return [room.short_convolution(*given[:3], bias, starts)]

        return piece

    return tensors, of


def head_rms_norm(x, has_gate):
    tensors = [x.by_head(), x.normal(x.head_dim)] + [x.rows() for _ in range(has_gate)]

    def of(room):
        def piece(o, weight, *gate):
            return [room.head_rms_norm(o, weight, 1e-5, *gate)]

        return piece

    return tensors, of


def skip_norm(x):
    tensors = [x.by_head(), x.by_head(), x.rows(), x.normal(x.heads), x.parameter()]
    return tensors, lambda room: lambda *given: [room.skip_norm(*given, 1e-6)]


def scaled_heads(x):
    tensors = [x.by_head(), x.normal(x.batch, x.time, x.heads)]
    return tensors, lambda room: lambda *given: [room.scaled_heads(*given)]


def rwkv7_inputs(x, is_first):
    names = ("decay_bias", "iclr_bias", "removal_scale", "iclr_scale")
    tensors = [x.rows() for _ in range(4)] + [x.parameter() for _ in names]
    if not is_first:
        tensors += [x.rows(), x.rows(), x.parameter()]

    def of(room):
        def piece(key, value, decay, iclr, *rest):
            found = room.rwkv7_inputs(
                key,
                value,
                decay,
                iclr,
                **dict(zip(names, rest[:4], strict=True)),
                residual=None if is_first else fused.ValueResidual(*rest[4:]),
                num_heads=x.heads,
            )
            return [*found][:4] if is_first else [*found]

        return piece

    return tensors, of


def gated_head_norm(x, has_own, silu):
    tensors = [x.by_head(), x.rows(), x.parameter(), x.parameter()]
    if has_own:
        tensors += [x.by_head(), x.by_head(), x.by_head(), x.normal(x.heads, x.head_dim)]

    def of(room):
        def piece(o, gate, weight, bias, *own):
            together = fused.OwnValue(*own) if own else None
            return [room.gated_head_norm(o, gate, weight, bias, 64e-5, own=together, silu=silu)]

        return piece

    return tensors, of


def norm(x, has_bias, of_sum):
    tensors = [x.rows() for _ in range(1 + of_sum)]
    tensors += [x.parameter() for _ in range(1 + has_bias)]

    def of(room):
        def piece(*given):
            vectors = (*given[1 + of_sum :], *(() if has_bias else (None,)), 1e-5)
            if of_sum:
                return [*room.norm_of_sum(*given[:2], *vectors)]
            return [room.norm(given[0], *vectors)]

        return piece

    return tensors, of


PIECES = {
    "shift": lambda x: shift(x, reset=False),
    "shift_reset": lambda x: shift(x, reset=True),
    "varied_shift": lambda x: varied_shift(x, reset=False),
    "varied_shift_reset": lambda x: varied_shift(x, reset=True),
    "convolution": lambda x: convolution(x, 4, has_bias=True, reset=False),
    "convolution_reset": lambda x: convolution(x, 4, has_bias=False, reset=True),
    "convolution_of_one": lambda x: convolution(x, 1, has_bias=True, reset=True),
    "convolution_wide": lambda x: convolution(x, 40, has_bias=True, reset=False),
    "head_rms": lambda x: head_rms_norm(x, has_gate=False),
    "head_rms_gate": lambda x: head_rms_norm(x, has_gate=True),
    "skip_norm": skip_norm,
    "scaled_heads": scaled_heads,
    "rwkv7_first": lambda x: rwkv7_inputs(x, is_first=True),
    "rwkv7": lambda x: rwkv7_inputs(x, is_first=False),
    "head_norm": lambda x: gated_head_norm(x, has_own=False, silu=False),
    "head_norm_own": lambda x: gated_head_norm(x, has_own=True, silu=False),
    "head_norm_silu": lambda x: gated_head_norm(x, has_own=False, silu=True),
    "squared_relu": lambda x: ([x.rows()], lambda room: lambda y: [room.squared_relu(y)]),
    "swiglu": lambda x: (
        [x.rows(), x.rows()],
        lambda room: lambda *given: [room.swiglu(*given)],
    ),
    "layer_norm": lambda x: norm(x, has_bias=True, of_sum=False),
    "layer_norm_sum": lambda x: norm(x, has_bias=True, of_sum=True),
    "rms_norm": lambda x: norm(x, has_bias=False, of_sum=False),
    "rms_norm_sum": lambda x: norm(x, has_bias=False, of_sum=True),
}
"""From inputs: tensors, and what makes of a module the function of these tensors."""
every_piece = pytest.mark.parametrize("name", PIECES)


def run(piece, tensors, dtype=torch.float64, change=lambda x: x):
    """Outputs and, under random cotangents, the gradients of all tensors, by name."""
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    outputs = piece(*(change(x) for x in leaves))
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        change(torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype))
        for x in outputs
    ]
    gradients = torch.autograd.grad(outputs, leaves, cotangents, materialize_grads=True)
    results = {f"output {n}": x.detach() for n, x in enumerate(outputs)}
    return results | {f"gradient {n}": x for n, x in enumerate(gradients)}


def check(name, shape, dtype, change=lambda x: x):
    tensors, of = PIECES[name](Inputs(shape))
    expected = run(of(elementwise), tensors)
    assert_close(run(of(fused), tensors, dtype, change), expected, dtype)


def calls(monkeypatch):
    """Counts how often a kernel runs from here on."""
    counted = []
    original = loading.Library.function

    def function(self, name, dtype):
        counted.append(name)
        return original(self, name, dtype)

    monkeypatch.setattr(loading.Library, "function", function)
    return counted


@needs_kernels
@every_piece
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_fused_piece_is_its_definition(name, shape, dtype, monkeypatch, poisoned_memory):
    counted = calls(monkeypatch)
    check(name, shape, dtype)
    assert counted.count("rows") == 2, "forward and backward, once each"


@pytest.fixture(params=native.loading.INSTRUCTION_SETS)
def instruction_set(request):
    library = native.library()
    before = library.instruction_set()
    if library.use_instruction_set(request.param) != request.param:
        pytest.skip("this processor has no such instructions")
    yield
    library.use_instruction_set(before)


@needs_kernels
@every_piece
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_plainer_processor_computes_the_same(name, dtype, instruction_set):
    check(name, SHAPES[0], dtype)


@needs_kernels
@every_piece
def test_threads_change_no_bit(name):
    tensors, of = PIECES[name](Inputs((2, 150, 4, 32)))
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(of(fused), tensors, torch.float32))
    assert all(torch.equal(x, results[1][key]) for key, x in results[0].items())


@needs_kernels
@every_piece
def test_tensors_need_not_be_contiguous(name):
    def spread(x):
        wide = torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
        return wide if x.dim() < 3 else wide.transpose(0, 1).contiguous().transpose(0, 1)

    check(name, SHAPES[0], torch.float64, spread)


@needs_kernels
@every_piece
def test_gradients_are_those_of_finite_differences(name):
    tensors, of = PIECES[name](Inputs((1, 3, 2, 5)))
    assert torch.autograd.gradcheck(of(fused), [x.requires_grad_() for x in tensors])


@needs_kernels
@every_piece
def test_the_forward_pass_alone_is_the_same(name, monkeypatch):
    tensors, of = PIECES[name](Inputs(SHAPES[0]))
    with_graph = of(fused)(*(x.clone().requires_grad_() for x in tensors))
    counted = calls(monkeypatch)
    alone = of(fused)(*tensors)
    assert counted == ["rows"]
    assert all(torch.equal(x, y) for x, y in zip(with_graph, alone, strict=True))


@needs_kernels
@every_piece
def test_only_what_is_asked_for_has_a_gradient(name):
    """Frozen parameters and a carried state have none; the others' are as before."""
    tensors, of = PIECES[name](Inputs(SHAPES[0]))
    everything = run(of(fused), tensors)
    first = tensors[0].clone().requires_grad_()
    outputs = of(fused)(first, *tensors[1:])
    generator = torch.Generator().manual_seed(1)
    shapes = [x.shape for x in outputs]
    cotangents = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    (gradient,) = torch.autograd.grad(outputs, [first], cotangents)
    assert torch.equal(gradient, everything["gradient 0"])


@every_piece
def test_without_the_library_the_definition_runs(name, monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "FOLDER", tmp_path)
    loading._load.cache_clear()
    try:
        assert not native.is_available()
        check(name, SHAPES[0], torch.float32)
    finally:
        loading._load.cache_clear()


@every_piece
def test_low_precision_takes_the_definition(name, monkeypatch):
    """In a bfloat16 region matrix products come in bfloat16, and parameters in float32."""
    counted = calls(monkeypatch)
    tensors, of = PIECES[name](Inputs(SHAPES[0]))
    low = name.startswith("rms")  # PyTorch's wants one precision
    mixed = [x.to(torch.bfloat16 if low or x.dim() > 2 else torch.float32) for x in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = of(fused)(*mixed), of(elementwise)(*mixed)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert counted == []


@needs_kernels
@pytest.mark.parametrize("size", [0.0, 1e-14, 1e3])
def test_a_removal_of_no_length_has_the_gradient_of_the_definition(size):
    """Below the smallest norm it is divided by a constant, at zero too."""
    tensors, of = PIECES["rwkv7"](Inputs(SHAPES[0]))
    tensors[0][:, ::2] *= size
    assert_close(run(of(fused), tensors), run(of(elementwise), tensors), torch.float64)


@needs_kernels
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sigmoids_saturate_and_nan_stays_nan(dtype):
    gate = torch.tensor([0.0, 1e-30, 20, 90, 1e4, -20, -90, -1e4, float("inf")], dtype=dtype)
    gate = torch.cat([gate, torch.linspace(-100, 100, 4001, dtype=dtype)])
    found = fused.swiglu(gate.view(1, 1, -1), torch.ones(1, 1, len(gate), dtype=dtype)).flatten()
    expected = gate.double() * torch.sigmoid(gate.double())
    finite = expected.isfinite()
    allowed = {torch.float32: 4e-7, torch.float64: 1e-15}[dtype]
    error = (found[finite].double() - expected[finite]).abs() / (expected[finite].abs() + 1e-29)
    assert error.max() <= allowed
    assert found[8] == torch.inf
    nan = torch.full((1, 1, 20), torch.nan, dtype=dtype)
    assert fused.swiglu(nan, torch.ones_like(nan)).isnan().all()
    assert fused.squared_relu(nan).isnan().all()


@needs_kernels
@every_piece
def test_a_compiler_sees_the_same(name):
    tensors, of = PIECES[name](Inputs(SHAPES[0]))
    through = torch.compile(of(fused), fullgraph=True, backend="aot_eager")
    assert_close(run(through, tensors), run(of(elementwise), tensors), torch.float64)


def samples():
    """Arguments of the operator, for each kernel."""
    x = Inputs((2, 5, 2, 4))
    lists = {
        "shift": [x.rows(), x.normal(x.batch, x.width), x.normal(3, x.width)],
        "rwkv7": [*(x.rows() for _ in range(3)), *(x.parameter() for _ in range(4))],
        "head_norm": [x.rows(), x.rows(), x.parameter(), x.parameter()],
        "squared_relu": [x.rows()],
        "swiglu": [x.rows(), x.rows()],
        "norm": [x.rows(), x.rows(), x.parameter(), x.parameter()],
        "convolution": [x.rows(), x.normal(2, 1, x.width), x.normal(2, x.width), x.parameter()],
        "head_rms": [x.rows(), x.normal(x.head_dim), x.rows()],
        "skip_norm": [*(x.rows() for _ in range(3)), x.normal(x.heads), x.parameter()],
        "head_scale": [x.rows(), x.normal(x.batch, x.time, x.heads)],
    }
    choices = {"norm": 1, "convolution": 2}
    assert lists.keys() == PARAMETERS.keys()
    starts = torch.rand(2, 5, generator=x.generator) < 0.3
    for kernel, tensors in lists.items():
        leaves = [y.requires_grad_() for y in tensors]
        reset = starts if kernel in ("shift", "convolution") else None
        yield (kernel, leaves, reset, 2, 1e-5, choices.get(kernel, 0))


@needs_kernels
@pytest.mark.parametrize("sample", [*samples()], ids=lambda sample: sample[0])
def test_pytorch_finds_nothing_wrong_with_the_operators(sample):
    kernel, tensors, reset, heads, eps, choice = sample
    torch.library.opcheck(rows, (kernel, tensors, reset, heads, eps, choice))
    outputs = [torch.ones_like(x) for x in rows(kernel, tensors, reset, heads, eps, choice)]
    given = [x.detach() for x in (tensors[1:] if kernel == "norm" else tensors)]
    torch.library.opcheck(rows_backward, (kernel, given, outputs, reset, heads, eps, choice))


@needs_kernels
def test_a_second_derivative_is_refused():
    x = torch.randn(1, 2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(fused.squared_relu(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(gradient.sum(), x)
