"""The native kernels: when and where they run, and what PyTorch sees of them.

That they compute what the other forms do is for the tests of all forms, which run them too.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from helpers import CASES, Case, assert_close, check_form, make_inputs, run, way
from marks import needs_kernels

from model.ops import OPS, native
from model.ops.native import loading
from model.ops.native.decays import decays_now
from model.ops.native.scan import scan_op
from model.ops.native.wkv4 import wkv4_op

ROOT = Path(__file__).parents[2]
NATIVE = ("additive", "delta", "wkv4")

every_op = pytest.mark.parametrize("op", NATIVE)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_where_there_is_a_compiler_there_are_kernels():
    assert native.is_available(), f"{native.status()}; pip install -e . again"


@pytest.fixture
def library_in(monkeypatch, tmp_path):
    """An empty folder, in which the compiled library is looked for."""
    monkeypatch.setattr(loading, "FOLDER", tmp_path)
    loading._load.cache_clear()
    yield tmp_path
    loading._load.cache_clear()


@every_op
def test_without_the_library_pytorch_runs(library_in, op):
    assert not native.is_available()
    assert native.status() == "no compiled kernels: install a C++ compiler and reinstall"
    check_form(OPS[op].form("chunked"), op, CASES["channel_decay"], torch.float64)
    with pytest.raises(ValueError, match="native kernels are not there: no compiled kernels: inst"):
        OPS[op].form("chunked", backend="native")
    with pytest.raises(ValueError, match="native kernels are not there"):
        OPS[op].native(**make_inputs(op, CASES["channel_decay"]))


def test_a_library_that_does_not_load_is_told_and_not_used(library_in):
    (library_in / f"_kernels{EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    assert not native.is_available()
    assert "the compiled kernels do not load" in native.status()
    assert native.status().endswith("reinstall")


def test_a_build_without_a_compiler_passes(tmp_path):
    try:
        version = int(metadata.version("setuptools").partition(".")[0])
    except metadata.PackageNotFoundError:
        version = 0
    if version < 77:
        pytest.skip("needs the setuptools of pyproject.toml")
    missing = str(tmp_path / "no-compiler")
    finished = subprocess.run(
        [
            *(sys.executable, "-c", "from setuptools import setup; setup()", "-q", "build_ext"),
            *(f"--build-lib={tmp_path}", f"--build-temp={tmp_path}"),
        ],
        env=os.environ | {"CC": missing, "CXX": missing},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert "no-compiler" in finished.stderr
    assert not [*tmp_path.rglob("*.so")]


@pytest.mark.parametrize("form", ["parallel", "recurrent"])
@every_op
def test_only_the_chunked_form_is_native(op, form):
    with pytest.raises(ValueError, match="native kernels only for the chunked form"):
        OPS[op].form(form, backend="native")
    with pytest.raises(ValueError, match="native kernels only for the chunked form"):
        OPS["attention"].form("chunked", backend="native")
    with pytest.raises(ValueError, match="backend must be one of auto, torch, native"):
        OPS[op].form(form, backend="cuda")


@needs_kernels
@every_op
def test_the_kernels_run_where_nothing_speaks_against_them(op):
    def runs_native(form, backend="auto", **more):
        inputs = make_inputs(op, CASES["channel_decay"])
        inputs["v"].requires_grad_()
        o, _ = OPS[op].form(form, backend)(**inputs | more)
        seen, todo = set(), [o.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in seen:
                seen.add(node)
                todo += [following for following, _ in node.next_functions]
        return any("ebb" in node.name().lower() for node in seen)

    assert runs_native("chunked")
    assert runs_native("chunked", "native")
    assert not runs_native("chunked", "torch")
    assert not runs_native("chunked", chunk_size=16)
    assert not runs_native("parallel")
    assert not runs_native("recurrent")


SHAPES = [(16, 16), (32, 32), (64, 64), (128, 128), (16, 128), (128, 16), (1, 1), (7, 80), (70, 9)]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("key_dim", "value_dim"), SHAPES, ids=str)
@every_op
def test_heads_of_every_size(op, key_dim, value_dim, dtype):
    case = replace(CASES["steady_reset"], key_dim=key_dim, value_dim=value_dim, time=35, scale=0.35)
    check_form(way(op, "native"), op, case.reduced_to(op), dtype)


@pytest.fixture(params=loading.INSTRUCTION_SETS)
def instruction_set(request):
    """Each that the machine has."""
    widest = native.library().instruction_set()
    chosen = native.library().use_instruction_set(request.param)
    yield request.param
    native.library().use_instruction_set(widest)
    if chosen != request.param:
        pytest.skip(f"the processor has no {request.param}")


PROCESSOR_CASES = ("reset_state", "head_mixed_reset", "infinite_reset", "bonus_mixed_reset")


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every_op
def test_every_processor_computes_the_same(op, dtype, instruction_set):
    for name in PROCESSOR_CASES:
        for key_dim, value_dim in ((32, 32), (7, 80)):
            case = replace(CASES[name], key_dim=key_dim, value_dim=value_dim, time=35)
            if case.applies_to(op):
                check_form(way(op, "native"), op, case, dtype)


@needs_kernels
@pytest.mark.parametrize("batch", [1, 3])
@every_op
def test_two_threads_compute_what_one_does(op, batch):
    """To the bit, unless one head is shared by two threads: they sum in another order."""
    case = Case(decay="weak", state=True, batch=batch, heads=1, key_dim=40, value_dim=150)
    inputs = make_inputs(op, case.reduced_to(op))
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(way(op, "native"), inputs))
    one, two = results
    if batch > 1:
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert_close(two, one, torch.float64)


@needs_kernels
def test_weak_decays_multiply_up_without_error():
    """The same rounding at each of many steps would cost digits."""
    for log_decay in (-1e-6, -1e-5, -1e-3, -0.01, -0.6):
        time = min(int(5 / -log_decay), 50_000)
        g = torch.full((1, time, 3), log_decay)
        exact = g.double().cumsum(dim=1)
        assert (decays_now(g).double().log().cumsum(dim=1) - exact).abs().max() < 5e-7
    g = torch.full((1, 50_000, 3), -1e-6)
    assert (g.exp().double().log() - g.double()).sum(dim=1).abs().max() > 1e-4
    strong = torch.tensor([-1.2, -20.0, -86.0, -200.0, -torch.inf]).view(1, 1, 5)
    torch.testing.assert_close(decays_now(strong), strong.exp())


def samples():
    """Arguments of each operator, with and without what may be left out."""
    x = make_inputs("delta", CASES["reset_state"])
    g = make_inputs("delta", CASES["channel_decay"])["log_decay"].requires_grad_()
    q, k, v, a, b = (x[name].requires_grad_() for name in "qkvab")
    state, u = x["initial_state"], torch.randn(2, 8, dtype=torch.float64)
    yield scan_op, (q, k, v, a, b, g, None, x["reset"], state, 0.5, True)
    yield scan_op, (q, k, v, None, None, g, u.requires_grad_(), None, None, 1.0, True)
    yield scan_op, (*(y.detach() for y in (q, k, v)), *[None] * 6, 1.0, False)
    x = make_inputs("wkv4", CASES["reset_state"])
    tensors = [x[name].requires_grad_() for name in ("k", "v", "log_decay", "bonus")]
    yield wkv4_op, (*tensors, x["reset"], *x["initial_state"], True)


@needs_kernels
@pytest.mark.parametrize("number", range(4))
def test_pytorch_finds_nothing_wrong_with_the_operators(number):
    operator, arguments = [*samples()][number]
    torch.library.opcheck(operator, arguments)


@needs_kernels
@every_op
def test_a_compiler_sees_through_them(op):
    inputs = make_inputs(op, CASES["steady_reset"])
    function = torch.compile(OPS[op].native, backend="aot_eager", fullgraph=True)
    try:
        assert_close(run(function, inputs), run(OPS[op].native, inputs), torch.float64)
    finally:
        torch.compiler.reset()


@needs_kernels
@every_op
def test_a_tensor_elsewhere_is_refused(op):
    inputs = make_inputs(op, CASES["channel_decay"])
    inputs["v"] = inputs["v"].to("meta")
    with pytest.raises(ValueError, match="need all tensors on the CPU, not on meta"):
        OPS[op].native(**inputs)


@needs_kernels
@every_op
def test_a_second_derivative_is_refused(op):
    inputs = make_inputs(op, CASES["channel_decay"])
    v = inputs["v"].requires_grad_()
    o, _ = OPS[op].native(**inputs)
    k = inputs["k"].requires_grad_()
    o, _ = OPS[op].native(**inputs)
    (gradient,) = torch.autograd.grad(o.square().sum(), k, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'no second derivative.* backend="torch"'):
        torch.autograd.grad(gradient.sum(), v)
