"""The native step of one token: against the PyTorch path, format by format, and as a value."""

import dataclasses

import pytest
import torch
from model_helpers import (
    assert_close,
    assert_states_close,
    random_model,
    random_tokens,
    same_bits,
    small_config,
)

from model import decode
from model import state as states
from model.decode import Decoder, Engine, engine_for, with_rounded_weights
from model.generation import Generation, generate, prefill, step
from model.layers import MIXERS
from model.layers.layer import Layer
from model.layers.rwkv7 import RWKV7, RWKV7Options
from model.ops import native
from model.ops.native.loading import INSTRUCTION_SETS, library
from model.ops.native.packing import FORMATS, pack, rounded
from model.sampling import Sampling
from model.state import map_tensors

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.status())

DESCRIBED = sorted(
    name for name, row in MIXERS.items() if row.time_mix.describe_step is not Layer.describe_step
)
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-5, "int8": 2e-3, "int4": 2e-3}
"""Of the largest logit. Integers are multiplied with activations in 15 bits."""
SHAPES = {
    "small": {},
    "whole tiles": {"d_model": 128, "head_dim": 64, "vocab_size": 96},
    "narrow heads": {"d_model": 96, "head_dim": 16, "num_layers": 2},
    "nothing even": {"d_model": 45, "head_dim": 5, "vocab_size": 37, "ffn_dim": 51},
    "one layer": {"num_layers": 1, "d_model": 48, "head_dim": 48},
}
EVEN = {"d_model": 42, "head_dim": 6}
"""For mixers that cut heads in two, in place of "nothing even"."""
GREEDY = Sampling(temperature=0)


def single(config, seed=0):
    return random_model(config, seed, torch.float32).eval()


def reference(model, weights, tokens):
    """Logits `[T, vocab]` and final state of the rounded model in float64, token by token."""
    with torch.no_grad():
        output = with_rounded_weights(model, weights).double()(tokens, form="recurrent")
    return output.logits[0], output.state


def decoded(engine, model, tokens):
    """The same from the native step."""
    decoder = Decoder(engine, model.initial_state(1))
    logits = torch.cat([decoder.step(token) for token in tokens[0].tolist()])
    return logits, decoder.state


def in_single(state):
    return map_tensors(lambda x: x.float() if x.is_floating_point() else x, state)


def assert_native(model, weights, tokens):
    """The native step gives the logits and the state of the rounded model."""
    expected, state = reference(model, weights, tokens)
    logits, native_state = decoded(Engine(model, weights), model, tokens)
    assert_close(logits, expected.float(), TOLERANCE[weights], "logits")
    assert_states_close(native_state, in_single(state), TOLERANCE[weights])


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mixer", DESCRIBED)
def test_the_native_step_is_that_of_the_rounded_model(mixer, shape, weights):
    shapes = SHAPES[shape]
    if shape == "nothing even" and mixer in ("gla", "retnet", "mamba2"):
        shapes = {"vocab_size": 37, **EVEN}
    # A head near zero under a norm with a small eps magnifies the rounding of activations.
    config = small_config(mixer, calm=weights.startswith("int"), **shapes)
    assert_native(single(config), weights, random_tokens(1, 12, vocab=config.vocab_size))


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", INSTRUCTION_SETS[:-1])
def test_plainer_instruction_sets_give_the_same(name, weights):
    before = library().instruction_set()
    try:
        library().use_instruction_set(name)
        for shape in ("whole tiles", "nothing even"):
            config = small_config("rwkv7", **SHAPES[shape])
            assert_native(single(config), weights, random_tokens(1, 6, vocab=config.vocab_size))
    finally:
        library().use_instruction_set(before)


def test_low_ranks_of_any_size_and_weights_that_nothing_uses():
    ranks = dict(
        zip(("decay_rank", "iclr_rank", "value_rank", "gate_rank"), (5, 33, 17, 64), strict=True)
    )
    options = RWKV7Options(group_norm_eps=1, first_value_residual=True, **ranks)
    model = single(small_config("rwkv7", options=options))
    for weights in FORMATS:
        assert_native(model, weights, random_tokens(1, 5))


@pytest.mark.parametrize("weights", FORMATS)
def test_any_number_of_threads_gives_the_same_bits(weights):
    model, tokens = single(small_config("rwkv7", d_model=96, head_dim=16)), random_tokens(1, 8)
    engine, results = Engine(model, weights), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(decoded(engine, model, tokens))
    for logits, state in results[1:]:
        assert torch.equal(logits, results[0][0])
        assert same_bits(state, results[0][1])


