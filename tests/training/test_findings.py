"""What the report of a comparison concludes: either way, or not at all."""

import math

import pytest
from comparison_results import (
    attention,
    diverged,
    everything,
    gla,
    results,
    rwkv7,
    with_flops,
    with_tasks,
)

from train.report import summary_lines, write_report


def summary(*models):
    return "\n".join(summary_lines(results(*models)))


def lines_with(text, *models):
    return [line for line in summary_lines(results(*models)) if text in line]


def test_a_recurrent_mixer_that_predicts_better_is_named():
    (line,) = lines_with("predicts", rwkv7(1.412), attention(1.455))
    assert line == (
        "rwkv7 predicts the validation text better than attention: 1.412 against 1.455 bits per "
        "byte (3.0 % fewer)."
    )


def test_softmax_that_predicts_better_is_named():
    (line,) = lines_with("predicts", rwkv7(1.455), attention(1.412))
    assert line.startswith("attention predicts the validation text better than rwkv7: 1.412")


def test_a_small_gap_with_one_seed_is_no_difference():
    text = summary(rwkv7(1.412), attention(1.42))
    assert "No difference found between rwkv7 and attention in predicting" in text
    assert "1.412 against 1.420 bits per byte; one seed each cannot tell" in text
    assert "seed to seed is unknown, so small differences mean nothing" in text


@pytest.mark.parametrize(
    ("bits", "found"),
    [((1.41, 1.415, 1.42), True), ((1.40, 1.46, 1.43), False)],
    ids=["steady", "noisy"],
)
def test_seed_noise_decides(bits, found):
    """The gap of the means is about the same; only the spread differs."""
    text = summary(rwkv7(*bits), attention(1.45, 1.455, 1.445))
    assert ("rwkv7 predicts the validation text better" in text) is found
    assert ("within seed noise" in text) is not found
    assert "seed to seed is unknown" not in text


def test_what_a_seed_does_to_both_is_no_noise():
    """The seeds lie far apart, the mixers always alike: only the paired test can tell."""
    text = summary(rwkv7(1.40, 1.50, 1.60), attention(1.41, 1.511, 1.609))
    assert "rwkv7 predicts the validation text better than attention" in text
    assert "the difference, 0.010 ± 0.002, exceeds the seed noise" in text


@pytest.mark.parametrize(
    ("mine", "softmax", "said"),
    [
        ((1.41, 1.415, 1.42), (1.45, 1.455, 1.445), "Softmax (attention) is not needed to predict"),
        ((1.45, 1.455, 1.445), (1.41, 1.415, 1.42), "Softmax (attention) wins at predicting"),
        ((1.40, 1.46, 1.43), (1.45, 1.455, 1.445), "No difference found between softmax"),
    ],
)
def test_verdict_can_come_out_in_all_three_ways(mine, softmax, said):
    first = summary_lines(results(rwkv7(*mine), attention(*softmax)))[0]
    assert first.startswith(said)
    assert "unknown" not in first


def test_verdict_tells_three_rivals_apart():
    far = gla(1.9, 1.91, 1.9)
    far["mixer"] = "retnet"
    models = rwkv7(1.3, 1.31, 1.3), attention(1.4, 1.41, 1.4), gla(1.35, 1.45, 1.4), far
    assert summary_lines(results(*models))[0] == (
        "Softmax (attention) is not needed to predict this text: rwkv7 (by 0.100) "
        "beats it; no difference found to gla; softmax is ahead of retnet (by 0.500) (gaps in "
        "bits per byte)."
    )


def test_verdict_of_one_seed_says_that_noise_is_unknown():
    first = summary_lines(results(rwkv7(1.455), attention(1.412)))[0]
    assert first.startswith("Softmax (attention) wins")
    assert "the noise from seed to seed is unknown, so this may be chance" in first
    first = summary_lines(results(rwkv7(1.413), attention(1.412)))[0]
    assert first.startswith("No difference found between softmax (attention) and rwkv7")
    assert first.endswith("is unknown, so a difference may be hidden.")


