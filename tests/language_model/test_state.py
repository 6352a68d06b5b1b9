"""A state is a value: saved and loaded, split and joined by rows, and of known size."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from model_helpers import (
    ALL_MIXERS,
    FORMS,
    assert_close,
    assert_states_close,
    random_model,
    random_tokens,
    resets_at,
    same_bits,
    small_config,
)
from safetensors.torch import load_file, save_file

from model import state as states
from model.layers import MIXERS

mixers = pytest.mark.parametrize("mixer", ALL_MIXERS)


@pytest.fixture
def model(mixer):
    return random_model(small_config(mixer), dtype=torch.float32)


def saved(model, path: Path, batch: int = 2, time: int = 9) -> states.ModelState:
    state = model(random_tokens(batch, time)).state
    states.save(state, path, model.fingerprint())
    return state


@mixers
@torch.no_grad()
def test_saved_state_continues_to_the_bit(model, mixer, tmp_path):
    path = tmp_path / "prompt.state"
    state = saved(model, path)
    loaded = states.load(path, model.initial_state(1), model.fingerprint())
    assert same_bits(loaded, state)
    assert [type(part) for part in loaded[0]] == [type(part) for part in state[0]]
    following = random_tokens(2, 5, seed=1)
    assert torch.equal(model(following, loaded).logits, model(following, state).logits)


@mixers
def test_save_takes_a_state_with_history_and_views(model, mixer, tmp_path):
    path = tmp_path / "view.state"
    state = states.map_tensors(lambda x: x[1:], model(random_tokens(3, 4)).state)
    states.save(state, path, model.fingerprint())
    assert same_bits(states.load(path, model.initial_state(1), model.fingerprint()), state)


@mixers
def test_save_replaces_the_file_and_equal_states_give_equal_bytes(model, mixer, tmp_path):
    first, second = tmp_path / "a.state", tmp_path / "b.state"
    first.write_bytes(b"something older")
    saved(model, first)
    saved(model, second)
    assert first.read_bytes() == second.read_bytes()


@mixers
def test_state_of_another_model_is_refused(model, mixer, tmp_path):
    path = tmp_path / "prompt.state"
    saved(model, path)
    with torch.no_grad():
        model.head.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="is the state of another model; its weights differ"):
        states.load(path, model.initial_state(1), model.fingerprint())


def test_state_of_another_architecture_is_refused_even_under_its_fingerprint(tmp_path):
    path = tmp_path / "prompt.state"
    saved(random_model(small_config("rwkv7")), path)
    fingerprint = random_model(small_config("rwkv7")).fingerprint()
    other = random_model(small_config("attention"))
    with pytest.raises(ValueError, match="is the state of another model"):
        states.load(path, other.initial_state(1), fingerprint)


def test_a_missing_file_a_directory_and_an_empty_file_are_refused(tmp_path):
    model = random_model(small_config("rwkv7"))
    empty = tmp_path / "empty.state"
    empty.touch()
    for path in (tmp_path / "absent.state", tmp_path, empty):
        with pytest.raises(ValueError, match="cannot be read as a saved state") as error:
            states.load(path, model.initial_state(1), model.fingerprint())
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_every_truncation_and_a_damaged_header_are_refused(tmp_path):
    model = random_model(small_config("rwkv7", num_layers=1, d_model=8))
    whole, path = tmp_path / "whole.state", tmp_path / "damaged.state"
    saved(model, whole, batch=1, time=2)
    content = whole.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    damaged = [content[:length] for length in range(0, len(content), 7)]
    damaged += [
        content[:place] + bytes([content[place] ^ 0x80]) + content[place + 1 :]
        for place in range(0, header, 5)
    ]
    for candidate in damaged:
        path.write_bytes(candidate)
        with pytest.raises(ValueError, match="cannot be read as a saved state"):
            states.load(path, model.initial_state(1), model.fingerprint())


@pytest.mark.parametrize("note", [None, {}, {"format": "pt"}])
def test_tensors_that_are_no_state_are_refused(tmp_path, note):
    model = random_model(small_config("rwkv7"))
    path = tmp_path / "weights.safetensors"
    save_file({"x": torch.zeros(2)}, path, metadata=note)
    with pytest.raises(ValueError, match=r"weights\.safetensors is not a saved state"):
        states.load(path, model.initial_state(1), model.fingerprint())


def test_missing_and_additional_tensors_are_refused(tmp_path):
    model = random_model(small_config("rwkv7"))
    path = tmp_path / "prompt.state"
    saved(model, path)
    found = load_file(path)
    note = {"state_of": model.fingerprint()}
    name = min(found)
    for tensors in ({k: v for k, v in found.items() if k != name}, {**found, "x": torch.zeros(1)}):
        save_file(tensors, path, metadata=note)
        with pytest.raises(ValueError, match="is the state of another model"):
            states.load(path, model.initial_state(1), model.fingerprint())


@mixers
@torch.no_grad()
def test_selected_rows_continue_as_those_rows(model, mixer):
    tokens, following = random_tokens(3, 9), random_tokens(3, 6, seed=1)
    state = model(tokens).state
    rows = [2, 0, 2]
    expected = model(following[rows], model(tokens[rows]).state).logits
    for index in (rows, torch.tensor(rows), torch.tensor(rows, dtype=torch.int32)):
        selected = states.select_rows(state, index)
        assert_close(model(following[rows], selected).logits, expected, 1e-5)
    same = states.map_tensors(lambda x: x[torch.tensor(rows)], state)
    assert same_bits(states.select_rows(state, rows), same)


@mixers
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_rows_of_different_lengths_join_and_continue_as_alone(mixer, form):
    """Joined twice, so that a cache which already has invisible tokens is joined again."""
    model = random_model(small_config(mixer))
    lengths = (3, 12, 1, 7)
    apart = [model(random_tokens(1, n, seed=n)).state for n in lengths]
    reset = resets_at(1, 7, [(0, 4)])
    apart[3] = model(random_tokens(1, 7, seed=7), reset=reset).state
    pair = states.concatenate(apart[:2])
    joined = states.concatenate([pair, apart[2], apart[3]])
    before = states.clone(joined)
    following = random_tokens(4, 10, seed=20)
    together = model(following, joined, form=form)
    alone = [
        model(following[row : row + 1], state, form=form).logits for row, state in enumerate(apart)
    ]
    assert_close(together.logits, torch.cat(alone), 1e-9)
    assert same_bits(joined, before)

    last = random_tokens(4, 3, seed=21)  # and once more, from the state that came out of it
    expected = torch.cat(
        [
            model(last[row : row + 1], model(following[row : row + 1], state).state).logits
            for row, state in enumerate(apart)
        ]
    )
    assert_close(model(last, together.state, form=form).logits, expected, 1e-9)
    third = states.select_rows(together.state, [2])
    assert_close(model(last[2:3], third, form=form).logits, expected[2:3], 1e-9)


@mixers
@torch.no_grad()
def test_an_initial_state_joins_one_that_has_run(model, mixer):
    run = model(random_tokens(1, 5)).state
    joined = states.concatenate([model.initial_state(1), run])
    following = random_tokens(2, 4, seed=1)
    logits = model(following, joined).logits
    assert_close(logits[:1], model(following[:1]).logits, 1e-5)
    assert_close(logits[1:], model(following[1:], run).logits, 1e-5)


@mixers
def test_clone_has_memory_of_its_own(model, mixer):
    state = states.detach(model(random_tokens(2, 5)).state)
    copy = states.clone(state)
    assert same_bits(copy, state)
    memory = {tensor.data_ptr() for _, tensor in states.tensors(state)}
    for (name, tensor), (_, original) in zip(
        states.tensors(copy), states.tensors(state), strict=True
    ):
        assert tensor.data_ptr() not in memory, name
        before = original.clone()
        tensor.add_(1)
        assert torch.equal(original, before), name


@mixers
def test_detach_cuts_the_history_and_keeps_the_values(model, mixer):
    state = model(random_tokens(2, 5)).state
    assert all(t.requires_grad for _, t in states.tensors(state) if t.is_floating_point())
    detached = states.detach(state)
    assert same_bits(detached, state)
    assert not any(t.requires_grad for _, t in states.tensors(detached))


@mixers
def test_tensor_names_are_unique_paths_and_the_batch_comes_first(model, mixer):
    state = model(random_tokens(5, 6)).state
    named = list(states.tensors(state))
    names = [name for name, _ in named]
    assert len(set(names)) == len(names)
    assert {name.split(".")[0] for name in names} == {"0", "1", "2"}
    assert {name.split(".")[1] for name in names} <= {"time", "channel"}
    assert all(tensor.shape[0] == 5 for _, tensor in named)


@mixers
@torch.no_grad()
def test_size_of_the_state(model, mixer):
    """What the mixers differ in: one state is constant, a KV cache takes 2 D floats a token."""
    state, sizes = None, []
    for _ in range(4):
        state = model(random_tokens(2, 11), state).state
        sizes.append(states.num_bytes(state))
    layers, width, rows = model.config.num_layers, model.config.d_model, 2
    growth = [later - earlier for earlier, later in pairwise(sizes)]
    if MIXERS[mixer].op == "attention":
        assert growth == [layers * rows * 11 * 2 * width * 4] * 3
    else:
        assert growth == [0, 0, 0]
        assert states.num_bytes(model.initial_state(2)) == sizes[0]
    counted = sum(t.numel() * t.element_size() for _, t in states.tensors(state))
    assert states.num_bytes(state) == counted


def test_size_of_rwkv7_is_the_one_in_the_paper():
    """Two shifts of D and H matrices of K x V a layer, all float32."""
    model = random_model(small_config("rwkv7"), dtype=torch.float32)
    assert states.num_bytes(model.initial_state(1)) == 3 * (2 * 32 + 4 * 8 * 8) * 4


@pytest.mark.parametrize("mixer", [m for m in ALL_MIXERS if m.startswith("rwkv")])
def test_matrices_stay_in_single_precision_in_a_bfloat16_model(mixer):
    model = random_model(small_config(mixer), dtype=torch.bfloat16)
    for state in (model.initial_state(2), model(random_tokens(2, 40)).state):
        for name, tensor in states.tensors(state):
            summed = "matrix" in name or "mean" in name
            assert tensor.dtype == (torch.float32 if summed else torch.bfloat16), name


@mixers
@torch.no_grad()
def test_initial_state_is_what_none_means(model, mixer):
    tokens = random_tokens(2, 6)
    first, second = model(tokens), model(tokens, model.initial_state(2))
    assert torch.equal(first.logits, second.logits)
    assert_states_close(first.state, second.state, 0.0)


def test_extra_tensors_lie_beside_the_state(tmp_path):
    model = random_model(small_config("rwkv7"))
    path, logits = tmp_path / "prompt.state", torch.randn(1, 29)
    output = model(random_tokens(1, 4))
    states.save(output.state, path, model.fingerprint(), extra={"logits": logits})
    assert same_bits(states.load(path, model.initial_state(1), model.fingerprint()), output.state)
    extra = states.load_extra(path)
    assert extra.keys() == {"logits"}
    assert torch.equal(extra["logits"], logits)
    saved(model, path)
    assert states.load_extra(path) == {}
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cannot be read as a saved state"):
        states.load_extra(path)