@pytest.mark.parametrize("mixer", DESCRIBED)
def test_greedy_tokens_are_those_of_pytorch(mixer, monkeypatch):
    count = 1000 if mixer == "rwkv7" else 100
    model = single(small_config(mixer, d_model=64, head_dim=32, vocab_size=300))
    texts = []
    for reason in ("", "PyTorch is meant"):
        monkeypatch.setattr(decode, "why_not", lambda _, reason=reason: reason)
        decode.forget(model)
        run = generate(model, [[1, 2, 3]], max_tokens=count, sampling=GREEDY)
        texts.append([token for (token,) in run])
        assert (run._decoder is None) == bool(reason)
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1


# A state is a value.


def test_a_step_changes_no_state_and_equals_a_decoder():
    model = single(small_config("rwkv7"))
    _, state = prefill(model, torch.tensor([[1, 2, 3]]))
    kept, decoder = states.clone(state), Decoder(engine_for(model), state)
    first, after = step(model, torch.tensor([4]), state)
    assert torch.equal(decoder.step(4), first)
    assert same_bits(state, kept)
    assert same_bits(decoder.state, after)
    again, _ = step(model, torch.tensor([4]), state)
    assert torch.equal(first, again)


def test_a_decoders_state_is_a_branch_and_can_be_saved(tmp_path):
    model = single(small_config("rwkv7"))
    decoder = Decoder(engine_for(model), model.initial_state(1))
    decoder.step(1)
    branch = decoder.state
    kept, expected = states.clone(branch), decoder.step(2)
    assert same_bits(branch, kept)
    states.save(branch, tmp_path / "state", model.fingerprint())
    loaded = states.load(tmp_path / "state", model.initial_state(1), model.fingerprint())
    assert torch.equal(Decoder(engine_for(model), loaded).step(2), expected)
    logits, _ = prefill(model, torch.tensor([[2]]), loaded)
    assert_close(logits.detach(), expected, 1e-5)


def test_states_that_are_parts_of_others_are_read_rightly():
    model = single(small_config("rwkv7"))
    _, both = prefill(model, torch.tensor([[1, 2], [3, 4]]))
    for row in (0, 1):
        view = map_tensors(lambda x, row=row: x.mT.contiguous().mT[row : row + 1], both)
        expected, _ = step(model, torch.tensor([5]), states.select_rows(both, [row]))
        actual, _ = step(model, torch.tensor([5]), view)
        assert torch.equal(actual, expected)


def test_a_generation_that_ended_keeps_its_state():
    model = single(small_config("rwkv7"))
    tokens = [t for (t,) in generate(model, [[1]], max_tokens=9, sampling=GREEDY)]
    run = generate(model, [[1]], max_tokens=9, sampling=GREEDY, stop_ids=[tokens[3]])
    drawn = [token for (token,) in run]
    assert drawn == tokens[: tokens.index(tokens[3]) + 1]
    logits, state = prefill(model, torch.tensor([[1, *drawn]]))
    assert_close(run.logits, logits.detach(), 1e-5)
    assert_states_close(run.state, map_tensors(torch.detach, state), 1e-5)


# When it is used, and when not.


def changed_in_place(model):
    model.head.weight.data.mul_(2.0)
    model.head.weight.add_(0.0)


def replaced(model):
    model.head.weight = torch.nn.Parameter(2 * model.head.weight)


def with_another_head(model):
    head = torch.nn.Linear(*reversed(model.head.weight.shape), bias=False)
    head.weight.copy_(2 * model.head.weight)
    model.head = head


def loaded(model):
    weights = {n: x * (2 if n == "head.weight" else 1) for n, x in model.state_dict().items()}
    model.load_state_dict(weights)


@torch.no_grad()
@pytest.mark.parametrize("change", [changed_in_place, replaced, with_another_head, loaded])
def test_a_changed_model_is_packed_anew(change):
    model = single(small_config("rwkv7"))
    token, state = torch.tensor([1]), model.initial_state(1)
    before, _ = step(model, token, state)
    engine = engine_for(model)
    assert engine_for(model) is engine
    change(model)
    assert_close(step(model, token, state)[0], 2 * before, 1e-6)
    assert engine_for(model) is not engine


class Louder(RWKV7):
    def forward(self, x, state, context):
        y, state = super().forward(x, state, context)
        return 2 * y, state


def hooked(model):
    model.blocks[1].time_mix.register_forward_hook(lambda _, __, result: result)


