"""Reading a prompt, going on from it, and keeping what was read."""

import pytest
import torch
from generation_helpers import BOLD, GREEDY, seeds
from model_helpers import (
    ALL_MIXERS,
    RECURRENT,
    VOCAB,
    assert_close,
    assert_states_close,
    random_model,
    random_tokens,
    same_bits,
    small_config,
)

from model import state as states
from model.generation import Generation, generate, num_rows, prefill, step
from model.sampling import Sampling, sample
from model.state import tensors

EVERY_MIXER = pytest.mark.parametrize("mixer", ALL_MIXERS)


# Reading: prefill and step.


@EVERY_MIXER
def test_prefill_and_steps_are_the_parallel_form(mixer):
    model, tokens = random_model(small_config(mixer)), random_tokens(2, 45)
    with torch.no_grad():
        expected, whole = model(tokens, form="parallel")
    for chunk in (1, 7, 30, 1024):
        logits, state = prefill(model, tokens[:, :30], chunk=chunk)
        assert_close(logits, expected[:, 29], 1e-9)
        kept = states.clone(state)
        after = state
        for t in range(30, 45):
            logits, after = step(model, tokens[:, t], after)
            assert_close(logits, expected[:, t], 1e-9)
        assert_states_close(after, whole, 1e-9)
        assert same_bits(state, kept)


@EVERY_MIXER
def test_a_prefilled_state_keeps_nothing_else_in_memory(mixer):
    _, state = prefill(random_model(small_config(mixer)), random_tokens(1, 300), chunk=128)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for _, x in tensors(state)}
    assert sum(storage.nbytes() for storage in storages.values()) == states.num_bytes(state)


def test_prefill_refuses_what_it_cannot_read():
    model = random_model(small_config("rwkv7"))
    for tokens, message in [
        (torch.zeros(1, 0, dtype=torch.long), "at least one"),
        (torch.tensor([[0, VOCAB]]), f"vocabulary of {VOCAB}"),
        (torch.tensor([[-1]]), f"vocabulary of {VOCAB}"),
    ]:
        with pytest.raises(ValueError, match=message):
            prefill(model, tokens)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        prefill(model, torch.tensor([[1]]), chunk=0)


# Generating.


@EVERY_MIXER
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), BOLD], ids=["greedy", "plain", "bold"])
def test_the_text_is_that_of_reading_everything_again_for_each_token(mixer, sampling):
    model, prompt = random_model(small_config(mixer)), random_tokens(1, 9)[0].tolist()
    text, (generator,) = list(prompt), seeds(5)
    for _ in range(12):
        with torch.no_grad():
            logits = model(torch.tensor([text]), form="parallel").logits[:, -1]
        seen = torch.zeros(1, VOCAB, dtype=torch.bool)
        seen[0, text] = True
        text += sample(logits, sampling, [generator], seen).tolist()
    drawn = generate(model, [prompt], max_tokens=12, sampling=sampling, seed=5)
    assert prompt + [token for (token,) in drawn] == text


@EVERY_MIXER
def test_rows_do_not_influence_each_other(mixer):
    """Also after some have ended: texts, logits and states are those of the row alone."""
    model = random_model(small_config(mixer))
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in (1, 40, 5, 17)]
    settings = {"max_tokens": 25, "sampling": BOLD, "stop_ids": (3, 7)}
    together = generate(model, prompts, seed=11, **settings)
    texts = [[token for token in row if token is not None] for row in zip(*together, strict=True)]
    lengths = set()
    for row, prompt in enumerate(prompts):
        alone = generate(model, [prompt], seed=11 + row, **settings)
        text = [token for (token,) in alone]
        assert texts[row] == text
        lengths.add(len(text))
        assert_close(together.logits[row : row + 1], alone.logits, 1e-9)
        assert torch.equal(together.seen[row], alone.seen[0])
        if mixer in RECURRENT:  # padding makes a cache of other shape, but the logits are the same
            assert_states_close(states.select_rows(together.state, [row]), alone.state, 1e-9)
        assert text[-1] in (3, 7) or len(text) == 25
        assert not {3, 7} & set(text[:-1])
    assert len(lengths) > 1, "no row ended before another: the test shows nothing"