def test_a_run_that_broke_off_is_a_result_and_leaves_its_mixer_out():
    text = summary(rwkv7(1.4, 1.41), diverged(attention(1.3, 1.31), seed=1, step=40))
    assert "attention diverged in 1 of 2 runs: seed 1 at step 40 (its loss is not a" in text
    assert "predict" not in text, "the seeds that survived are no fair sample"


def test_others_are_ranked_where_softmax_diverged():
    text = summary(rwkv7(1.3, 1.31), gla(1.4, 1.41), diverged(attention(1.3, 1.31)))
    assert "Best at predicting the validation text: rwkv7" in text


def test_equal_compute_can_turn_the_order_around():
    measured = with_flops(results(rwkv7(1.412), attention(1.455)), (4e7, 1e7))
    (line,) = [x for x in summary_lines(measured) if "equal compute" in x]
    assert line.startswith("After an equal compute of 1.02e13 FLOPs, attention is ahead")
    measured = with_flops(results(rwkv7(1.412), attention(1.455)), (1e7, 4e7))
    (line,) = [x for x in summary_lines(measured) if "equal compute" in x]
    assert "rwkv7 is ahead" in line


def test_longer_contexts_and_tasks_are_summed_up():
    text = "\n".join(summary_lines(everything()))
    assert "windows of 8,192 tokens (32 times the trained context)" in text
    assert "rwkv7 3.900, gla 3.900, rwkv4 3.960, attention 5.100 (first seed only)" in text
    assert "attention: with 8,192 tokens the loss is 1.1000 nats a token higher" in text
    assert "recall at its last point (num pairs 32): attention is ahead (attention 97.0" in text
    assert "parity at its last point (length 128): rwkv7 is ahead (rwkv7 95.0" in text


def test_equal_accuracies_are_no_difference():
    models = [with_tasks(one, (0.9, 0.9), (0.5, 0.5)) for one in (rwkv7(1.4), attention(1.4))]
    text = summary(*models)
    assert "no difference found between rwkv7 and attention (rwkv7 90.0" in text


@pytest.mark.parametrize(("rate", "warned"), [(1e-3, False), (2e-3, True)])
def test_a_best_rate_at_the_end_of_its_grid_is_said(rate, warned):
    measured = with_flops(results(rwkv7(1.4), attention(1.4)), (1e7, 1e7))
    measured["models"][0]["learning_rate"] = rate
    text = "\n".join(summary_lines(measured))
    assert f"Of 3 learning rates tried with each mixer the best was taken: rwkv7 {rate:g}" in text
    assert ("The best rate of rwkv7 is at an end of the grid" in text) is warned


def test_a_gap_of_less_than_a_percent_counts_with_steady_seeds():
    text = summary(rwkv7(1.410, 1.4101, 1.4102), attention(1.412, 1.4121, 1.4119))
    assert "rwkv7 predicts the validation text better than attention" in text


def test_two_seeds_need_a_wide_gap():
    """Of one degree of freedom Student's t is 12.7: here it is 3, beyond the normal 1.96."""
    gap, spread = 0.03, 0.01
    text = summary(rwkv7(1.4, 1.4 + spread), attention(1.4 + gap - spread, 1.4 + gap + 2 * spread))
    assert "within seed noise" in text


def test_equal_time_can_turn_the_order_around():
    """rwkv7 ends lower, but where the fast run has ended it has seen a quarter of its tokens."""
    text = summary(rwkv7(1.412, speed=2500), attention(1.455, speed=9500))
    assert "rwkv7 predicts the validation text better" in text
    assert "After an equal training time of 108 s, attention is ahead" in text


def test_equal_time_interpolates_between_validations():
    a, b = rwkv7(1.4), attention(1.4)
    a["runs"][0]["validation_curve"] = [
        {"tokens": 1, "seconds": s, "loss": 1.0, "bits_per_byte": v}
        for s, v in ((0, 3.0), (40, 1.0))
    ]
    b["runs"][0]["validation_curve"] = [
        {"tokens": 1, "seconds": 10.0, "loss": 1.0, "bits_per_byte": 2.0}
    ]
    (line,) = lines_with("equal training time", a, b)
    assert "of 10 s, attention is ahead (bits per byte: attention 2.000, rwkv7 2.500)" in line


