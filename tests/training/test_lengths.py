"""What a longer context is worth, against whole windows read at once and sums by hand."""

import dataclasses
import json
import math
import shutil
from statistics import fmean, stdev

import matplotlib.image
import numpy as np
import pytest
import torch
from model_helpers import ALL_MIXERS, VOCAB, random_model, random_tokens, small_config
from runs import ebb, only_line

from data.errors import DataError
from data.loader import sequential_stretches
from model.state import num_bytes
from train.lengths import (
    LengthLoss,
    LengthStudy,
    PositionLoss,
    position_bounds,
    study_lengths,
    study_size,
)
from train.lengths_plot import save_lengths_plot

END = 3
CONTEXT = 6


def text(length=80):
    """Some documents; three spans of four contexts fit in 80 tokens."""
    ids = random_tokens(1, length, seed=1)[0].numpy().astype(np.uint16)
    ids[ids == END] = END + 1
    ids[[13, 14, 40, 47]] = END
    return ids


def document_starts(ids):
    """Where a token is read with a fresh state, as the loader has it; `[len(ids) - 1]`."""
    (whole,) = sequential_stretches(ids, context=len(ids), end_id=END)
    assert whole.reset.sum() >= 4
    return whole.reset[0]


def seen_tokens(starts):
    """How many tokens stand before each target of a window, in its document."""
    counts, count = [], 0
    for is_start in starts.tolist():
        count = 1 if is_start else count + 1
        counts.append(count)
    return counts


@torch.no_grad()
def window_losses(model, window, reset):
    """Of each target of a window that is read at once."""
    window = torch.from_numpy(window.astype(np.int64))[None]
    logits = model(window[:, :-1], form="parallel", reset=reset[None]).logits[0].float()
    return torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none").tolist()