@EVERY_MIXER
def test_the_state_has_read_what_was_given_out(mixer):
    model, prompts = random_model(small_config(mixer)), [[1, 2, 3], [4]]
    generation = generate(model, prompts, max_tokens=20, seed=1, stop_ids=(5, 6, 8))
    texts = [list(prompt) for prompt in prompts]
    for tokens in generation:
        for text, token in zip(texts, tokens, strict=True):
            text += [] if token is None else [token]
        assert num_rows(generation.state) == 2
        for row, text in enumerate(texts):
            logits, state = prefill(model, torch.tensor([text]))
            assert_close(generation.logits[row : row + 1], logits, 1e-9)
            if mixer in RECURRENT:
                assert_states_close(states.select_rows(generation.state, [row]), state, 1e-9)


@EVERY_MIXER
def test_a_state_can_be_branched_kept_and_gone_on_from(mixer):
    model = random_model(small_config(mixer))
    _, state = prefill(model, torch.tensor([[1, 2, 3, 4]]))
    before = states.clone(state)
    whole = [token for (token,) in generate(model, [[1, 2, 3, 4, 9]], max_tokens=8)]
    again = [token for (token,) in generate(model, [[9]], max_tokens=8, state=state)]
    both = states.select_rows(state, [0, 0])
    rows = zip(*generate(model, [[9], [10, 11]], max_tokens=8, state=both), strict=True)
    assert whole == again == list(next(rows))
    assert list(next(rows)) != whole
    assert same_bits(state, before)


def test_a_stopped_iteration_goes_on():
    model = random_model(small_config("rwkv7"))
    whole = [token for (token,) in generate(model, [[1]], max_tokens=10, sampling=BOLD, seed=3)]
    (generator,) = seeds(3)
    first = generate(model, [[1]], max_tokens=0, sampling=BOLD)
    assert list(first) == []
    text = []
    for count in (4, 6):
        first = Generation(
            model,
            first.logits,
            first.state,
            max_tokens=count,
            sampling=BOLD,
            generators=[generator],
            seen=first.seen,
        )
        text += [token for (token,) in first]
    assert text == whole


def test_ids_that_stand_for_nothing_are_not_drawn():
    """An official model has more tokens than its tokenizer."""
    model = random_model(small_config("rwkv7"))
    with torch.no_grad():
        model.head.weight[5:] *= 100
    for sampling in (GREEDY, Sampling(temperature=50.0), BOLD):
        drawn = [*generate(model, [[1, 20], [7]], max_tokens=40, sampling=sampling, vocab_size=5)]
        assert {token for row in drawn for token in row} <= set(range(5))
    everything = [*generate(model, [[1]], max_tokens=40, sampling=GREEDY)]
    assert [*generate(model, [[1]], max_tokens=40, sampling=GREEDY, vocab_size=VOCAB)] == everything
    for wrong in (0, VOCAB + 1):
        with pytest.raises(ValueError, match=f"vocab_size must be between 1 and {VOCAB}, but is"):
            generate(model, [[1]], max_tokens=1, vocab_size=wrong)


def test_generate_refuses_what_it_cannot_go_on_from():
    model = random_model(small_config("rwkv6"))
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="start a text with the end token"):
            generate(model, prompts, max_tokens=1)
    with pytest.raises(ValueError, match="vocabulary"):
        generate(model, [[1], [VOCAB]], max_tokens=1)
    with pytest.raises(ValueError, match="2 rows, but there are 1 prompts"):
        generate(model, [[1]], max_tokens=1, state=model.initial_state(2))
    with pytest.raises(ValueError, match="max_tokens must be at least 0"):
        generate(model, [[1]], max_tokens=-1)
    with pytest.raises(ValueError, match="seed must be between"):
        generate(model, [[1]], max_tokens=1, seed=-1)


@EVERY_MIXER
def test_a_saved_state_goes_on_and_carries_what_is_kept_beside_it(mixer, tmp_path):
    model, path = random_model(small_config(mixer)), tmp_path / "state"
    logits, state = prefill(model, torch.tensor([[1, 2, 3]]))
    states.save(state, path, model.fingerprint(), {"logits": logits})
    loaded = states.load(path, model.initial_state(1), model.fingerprint())
    assert same_bits(loaded, state)
    extra = states.load_extra(path)
    assert list(extra) == ["logits"]
    assert torch.equal(extra["logits"], logits)
    other = random_model(small_config(mixer), seed=1)
    with pytest.raises(ValueError, match="state of another model"):
        states.load(path, other.initial_state(1), other.fingerprint())
    states.save(state, path, model.fingerprint())
    assert states.load_extra(path) == {}