def louder(model):
    model.blocks[1].time_mix.__class__ = Louder


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked, "has a hook"),
        (louder, "Louder has no description"),
        (lambda model: model.double(), "float32 on the CPU"),
        (lambda model: model.bfloat16(), "float32 on the CPU"),
    ],
)
def test_models_that_it_does_not_know_run_in_pytorch(change, reason):
    model = single(small_config("rwkv7"))
    change(model)
    state, token = model.initial_state(1), torch.tensor([1])
    assert decode.engine_if_any(model, state) is None
    expected = model(token[:, None], state, form="recurrent").logits[0].detach()
    assert torch.equal(step(model, token, state)[0], expected)
    with pytest.raises(ValueError, match=reason):
        generate(model, [[1]], max_tokens=1, weights="int8")


def test_without_compiled_kernels_pytorch_decodes_and_integers_are_refused(monkeypatch):
    model = single(small_config("rwkv7"))
    expected = list(generate(model, [[1]], max_tokens=20, sampling=GREEDY))
    decode.forget(model)
    monkeypatch.setattr(native, "is_available", lambda: False)
    monkeypatch.setattr(native, "status", lambda: "no compiled kernels")
    run = generate(model, [[1]], max_tokens=20, sampling=GREEDY)
    assert run._decoder is None
    assert list(run) == expected
    with pytest.raises(ValueError, match="no native step: no compiled kernels"):
        generate(model, [[1]], max_tokens=1, weights="int4")


def test_many_texts_run_in_pytorch_and_take_no_other_weights():
    model = single(small_config("rwkv7"))
    assert decode.engine_if_any(model, model.initial_state(2)) is None
    with pytest.raises(ValueError, match="one text at a time, not for 2"):
        generate(model, [[1], [2]], max_tokens=1, weights="bf16")
    with pytest.raises(ValueError, match="weights must be one of fp32, bf16, int8, int4"):
        generate(model, [[1]], max_tokens=1, weights="int2")


@pytest.mark.parametrize("token", [-1, 29])
def test_tokens_outside_the_vocabulary_are_refused(token):
    model = single(small_config("rwkv7"))
    with pytest.raises(ValueError, match=f"token {token} lies outside"):
        step(model, torch.tensor([token]), model.initial_state(1))


@pytest.mark.parametrize("weights", FORMATS)
def test_weights_that_are_no_numbers_show(weights):
    model = single(small_config("rwkv7"))
    with torch.no_grad():
        model.blocks[1].channel_norm.weight[3] = torch.nan
    logits, state = torch.zeros(1, 29), model.initial_state(1)
    run = Generation(
        model,
        logits,
        state,
        max_tokens=5,
        sampling=GREEDY,
        generators=[torch.Generator()],
        weights=weights,
    )
    next(run)
    with pytest.raises(ValueError, match="not finite"):
        next(run)


# Rounding.


@pytest.mark.parametrize(("weights", "bits"), [*zip(FORMATS, (32, 16, 8.5, 4.5), strict=True)])
def test_bits_and_errors_of_a_format(weights, bits):
    matrix = torch.randn(64, 96) * torch.logspace(-6, 2, 64)[:, None]
    packed = pack(matrix, weights)
    stored = packed.values.nbytes + (0 if packed.scales is None else packed.scales.nbytes)
    assert 8 * stored == bits * matrix.numel()
    error = (rounded(matrix, weights) - matrix).abs().unflatten(1, (-1, 32))
    largest = matrix.abs().unflatten(1, (-1, 32)).amax(-1, keepdim=True)
    most = {"fp32": 0.0, "bf16": 2**-8, "int8": 0.51 / 127, "int4": 1.02 / 8}[weights]
    assert (error <= most * largest).all()
    assert weights == "fp32" or error.any()


@pytest.mark.parametrize("weights", FORMATS)
def test_zeros_stay_zeros_and_rounding_copies(weights):
    assert not rounded(torch.zeros(3, 40), weights).any()
    model = single(small_config("rwkv7"))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    copied = with_rounded_weights(model, weights)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    same = {n for n, x in copied.state_dict().items() if torch.equal(x, before[n])}
    assert "embedding.weight" in same
    assert ("head.weight" in same) == (weights == "fp32")
    assert ("blocks.1.time_mix.decay.down" in same) == (weights == "fp32")


def test_four_bits_are_not_for_low_ranks():
    model = single(small_config("rwkv7"))
    int8, int4 = (with_rounded_weights(model, w).state_dict() for w in ("int8", "int4"))
    assert torch.equal(int8["blocks.0.time_mix.gate.up"], int4["blocks.0.time_mix.gate.up"])
    assert not torch.equal(int8["head.weight"], int4["head.weight"])


def test_an_engine_keeps_no_model_alive():
    model = single(dataclasses.replace(small_config("rwkv7"), num_layers=1))
    engine_for(model)
    before = len(decode._ENGINES)
    del model
    assert len(decode._ENGINES) == before - 1
