"""Loss, perplexity and bits per byte, against one long forward pass and against sums by hand."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_helpers import ALL_MIXERS, VOCAB, random_model, random_tokens, small_config
from runs import ebb

from data.errors import DataError
from data.joined import JoinedTokens
from data.loader import Batch, sequential_stretches, validation_batches
from train.evaluate import Evaluation, evaluate, evaluate_windows

END = 3
SIZES = np.arange(VOCAB, dtype=np.int32) % 4  # bytes of each token; the end token stands for 3
SIZES[END] = 0


def tokens(length=61):
    """Some documents, one of them empty."""
    ids = random_tokens(1, length, seed=1)[0].numpy().astype(np.uint16)
    ids[[20, 21, 50]] = END
    return ids


def long_forward(model, ids):
    """The loss of each token but the first, with a reset at each end token."""
    inputs = torch.from_numpy(ids.astype(np.int64))[None]
    reset = inputs == END
    logits = model(inputs, form="parallel", reset=reset).logits.float().log_softmax(-1)
    return -logits[0, :-1].gather(1, inputs[0, 1:, None])[:, 0].double()


@torch.no_grad()
@pytest.mark.parametrize("mixer", ALL_MIXERS)
@pytest.mark.parametrize("stretch", [1, 7, 16, 60, 1000])
def test_state_is_carried_from_stretch_to_stretch(mixer, stretch):
    model, ids = random_model(small_config(mixer)), tokens()
    expected = long_forward(model, ids)
    batches = sequential_stretches(ids, context=stretch, end_id=END)
    result = evaluate(model, batches, SIZES, carry_state=True)
    assert result.tokens == 60
    assert result.nats == pytest.approx(expected.sum().item(), rel=1e-6)
    assert result.bytes == SIZES[ids[1:]].sum()


@torch.no_grad()
def test_windows_are_read_with_a_fresh_state_each():
    model, ids = random_model(small_config("rwkv7")), tokens()
    batches = list(validation_batches(ids, context=15, batch_size=3, end_id=END))
    expected = 0.0
    for start in range(0, 60, 15):
        window = torch.from_numpy(ids[start : start + 16].astype(np.int64))[None]
        reset = torch.from_numpy(ids[start : start + 15] == END)[None]
        logits = model(window[:, :-1], reset=reset).logits.float()
        loss = torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum")
        expected += loss.item()
    result = evaluate(model, batches, SIZES)
    assert result.nats == pytest.approx(expected, rel=1e-6)
    carried = evaluate(model, batches[:1] + batches[:1], SIZES, carry_state=True)
    assert carried.nats != pytest.approx(2 * evaluate(model, batches[:1], SIZES).nats, rel=1e-4)


def test_bits_per_byte_by_hand():
    """Two tokens of 3 and 1 bytes and an end token, with probabilities 1/2, 1/4 and 1/8."""
    result = Evaluation(math.log(2) + math.log(4) + math.log(8), tokens=3, bytes=4)
    assert result.bits_per_byte == pytest.approx((1 + 2 + 3) / 4)
    assert result.loss == pytest.approx(2 * math.log(2))
    assert result.perplexity == pytest.approx(4)


def test_perplexity_that_overflows_is_infinite():
    assert Evaluation(1e6, tokens=1, bytes=1).perplexity == math.inf


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored_and_nothing_is_recorded_for_gradients(training):
    model = random_model(small_config("attention")).train(training)
    batch = Batch(random_tokens(2, 5), random_tokens(2, 5), None)
    seen = []
    hook = model.register_forward_hook(
        lambda module, _, output: seen.append((module.training, output.logits.requires_grad))
    )
    evaluate(model, [batch], SIZES)
    hook.remove()
    assert seen == [(False, False)]
    assert model.training is training


def report(capsys, *args):
    assert ebb("eval", *args, "--json", "--threads", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


def test_eval_prints_one_json_object(reference, workshop, capsys):
    found = report(capsys, reference)
    side = len((workshop / "text.txt").read_bytes()) // 10 + 1
    assert found["data"] == "text.txt"
    assert found["split"] == "validation"
    assert found["tokens"] == side, "all but the first, and the end token"
    assert found["bytes"] == side - 1, "which stands for no byte"
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2), rel=0.01)
    assert found["loss"] < 4, "the model has learned nothing of its text"


def test_eval_does_not_depend_on_the_stretch(reference, capsys):
    losses = [report(capsys, reference, "--stretch", n)["loss"] for n in (50, 333)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_eval_reads_the_sides_of_the_text(reference, capsys):
    counts = {s: report(capsys, reference, "--split", s)["tokens"] for s in ("train", "all")}
    counts["validation"] = report(capsys, reference)["tokens"]
    assert counts["all"] == counts["train"] + counts["validation"] + 1
    assert report(capsys, reference, "--max-tokens", "30")["tokens"] == 29


def test_eval_of_both_sides_is_that_of_one_array(reference, capsys, monkeypatch):
    """Stretches and windows cross from one token file to the next, which no one joins."""
    flags = ("--split", "all", "--stretch", "50", "--extrapolate", "4", "--plot")
    plot = reference.parent / "both.png"
    apart = report(capsys, reference, *flags, plot)
    joined: list[int] = []

    def in_memory(parts):
        joined.append(len(parts))
        return np.concatenate(parts)

    monkeypatch.setattr("train.eval_command.JoinedTokens", in_memory)
    assert report(capsys, reference, *flags, plot) == apart
    assert joined == [2]


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    cuts=st.lists(st.tuples(st.integers(0, 22), st.integers(0, 22)), max_size=3),
)
def test_joined_tokens_are_cut_like_one_array(sizes, cuts):
    whole = np.arange(sum(sizes), dtype=np.uint16)
    joined = JoinedTokens(np.split(whole, np.cumsum(sizes)[:-1]))
    for start, length in cuts:
        whole, joined = whole[start : start + length], joined[start : start + length]
    assert joined.size == whole.size
    if whole.size:
        np.testing.assert_array_equal(joined.read(), whole)


def test_joined_token_files_are_not_copied_by_cutting(tmp_path):
    for name in "ab":
        np.arange(1000, dtype=np.uint16).tofile(tmp_path / name)
    files = [np.memmap(tmp_path / name, dtype=np.uint16, mode="r") for name in "ab"]
    cut = JoinedTokens(files)[500:1500]
    assert all(np.shares_memory(a, b) for a, b in zip(cut._parts, files, strict=True))
    cut.release()
    assert cut.read().tolist() == [*range(500, 1000), *range(500)]


def test_eval_of_another_text(reference, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("Ωmega 7! " * 40, encoding="utf-8")
    found = report(capsys, reference, "--data", tmp_path / "other.txt", "--split", "all")
    assert found["data"] == "other.txt"
    assert found["bytes"] == 40 * 10 - 1, "all but the first"
    assert found["loss"] > report(capsys, reference)["loss"] + 1


def test_eval_of_the_best_weights(reference, capsys):
    """The best are those of the last step here, so another file has to stand in for them."""
    assert report(capsys, reference, "--best") == report(capsys, reference)
    best = reference / "best.safetensors"
    before = best.read_bytes()
    first = sorted((reference / "resume").iterdir())[0] / "model.safetensors"
    best.write_bytes(first.read_bytes())
    try:
        assert report(capsys, reference, "--best")["loss"] != report(capsys, reference)["loss"]
    finally:
        best.write_bytes(before)


def test_eval_prints_lines_for_people(reference, capsys):
    found = report(capsys, reference)
    assert ebb("eval", reference) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"text.txt (validation): {found['tokens']:,} tokens, {found['bytes']:,} bytes",
        f"loss           {found['loss']:.4f} nats per token, with the state carried through",
        f"perplexity     {found['perplexity']:.2f} per token",
        f"bits per byte  {found['bits_per_byte']:.4f}",
        f"windowed loss  {found['windowed']['loss']:.4f} nats per token, "
        f"{found['windowed']['bits_per_byte']:.4f} bits per byte, in windows of 16 with a fresh "
        "state each",
    ]


def test_eval_reports_the_windowed_loss_beside_the_carried_one(reference, capsys):
    found = report(capsys, reference)
    windowed = found["windowed"]
    assert windowed["context"] == 16, "that of training"
    assert windowed["tokens"] == found["tokens"] // 16 * 16
    assert windowed["loss"] != found["loss"]
    one = report(capsys, reference, "--context", "1")["windowed"]
    assert (one["context"], one["tokens"]) == (1, found["tokens"])
    assert one["loss"] > windowed["loss"] + 0.1, "a letter alone tells less than sixteen"


def test_eval_of_a_text_shorter_than_a_window(reference, capsys):
    assert report(capsys, reference, "--max-tokens", "16")["windowed"] is None
    assert report(capsys, reference, "--max-tokens", "17")["windowed"]["tokens"] == 16
    assert ebb("eval", reference, "--max-tokens", "16") == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == "windowed loss  none: the text is shorter than 16 tokens and the one after"


@pytest.mark.parametrize("mixer", ["rwkv7", "attention"])
@pytest.mark.parametrize("stretch", [4, 15, 100])
def test_windowed_loss_is_that_of_whole_windows(mixer, stretch, monkeypatch):
    model, ids = random_model(small_config(mixer)), tokens(70)
    batches = validation_batches(ids, context=15, batch_size=2, end_id=END)
    expected = evaluate(model, batches, SIZES)
    for cached in (1, 45):  # windows side by side
        monkeypatch.setattr("train.evaluate._CACHED_TOKENS", cached)
        seen = []
        found = evaluate_windows(
            model, ids, SIZES, context=15, end_id=END, stretch=stretch, progress=seen.append
        )
        assert found.nats == pytest.approx(expected.nats, rel=1e-6)
        assert (found.tokens, found.bytes) == (expected.tokens, expected.bytes)
        assert seen == ([15, 30, 45, 60] if cached == 1 else [45, 60])


def test_windowed_loss_needs_one_window():
    model = random_model(small_config("rwkv7"))
    with pytest.raises(DataError, match="has 15 tokens, fewer than one window of 15 and the token"):
        evaluate_windows(model, tokens()[:15], SIZES, context=15, end_id=END)


@pytest.mark.parametrize(("weights", "most"), [("bf16", 0.2), ("int8", 0.2), ("int4", 20)])
def test_eval_tells_what_rounding_the_weights_costs(reference, capsys, weights, most):
    exact, found = report(capsys, reference), report(capsys, reference, "--weights", weights)
    assert exact["weights"] == "fp32"
    assert exact["perplexity_fp32"] == exact["perplexity"]
    assert found["weights"] == weights
    assert found["perplexity_fp32"] == exact["perplexity"]
    cost = 100 * (found["perplexity"] / exact["perplexity"] - 1)
    assert 0 < abs(cost) < most
    assert ebb("eval", reference, "--weights", weights) == 0
    line = capsys.readouterr().out.splitlines()[2]
    assert line.endswith(
        f"{cost:+.3f} % against {exact['perplexity']:.2f} without rounding to {weights}"
    )


def test_eval_refuses_weights_that_do_not_exist(reference, capsys):
    assert ebb("eval", reference, "--weights", "fp8") == 2
    assert "weights must be one of fp32, bf16, int8, int4" in capsys.readouterr().err