def by_hand(model, ids, length, span):
    """Losses and tokens seen of all targets in windows of a length, `[spans, span]`."""
    resets = document_starts(ids)
    starts = range(0, (len(ids) - 1) // span * span, length)
    losses = [window_losses(model, ids[n : n + length + 1], resets[n : n + length]) for n in starts]
    seen = [seen_tokens(resets[n : n + length]) for n in starts]
    return np.reshape(losses, (-1, span)), np.reshape(seen, (-1, span))


def study(model, ids, **changes):
    settings = {"context": CONTEXT, "end_id": END, "longest": 4, "stretch": 5}
    return study_lengths(model, ids, **{**settings, **changes})


@pytest.mark.parametrize("mixer", ALL_MIXERS)
def test_losses_are_those_of_windows_read_at_once(mixer):
    model, ids = random_model(small_config(mixer)), text()
    found = study(model, ids)
    assert (found.context, found.asked, found.spans, found.tokens) == (CONTEXT, 4, 3, 72)
    assert [x.length for x in found.lengths] == [6, 12, 24]
    first, read = None, {}
    for length in found.lengths:
        losses, seen = read[length.length] = by_hand(model, ids, length.length, 24)
        last = losses[:, -CONTEXT:].mean(axis=1)
        first = last if first is None else first
        assert length.loss == pytest.approx(losses.mean(), rel=1e-6)
        assert length.last == pytest.approx(last.mean(), rel=1e-6)
        assert length.seen == pytest.approx(seen[:, -CONTEXT:].mean())
        assert length.gain == pytest.approx((last - first).mean(), abs=1e-6)
        expected = 4.303 * stdev((last - first).tolist()) / math.sqrt(3)  # two degrees of freedom
        assert length.margin == pytest.approx(expected, abs=1e-5)
    assert len({x.last for x in found.lengths}) == 3
    assert [(p.fewest, p.most) for p in found.positions] == [
        (1, 1), (2, 2), (3, 3), (4, 6), (7, 12), (13, 24)
    ]  # fmt: skip
    for group in found.positions:
        losses, seen = read[min(length for length in read if length >= group.most)]
        those = (seen >= group.fewest) & (seen <= group.most)
        assert group.tokens == those.sum()
        assert group.loss == pytest.approx(losses[those].mean(), rel=1e-6)


@pytest.mark.parametrize("mixer", ["rwkv7", "attention", "mamba2"])
def test_stretches_and_windows_side_by_side_change_nothing(mixer, monkeypatch):
    model, ids = random_model(small_config(mixer)), text(97)
    expected, losses = study(model, ids, stretch=1000), []
    for cached, stretch in [(1, 7), (48, 4), (96, 24)]:
        monkeypatch.setattr("train.evaluate._CACHED_TOKENS", cached)
        found = study(model, ids, stretch=stretch)
        assert [x.last for x in found.lengths] == pytest.approx([x.last for x in expected.lengths])
        assert [x.loss for x in found.positions] == pytest.approx(
            [x.loss for x in expected.positions]
        )
        assert [p.tokens for p in found.positions] == [p.tokens for p in expected.positions]
        losses.append(found.lengths[-1].loss)
    assert losses == pytest.approx([expected.lengths[-1].loss] * 3)


@pytest.mark.parametrize("mixer", ["rwkv7", "attention"])
def test_memory_does_not_grow_with_the_text(mixer, monkeypatch):
    monkeypatch.setattr("train.evaluate._CACHED_TOKENS", 48)  # two of the longest windows
    model, found = random_model(small_config(mixer)), []
    model.register_forward_hook(
        lambda _, args, output: found.append(
            (args[0].shape[1], output.logits.numel(), num_bytes(output.state))
        )
    )
    largest = []
    for spans in (2, 8):
        found.clear()
        study(model, text(24 * spans + 1), stretch=5)
        largest.append(tuple(map(max, zip(*found, strict=True))))
    assert largest[0] == largest[1]
    assert largest[0][:2] == (5, 8 * 5 * VOCAB), "eight windows of one context side by side"


def test_progress_ends_at_the_size_that_was_told():
    seen = []
    study(random_model(small_config("rwkv7")), text(), progress=seen.append)
    assert seen[-1] == study_size(80, CONTEXT, 4) == 3 * 72
    assert seen == sorted(seen)


def test_a_short_text_is_read_as_far_as_it_goes():
    model = random_model(small_config("rwkv7"))
    for length, factor, spans in [(7, 1, 1), (12, 1, 1), (13, 2, 1), (24, 2, 1), (25, 4, 1)]:
        found = study(model, text()[:length], longest=32)
        assert found.lengths[-1].length == factor * CONTEXT
        assert (found.spans, found.asked) == (spans, 32)
        assert all(x.margin is None for x in found.lengths)
        assert found.findings()[0] == (
            "The text is shorter than 32 contexts of 6 tokens: the longest window that fits is "
            f"{factor}."
        )
        assert ("The longest window fits once" in " ".join(found.findings())) == (factor > 1)
    with pytest.raises(DataError, match="has 6 tokens, fewer than one window of 6"):
        study(model, text()[:6])
    with pytest.raises(ValueError, match=r"must be 1, 2, 4, \.\.\. contexts, but is 12"):
        study(model, text(), longest=12)


def test_bounds_are_the_halves_and_doublings_of_the_context():
    assert position_bounds(16, 2) == [1, 2, 4, 8, 16, 32]
    assert position_bounds(12, 4) == [1, 2, 3, 6, 12, 24, 48]
    assert position_bounds(1, 1) == [1]


def made(*lasts, margin=0.01, asked=4):
    """A study with these losses in windows of 8, 16, ... tokens."""
    lengths = tuple(
        LengthLoss(8 * 2**n, 2.0, last, 8.0 * 2**n, last - lasts[0], margin and margin * (n > 0))
        for n, last in enumerate(lasts)
    )
    positions = tuple(PositionLoss(n, n, 3.0 / n, 10) for n in (1, 2))
    return LengthStudy(8, asked, 5, lengths, positions)


HELPS = "A longer context helps: with {} tokens {} nats a token less than with 8, on the same "
NO_GAIN = "No gain from more than 8 tokens of context was found."


@pytest.mark.parametrize(
    ("lasts", "said"),
    [
        ((2.0, 1.9, 1.8), [HELPS.format(32, "0.2000")]),
        ((2.0, 1.9, 1.95), [HELPS.format(16, "0.1000")]),
        ((2.0, 1.995, 2.005), [NO_GAIN]),
        ((2.0, 2.0, 3.0), [NO_GAIN, "With 32 tokens the loss is 1.0000 nats a token higher"]),
        ((2.0, 1.9, 3.0), [HELPS.format(16, "0.1000"), "With 32 tokens the loss is 1.0000 nats"]),
        ((2.0, 1.9, math.nan), [HELPS.format(16, "0.1000"), "With 32 tokens the loss is not a "]),
        ((math.nan,) * 3, [NO_GAIN, "With 32 tokens the loss is not a finite number."]),
    ],
)
def test_what_the_numbers_say(lasts, said):
    found = made(*lasts).findings()
    assert len(found) == len(said)
    assert all(line.startswith(start) for line, start in zip(found, said, strict=True))


def test_what_cannot_be_said():
    assert made(2.0, asked=1).findings() == []
    assert len(made(2.0).findings()) == 1
    (line,) = made(2.0, 1.0, 0.5, margin=None).findings()
    assert line.startswith("The longest window fits once")


def test_a_loss_that_is_no_number_is_a_result(tmp_path):
    model = random_model(small_config("attention"))
    with torch.no_grad():
        model.head.weight.fill_(math.inf)
    found = study(model, text())
    assert math.isnan(found.lengths[-1].last)
    assert math.isnan(found.lengths[-1].margin)
    assert found.findings()[-1].endswith("not a finite number.")
    save_lengths_plot({"attention": found}, tmp_path / "plot.png")


def test_plot(tmp_path):
    """The same numbers give the same bytes; others give others."""
    studies = {"rwkv7": made(2.0, 1.9, 1.8), "attention": made(2.0, 2.5, math.inf)}
    seen = set()
    moved = dataclasses.replace(studies["rwkv7"], positions=(PositionLoss(1, 2, 2.0, 20),))
    for shown in ({"rwkv7": moved}, studies, studies):
        save_lengths_plot(shown, tmp_path / "plot.png")
        seen.add((tmp_path / "plot.png").read_bytes())
    assert len(seen) == 2
    image = matplotlib.image.imread(tmp_path / "plot.png")
    assert image.shape[0] > 800
    assert image.std() > 0.02
    assert fmean(image[..., 3].flatten().tolist()) == 1.0


# `ebb eval --extrapolate`.


def report(capsys, *args):
    """What `ebb eval --json` prints."""
    capsys.readouterr()
    assert ebb("eval", *args, "--json", "--threads", "1") == 0
    return json.loads(capsys.readouterr().out)


def test_eval_draws_and_reports_all_lengths(reference, tmp_path, capsys):
    plot = tmp_path / "here.png"
    found = report(capsys, reference, "--extrapolate", "32", "--plot", plot)
    assert matplotlib.image.imread(plot).shape[0] > 800
    assert not (reference / "lengths.png").exists()
    study = found["extrapolation"]
    assert study["plot"] == str(plot)
    assert [x["length"] for x in study["lengths"]] == [16 * 2**n for n in range(6)]
    assert study["spans"] == found["tokens"] // 512
    assert study["positions"][-1]["most"] == 512
    assert all(0 < x["loss"] < 5 for x in (*study["lengths"], *study["positions"]))
    rounded = report(capsys, reference, "--extrapolate", "2", "--plot", plot, "--weights", "int4")
    plain = report(capsys, reference, "--extrapolate", "2", "--plot", plot)["extrapolation"]
    assert rounded["extrapolation"]["lengths"] != plain["lengths"]
    assert report(capsys, reference)["extrapolation"] is None


def test_eval_prints_tables_for_people(reference, capsys):
    found = report(capsys, reference, "--extrapolate", "4", "--max-tokens", "200")["extrapolation"]
    (reference / "lengths.png").unlink()
    assert ebb("eval", reference, "--extrapolate", "4", "--max-tokens", "200") == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [line.split() for line in lines]
    for row in found["lengths"]:
        start = [str(row["length"]), str(row["length"] // 16), f"{row['loss']:.4f}"]
        (rest,) = [line[3:] for line in cells if line[:3] == start]
        assert rest[:2] == [f"{row['last']:.4f}", f"{row['gain']:+.4f}"]
    for row in found["positions"]:
        end = [str(row["most"]), f"{row['loss']:.4f}", str(row["tokens"])]
        assert any(line[-3:] == end for line in cells)
    assert lines[-1] == f"Plot: {reference / 'lengths.png'}"
    assert lines[-1 - len(found["findings"]) : -1] == found["findings"]
    (reference / "lengths.png").unlink()


def test_eval_stops_at_what_fits(reference, tmp_path, capsys):
    flags = ["--extrapolate", "32", "--plot", tmp_path / "plot.png"]
    found = report(capsys, reference, *flags, "--max-tokens", "70")["extrapolation"]
    assert found["lengths"][-1]["length"] == 64
    assert found["lengths"][-1]["margin"] is None
    assert found["findings"][0] == (
        "The text is shorter than 32 contexts of 16 tokens: the longest window that fits is 4."
    )
    assert ebb("eval", reference, *flags, "--max-tokens", "16") == 1
    assert only_line(capsys.readouterr().err).startswith("The text has 16 tokens, fewer than one ")


def test_eval_of_an_imported_run_asks_for_the_context(workshop, tmp_path, capsys):
    shutil.copytree(workshop / "reference", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["train"] = {}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    flags = [tmp_path / "run", "--data", workshop / "text.txt"]
    assert report(capsys, *flags)["windowed"] is None
    assert report(capsys, *flags, "--context", "8")["windowed"]["context"] == 8
    assert ebb("eval", *flags, "--extrapolate", "2") == 1
    assert "does not say what context it was trained on: give --context" in capsys.readouterr().err
    assert ebb("eval", *flags, "--extrapolate", "2", "--context", "8") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("run/lengths.png")
