import inspect

import pytest
import torch
from model_helpers import (
    ALL_MIXERS,
    VOCAB,
    assert_close,
    assert_states_close,
    random_model,
    random_tokens,
    same_bits,
    small_config,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from model import decode
from model import state as states
from model.generation import Generation, Sampling, generate, num_rows, prefill, sample, step
from model.layers import MIXERS
from model.state import tensors

EVERY_MIXER = pytest.mark.parametrize("mixer", ALL_MIXERS)
RECURRENT = [mixer for mixer in ALL_MIXERS if MIXERS[mixer].op != "attention"]
GREEDY = Sampling(temperature=0)
BOLD = Sampling(1.3, 1.1, top_k=20, top_p=0.95, min_p=0.01)


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def draws(logits, sampling, count, seen=None):
    """`[count]` tokens drawn one after the other from one row of logits."""
    seen = None if seen is None else seen.expand(count, -1)
    return sample(logits.expand(count, -1), sampling, seeds(0) * count, seen)


def ids(tokens):
    return tokens.tolist()


# Sampling.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"temperature": float("inf")}, "temperature must be at least 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1"),
        ({"min_p": -0.1}, "min_p must be between 0 and 1"),
        ({"min_p": 1.5}, "min_p must be between 0 and 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"temperature": 0, "top_k": 3}, "top_k has no effect at temperature 0"),
        ({"temperature": 0, "min_p": 0.1}, "min_p has no effect at temperature 0"),
    ],
)
def test_settings_that_cannot_be_drawn_with_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax_at_the_temperature(temperature):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -torch.inf]])
    count = 20_000
    drawn = draws(logits, Sampling(temperature=temperature), count)
    expected = (logits[0].double() / temperature).softmax(-1)
    found = torch.bincount(drawn, minlength=5) / count
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((found - expected).abs() <= 4 * deviation).all()
    assert found[4] == 0


def test_temperature_0_takes_the_likeliest_and_a_tiny_one_does_too():
    logits = torch.randn(7, VOCAB)
    assert torch.equal(sample(logits, GREEDY, seeds(*range(7))), logits.argmax(-1))
    tiny = sample(logits, Sampling(temperature=1e-60), seeds(*range(7)))
    assert torch.equal(tiny, logits.argmax(-1))


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(top_k=1), {3}),
        (Sampling(top_k=2), {3, 0}),
        (Sampling(top_k=100), {0, 1, 2, 3, 4}),
        (Sampling(top_p=0.3), {3}),
        (Sampling(top_p=0.41), {3, 0}),
        (Sampling(top_p=0.66), {3, 0}),
        (Sampling(top_p=0.75), {3, 0, 1}),
        (Sampling(top_p=1.0), {0, 1, 2, 3, 4}),
        (Sampling(min_p=0.0), {0, 1, 2, 3, 4}),
        (Sampling(min_p=0.3), {3, 0, 1}),
        (Sampling(min_p=1.0), {3}),
        (Sampling(top_k=2, top_p=0.5), {3}),  # 0.4 of the 0.7 that top_k left
        (Sampling(top_p=0.75, min_p=0.6), {3, 0}),
        (Sampling(temperature=0.25, min_p=0.3), {3, 0}),  # the temperature comes first
    ],
)
def test_what_is_left_to_draw_from(sampling, kept):
    logits = torch.tensor([[0.3, 0.15, 0.1, 0.4, 0.05]]).log()
    assert set(ids(draws(logits, sampling, 500))) == kept


def test_equal_logits_do_not_make_top_k_or_top_p_keep_more():
    flat = torch.zeros(1, 10)
    assert len(set(ids(draws(flat, Sampling(top_k=3), 300)))) == 3
    assert len(set(ids(draws(flat, Sampling(top_p=0.25), 300)))) == 3


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = torch.tensor([[3.0, 2.0, -1.0, -1.5]])
    sampling = Sampling(2.0, temperature=0)
    for seen, best in [([], 0), ([0], 1), ([0, 1], 0), ([3], 0)]:
        mask = torch.zeros(1, 4, dtype=torch.bool)
        mask[0, seen] = True
        assert sample(logits, sampling, seeds(0), mask).item() == best
    negative = torch.tensor([[-1.0, -1.5]])
    mask = torch.tensor([[True, False]])
    assert sample(negative, sampling, seeds(0), mask).item() == 1
    with pytest.raises(ValueError, match="needs `seen`"):
        sample(logits, sampling, seeds(0))


