"""Products in bfloat16: where they are chosen, what they change and what they leave alone."""

import contextlib

import pytest
import torch
from helpers import assert_close
from marks import needs_kernels, needs_tiles
from model_helpers import small_config
from runs import TINY, ebb, metrics

from model.language_model import Block, LanguageModel
from model.layers import MIXERS
from model.ops import OPS, attention, native
from model.ops.flash import flash
from model.ops.native import rows
from model.ops.products import is_rounded
from train import find_rate, optimizer, precision
from train.loss import next_token_loss
from train.precision import CPU, bf16_products, both_passes, choose_precision

GPU = torch.device("cuda")


def named(o, gradients):
    return {"o": o.detach(), **dict(zip("qkv", gradients, strict=True))}


@pytest.fixture
def without_tiles(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})


@needs_kernels
def test_auto_is_bf16_where_there_are_tiles(monkeypatch):
    for tiles, expected in [({"amx_bf16": True}, "bf16"), ({"amx_bf16": False}, "fp32")]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda tiles=tiles: tiles)
        assert choose_precision("auto", CPU) == expected
        assert choose_precision("fp32", CPU) == "fp32"
        assert choose_precision("bf16", CPU) == "bf16"


def test_auto_is_fp32_without_kernels(monkeypatch):
    """Else the products within the recurrences would be rounded, decays and all."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    with native.switched(on=False):
        assert choose_precision("auto", CPU) == "fp32"


@needs_tiles
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_recurrences_are_not_rounded(backend):
    """Nor are their gradients, on either backend."""
    torch.manual_seed(3)
    tensors = [x.requires_grad_() for x in torch.randn(3, 2, 70, 2, 16).unbind()]
    recurrence = OPS["additive"].form("chunked", backend)

    def run(*, bf16):
        outputs = []

        def loss_of():
            outputs.append(recurrence(*tensors)[0])
            return outputs[0].square().sum()

        for tensor in tensors:
            tensor.grad = None
        both_passes(loss_of, CPU, bf16=bf16)
        return named(outputs[0], [x.grad for x in tensors])

    exact = run(bf16=False)
    with native.switched(on=backend == "native"):
        found = run(bf16=True)
    assert_close(found, exact, torch.float32)


def test_auto_is_fp32_on_other_processors(monkeypatch):
    """Those of other makers list other capabilities."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "aarch64"})
    assert choose_precision("auto", CPU) == "fp32"


@pytest.mark.parametrize("supported", [True, False])
def test_auto_on_a_gpu_does_not_ask_the_cpu(monkeypatch, supported):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    monkeypatch.setattr(precision, "has_bf16_tiles", lambda: not supported)
    assert choose_precision("auto", GPU) == ("bf16" if supported else "fp32")


def gradients(mixer, *, bf16):
    """Loss and gradients of a batch."""
    torch.manual_seed(0)
    model = LanguageModel(small_config(mixer))
    tokens = torch.randint(model.config.vocab_size, (4, 65))
    loss = both_passes(
        lambda: next_token_loss(model, tokens[:, :-1], tokens[:, 1:]), CPU, bf16=bf16
    )
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def check_near(mixer):
    """Rounded somewhere, and nowhere by more than bfloat16's 8 bits bring about in a few layers."""
    loss, found = gradients(mixer, bf16=True)
    exact_loss, exact = gradients(mixer, bf16=False)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(exact_loss), rel=2e-3)
    assert any(not torch.equal(found[name], exact[name]) for name in exact)
    for name, gradient in exact.items():
        assert found[name].dtype == torch.float32
        error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < 0.05, name


@needs_tiles
@pytest.mark.parametrize("mixer", MIXERS)
def test_gradients_are_near_those_in_float32(mixer):
    check_near(mixer)


@pytest.mark.parametrize("mixer", ["rwkv7", "attention"])
def test_gradients_are_near_those_in_float32_without_tiles(mixer, without_tiles):
    """By autocast, as on a GPU."""
    check_near(mixer)


@needs_tiles
def test_products_are_exact_again_afterwards():
    """Of whatever happens in a step: validation and samples are in float32."""
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    exact = a @ b
    with contextlib.suppress(ZeroDivisionError), bf16_products(CPU, enabled=True):
        assert not torch.equal(a @ b, exact)
        raise ZeroDivisionError
    assert torch.equal(a @ b, exact)
    with bf16_products(CPU, enabled=False):
        assert torch.equal(a @ b, exact)


@needs_tiles
@pytest.mark.parametrize("form", ["parallel", "chunked"])
@pytest.mark.parametrize("packed", [False, True])
def test_scores_of_attention_are_products_too(form, packed, monkeypatch):
    monkeypatch.setattr(attention, "ROUNDED_FROM", 40)
    torch.manual_seed(1)
    q, k, v = torch.randn(3, 2, 40, 2, 16).unbind()
    reset = torch.zeros(2, 40, dtype=torch.bool)
    reset[:, 17] = True
    attend = OPS["attention"].form(form)
    exact, _ = attend(q, k, v, reset=reset if packed else None)
    with bf16_products(CPU, enabled=True):
        rounded, cache = attend(q, k, v, reset=reset if packed else None)
    assert rounded.dtype == cache.key.dtype == cache.value.dtype == torch.float32
    assert torch.equal(cache.key, k)
    assert 1e-4 < (rounded - exact).abs().max() / exact.abs().max() < 2e-2