def test_training_speed_in_both_directions():
    fast = summary(rwkv7(1.4, speed=5000), attention(1.4, speed=9500))
    assert "attention trains 1.9 times as fast as rwkv7: 9,500 against 5,000 tokens" in fast
    slow = summary(rwkv7(1.4, speed=9500), attention(1.4, speed=5000))
    assert "rwkv7 trains 1.9 times as fast as attention: 9,500 against 5,000 tokens" in slow


def test_overlapping_speeds_are_no_difference():
    text = summary(rwkv7(1.4, speed=5000), attention(1.4, speed=5200))
    assert "No difference found in training speed between attention and rwkv7" in text


def test_generation_at_the_largest_context():
    (line,) = lines_with("At a context of", rwkv7(1.4), attention(1.4))
    assert line == (
        "At a context of 16,384 tokens rwkv7 generates a token 5.1 times as fast as attention "
        "(0.520 against 2.65 ms) and needs 124 times less memory for its state (270 KB against "
        "34 MB)."
    )


def test_crossover_lies_between_the_measured_contexts():
    (line,) = lines_with("Crossover", rwkv7(1.4), attention(1.4))
    assert "up to 512 tokens of context attention is the faster of the two" in line
    assert "from 2,048 on rwkv7 is" in line
    assert "at 128 tokens attention generates a token 1.3 times as fast as rwkv7" in line


def test_softmax_that_is_faster_everywhere_wins():
    quick = attention(1.4, times=(0.1, 0.11, 0.12, 0.13, 0.2))
    text = summary(rwkv7(1.4), quick)
    assert "At a context of 16,384 tokens attention generates a token 2.6 times as fast" in text
    assert "; rwkv7 needs 124 times less memory" in text
    assert "There is no crossover: attention is faster than rwkv7 at every context" in text
    assert "Crossover:" not in text


def test_a_crossover_that_flickers_is_not_claimed():
    flicker = attention(1.4, times=(0.1, 2.0, 0.1, 2.0, 0.1))
    assert "changes 4 times between 128 and 16,384 tokens" in summary(rwkv7(1.4), flicker)


def test_equal_generation_times_are_no_difference():
    text = summary(rwkv7(1.4), attention(1.4, times=(0.52, 0.53, 0.51, 0.52, 0.52)))
    assert "no difference was found in the time" in text
    assert "At no context was a difference in time found between rwkv7 and attention" in text


def test_growth_is_measured_and_not_assumed():
    text = summary(rwkv7(1.4), attention(1.4))
    assert "The KV cache of attention grows with the context: from 262 KB at 128 tokens" in text
    assert "The state of rwkv7 does not grow" in text
    swapped = results(rwkv7(1.4), attention(1.4))
    first, second = swapped["models"]
    first["mixer"], second["mixer"] = second["mixer"], first["mixer"]
    assert "The state of rwkv7 grows with the context" in "\n".join(summary_lines(swapped))


def test_three_mixers_are_ranked_and_compared_with_softmax():
    models = rwkv7(1.412, 1.418, 1.409), attention(1.455, 1.449, 1.46), gla(1.42, 1.413, 1.41)
    text = summary(*models)
    assert "Best at predicting the validation text: rwkv7, 1.413" in text
    assert "no difference found to gla." in text
    assert "gla predicts the validation text better than attention" in text
    assert "rwkv7 predicts the validation text better than gla" not in text


def test_without_softmax_the_first_mixer_is_the_reference():
    assert "gla predicts the validation text better than rwkv7" in summary(rwkv7(1.5), gla(1.4))


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_divergence_is_said_and_not_compared(loss, tmp_path):
    measured = results(rwkv7(1.4), attention(1.45))
    measured["models"][0]["runs"][0]["validation_loss"] = loss
    measured["models"][0]["runs"][0]["validation_bits_per_byte"] = loss
    measured["models"][0]["runs"][0]["validation_curve"][-1]["loss"] = loss
    text = "\n".join(summary_lines(measured))
    assert "rwkv7 diverged" in text
    assert "predict" not in text
    write_report(measured, tmp_path)


def test_a_model_no_better_than_guessing_is_named():
    assert "rwkv7 has learned nothing" in summary(rwkv7(2.9), attention(1.4))
    assert "learned nothing" not in summary(rwkv7(2.8), attention(1.4))