def test_logits_are_not_changed_and_must_be_numbers():
    logits = torch.randn(2, VOCAB)
    before = logits.clone()
    sample(logits, BOLD, seeds(1, 2), torch.ones(2, VOCAB, dtype=torch.bool))
    assert torch.equal(logits, before)
    for broken in (torch.nan, torch.inf):
        logits[1, 3] = broken
        for sampling in (Sampling(), GREEDY):
            with pytest.raises(ValueError, match="not finite"):
                sample(logits, sampling, seeds(1, 2))


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
    model, prompt = random_model(small_config(mixer)), ids(random_tokens(1, 9)[0])
    text, (generator,) = list(prompt), seeds(5)
    for _ in range(12):
        with torch.no_grad():
            logits = model(torch.tensor([text]), form="parallel").logits[:, -1]
        seen = torch.zeros(1, VOCAB, dtype=torch.bool)
        seen[0, text] = True
        text += ids(sample(logits, sampling, [generator], seen))
    drawn = generate(model, [prompt], max_tokens=12, sampling=sampling, seed=5)
    assert prompt + [token for (token,) in drawn] == text


@EVERY_MIXER
def test_rows_do_not_influence_each_other(mixer):
    """Also after some have ended: texts, logits and states are those of the row alone."""
    model = random_model(small_config(mixer))
    prompts = [ids(random_tokens(1, length, seed=length)[0]) for length in (1, 40, 5, 17)]
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


# Work and memory, counted.


class Meter(TorchDispatchMode):
    """Counts the operations and the bytes of what they return."""

    def __init__(self):
        super().__init__()
        self.operations = self.bytes = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = result if isinstance(result, (tuple, list)) else (result,)
        sizes = [x.numel() * x.element_size() for x in found if isinstance(x, torch.Tensor)]
        self.operations += 1
        self.bytes += sum(sizes)
        self.largest = max([self.largest, *sizes])
        return result


def cost_of_a_token(generation):
    """Of drawing and reading one: operations, floating-point operations, bytes, bytes of state."""
    with FlopCounterMode(display=False) as flops, Meter() as meter:
        next(generation)
    size = states.num_bytes(generation.state)
    counts = (meter.operations, flops.get_total_flops(), meter.bytes, size)
    assert all(counts)
    return counts


def metered(mixer, position):
    """A generation of which `position` tokens have been read."""
    config = small_config(mixer, num_layers=1, head_dim=16)
    model = random_model(config, dtype=torch.float32)
    sampling = Sampling(1.2, 0.8, top_k=10, top_p=0.9)
    tokens = ids(random_tokens(1, position)[0])
    return generate(model, [tokens], max_tokens=100_000, sampling=sampling)


@pytest.mark.parametrize("mixer", RECURRENT)
def test_work_and_memory_of_a_token_do_not_grow_with_the_position(mixer, monkeypatch):
    """To 100,000 tokens, exactly, in operations and bytes: those of PyTorch, which count.

    The native step runs one list of instructions whatever the position.
    """
    monkeypatch.setattr(decode, "why_not", lambda model: "PyTorch is meant")
    young, old = metered(mixer, 10), metered(mixer, 100_000)
    expected = cost_of_a_token(young)
    assert cost_of_a_token(old) == expected
    for _ in range(100):
        next(young)
        next(old)
    assert cost_of_a_token(young) == cost_of_a_token(old) == expected
    assert old.logits.isfinite().all()


def test_the_same_counts_grow_for_softmax_attention():
    young, old = metered("attention", 10), metered("attention", 1000)
    next(young), next(old)  # makes room in the cache, which is not a token's work
    before = cost_of_a_token(young)
    later = [cost_of_a_token(young) for _ in range(5)][-1]
    far = cost_of_a_token(old)
    for place in (2, 3):  # the counter of floating-point operations does not know the fused kernel
        assert before[place] < later[place] < far[place]


@pytest.mark.parametrize("mixer", RECURRENT)
def test_memory_of_a_prefill_does_not_grow_with_the_prompt(mixer):
    model = random_model(small_config(mixer, num_layers=1), dtype=torch.float32)
    largest = []
    for length in (512, 4096):
        tokens = random_tokens(1, length)
        with Meter() as meter:
            prefill(model, tokens, chunk=256)
        largest.append(meter.largest)
    assert largest[0] == largest[1]


def test_the_stretch_of_a_prefill_is_what_bounds_it():
    """The check above can fail: in one stretch the largest tensor is larger."""
    model = random_model(small_config("rwkv7", num_layers=1), dtype=torch.float32)
    assert inspect.signature(prefill).parameters["chunk"].default == 1024
    largest = []
    for chunk in (256, 4096):
        with Meter() as meter:
            prefill(model, random_tokens(1, 4096), chunk=chunk)
        largest.append(meter.largest)
    assert largest[1] > 4 * largest[0]