@needs_tiles
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("scale", [0.25, -0.25])
def test_scores_of_short_texts_are_exact(scale, packed):
    """There the kernel is slower in bfloat16, and slow where PyTorch rounds what it multiplies."""
    torch.manual_seed(2)
    tensors = [x.requires_grad_() for x in torch.randn(3, 2, 40, 2, 16).unbind()]
    attend = OPS["attention"].form("chunked")
    reset = torch.arange(40).expand(2, 40) % 17 == 5 if packed else None

    def run():
        o, _ = attend(*tensors, scale=scale, reset=reset, chunk_size=24)
        return named(o, torch.autograd.grad(o.square().sum(), tensors))

    exact = run()
    with bf16_products(CPU, enabled=True):
        assert_close(run(), exact, torch.float32)


@needs_tiles
def test_rows_of_attention_may_lie_apart():
    """The kernel reads on from wherever a row begins."""
    torch.manual_seed(4)
    tensors = [x[..., ::2].requires_grad_() for x in torch.randn(3, 1, 8, 2, 32).unbind()]
    exact, _ = OPS["attention"].form("recurrent")(*tensors)
    with bf16_products(CPU, enabled=True):
        found, _ = OPS["attention"].form("chunked")(*tensors)
    assert_close({"o": found}, {"o": exact}, torch.float32)


@pytest.mark.parametrize("masked", [False, True])
def test_the_kernel_of_attention_is_an_operator_like_any_other(masked):
    q, k, v = (x.transpose(1, 2) for x in torch.randn(3, 2, 9, 3, 8).unbind())
    mask = torch.zeros(2, 1, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    arguments = (q.requires_grad_(), k, v, mask if masked else None, 0.3)
    torch.library.opcheck(flash, arguments)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    assert_close({"o": flash(*arguments)[0]}, {"o": expected}, torch.float32)


@needs_tiles
def test_other_precisions_of_attention_are_left_alone():
    """float64, for checks."""
    q, k, v = torch.randn(3, 1, 9, 2, 16, dtype=torch.float64).unbind()
    attend = OPS["attention"].form("parallel")
    exact, _ = attend(q, k, v)
    with bf16_products(CPU, enabled=True):
        assert torch.equal(attend(q, k, v)[0], exact)


@pytest.fixture
def flags(workshop):
    return [
        *("train", "--data", workshop / "text.txt", *TINY, "--mixer", "rwkv7"),
        *("--steps", "4", "--sample-every", "0", "--log-every", "1", "--eval-every", "2"),
    ]


@needs_tiles
def test_a_run_multiplies_in_bf16_unless_told_otherwise(flags, tmp_path, capsys):
    for name, more in [("auto", []), ("bf16", ["--precision", "bf16"])]:
        assert ebb(*flags, *more, "--out", tmp_path / name) == 0
        assert "1 threads, bf16 ->" in " ".join(capsys.readouterr().err.split())
    assert ebb(*flags, "--precision", "fp32", "--out", tmp_path / "fp32") == 0
    assert "1 threads, fp32 ->" in " ".join(capsys.readouterr().err.split())
    losses = {
        name: [line["loss"] for line in metrics(tmp_path / name) if "loss" in line]
        for name in ("auto", "bf16", "fp32")
    }
    assert losses["auto"] == losses["bf16"] != losses["fp32"]
    assert losses["auto"] == pytest.approx(losses["fp32"], rel=5e-3)


@needs_tiles
@pytest.mark.parametrize("finding", [False, True])
def test_both_passes_and_the_optimiser_round(flags, tmp_path, monkeypatch, finding):
    """In a run, and where its rate is looked for."""
    seen = {}

    def spy(name, function):
        def spied(*args):
            seen.setdefault(name, set()).add(is_rounded(torch.zeros(1)))
            return function(*args)

        return spied

    monkeypatch.setattr(Block, "forward", spy("forward", Block.forward))
    monkeypatch.setattr(rows, "rows_backward_now", spy("backward", rows.rows_backward_now))
    monkeypatch.setattr(optimizer, "orthogonalized", spy("muon", optimizer.orthogonalized))
    monkeypatch.setattr(find_rate, "STEPS", 12)
    more = ["--find-lr"] if finding else ["--eval-every", "100"]
    assert ebb(*flags, "--optimizer", "muon", *more, "--out", tmp_path / "run") == 0
    assert seen.pop("forward") == ({True} if finding else {True, False}), "validation is exact"
    assert seen == {"backward": {True}, "muon": {True}}
