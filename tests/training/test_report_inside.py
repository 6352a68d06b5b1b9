"""What the report says of the instruments' readings: each sentence follows from its numbers."""

import math

import pytest
from comparison_results import attention, gla, rwkv7

from train.report import heat, inside


def says(kind, values, root=0.0):
    """The sentence on these values: by mixer, of the layers 0, 1, ..."""
    return inside.KINDS[kind].says(
        {mixer: dict(enumerate(layers)) for mixer, layers in values.items()}, root
    )


def read(one, *validations):
    """A model whose only run has these readings, one dict a validation."""
    one["runs"][0]["instruments"] = [
        {"tokens": 1000 * (place + 1)} | found for place, found in enumerate(validations)
    ]
    return one


def notes(*models):
    return {chart.title: chart.note for chart in inside.charts(models)}


@pytest.mark.parametrize(
    ("values", "root", "said"),
    [
        (
            {"a": [3, 9], "b": [8, 2]},
            4.0,
            "The largest is that of a, 9.00 in one layer; softmax cannot exceed 4.00, the root of "
            "the tokens (dashed), and a and b exceed it.",
        ),
        (
            {"a": [3, 9], "b": [8, 2]},
            8.0,
            "The largest is that of a, 9.00 in one layer; softmax cannot exceed 8.00, the root of "
            "the tokens (dashed), and a exceeds it.",
        ),
        (
            {"a": [3, 7], "b": [8, 2]},
            8.0,
            "The largest is that of b, 8.00 in one layer; softmax cannot exceed 8.00, the root of "
            "the tokens (dashed), and none exceeds it.",
        ),
        ({"a": [3, 7], "b": [8, 2]}, 0.0, "The largest is that of b, 8.00 in one layer."),
    ],
)
def test_norm_of_the_attention(values, root, said):
    assert says("attention_norm", values, root) == said


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"a": [0.5, 0.0009], "b": [0.001, 3]},
            "The least that a row of weights is divided by: a 9.00e-4, b 0.00100; so near zero the "
            "weights and gradients of a can jump.",
        ),
        (
            {"a": [0.5, 0.0], "b": [1e-9, 3]},
            "The least that a row of weights is divided by: a 0, b 1.00e-9; so near zero the "
            "weights and gradients of a and b can jump.",
        ),
        (
            {"a": [0.5, 0.2]},
            "The least that a row of weights is divided by: a 0.200; none comes near zero, where "
            "weights would jump.",
        ),
    ],
)
def test_smallest_divisor(values, said):
    assert says("smallest_divisor", values) == said


def test_entropy_is_told_as_a_number_of_tokens():
    values = {"a": [math.log(4), math.log(16)], "b": [0.0, 0.0]}
    assert says("attention_entropy", values) == (
        "It is as wide as an even look at so many tokens: a 8.00, b 1.00."
    )


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        (
            "attention_span",
            {"a": [1, 3], "b": [10, 20], "c": [5, 5]},
            "b looks farthest back: 15.0 tokens in the mean over layers; a nearest: 2.00.",
        ),
        (
            "attention_span",
            {"a": [1, 3], "b": [3, 1]},
            "No difference between a and b: 2.00 tokens in the mean over layers.",
        ),
        (
            "state_norm",
            {"a": [6, 2], "b": [3, 1]},
            "a has the largest state: 4.00 (norm) in the mean over layers; b the smallest: 2.00.",
        ),
        (
            "state_norm",
            {"a": [6, 2]},
            "a has the largest state: 4.00 (norm) in the mean over layers.",
        ),
        (
            "state_rank",
            {"a": [6, 2], "b": [30, 1]},
            "b uses most directions of its state: 15.5 of them in the mean over layers; a fewest: "
            "4.00.",
        ),
        (
            "state_rank",
            {"a": [4.001], "b": [4.0], "c": [3.999]},
            "No difference between a, b and c: 4.00 of them in the mean over layers.",
        ),
    ],
)
def test_who_has_the_most_and_the_least(kind, values, said):
    assert says(kind, values) == said


def test_half_lives():
    assert says("half_life", {"a": [30, 2.5, 7], "b": [4, 4]}) == (
        "By its decay alone, half of what a layer wrote is gone after so many tokens: a 2.50 to "
        "30.0, b 4.00 in all layers."
    )


def test_gradients():
    assert says("gradient_norm", {"a": [0.3, 0.1, 0.2], "b": [2, 2], "c": [0.0, 1]}) == (
        "The largest layer's is so many times the smallest's: a 3.0, b 1.00, c (the smallest is "
        "zero)."
    )


@pytest.mark.parametrize(
    ("kind", "which", "first", "last"),
    [
        ("attention_norm", "largest", "3.00", "9.00"),
        ("smallest_divisor", "smallest", "1.00", "5.00"),
        ("attention_entropy", "mean", "2.00", "7.00"),
        ("gradient_norm", "largest", "3.00", "9.00"),
    ],
)
def test_course_of_training(kind, which, first, last):
    """Of layers at 1 and 3, then at 5 and 9; the other mixer is where it was."""
    early = {f"{kind}.layer0": 1.0, f"{kind}.layer1": 3.0}
    late = {f"{kind}.layer0": 5.0, f"{kind}.layer1": 9.0}
    other = {f"{kind}.layer0": 4.0}
    found = notes(read(rwkv7(1.4), early, other, late), read(gla(1.4), other, other))
    title = f"{inside.KINDS[kind].title} over training"
    assert found[title] == (
        f"The {which} of all layers went, in training: rwkv7 from {first} to {last}, gla stayed at "
        "4.00."
    )


def along(*values):
    return {f"state_norm.layer0.token{64 * (n + 1)}": v for n, v in enumerate(values)} | {
        "state_norm.layer0": values[-1]
    }


@pytest.mark.parametrize(
    ("one", "two", "said"),
    [
        ((1, 2, 3, 4), (1, 2, 4, 4.9), "still grows in rwkv7 and gla"),
        ((1, 2, 3, 4), (9, 8, 4, 4.7), "still grows in rwkv7, has settled in gla"),
        ((1, 2, 4, 4), (9, 8, 4, 3.5), "has settled in rwkv7 and gla"),
        ((1, 2, 4, 3.3), (9, 8, 4, 4), "still shrinks in rwkv7, has settled in gla"),
    ],
)
def test_states_along_the_text(one, two, said):
    found = notes(read(rwkv7(1.4), along(*one)), read(gla(1.4), along(*two)))
    assert found["Norm of the state along the text"] == (
        f"In the last quarter of the text the state norm {said}."
    )


def test_a_state_that_was_read_once_has_no_course():
    assert notes(read(rwkv7(1.4), along(3)))["Norm of the state along the text"] == ""


def test_sentences_stand_under_the_titles_of_their_charts():
    models = [read(attention(1.4), {"attention_entropy.layer0": 0.0})]
    assert inside.sentences(models) == [
        "Entropy of the attention by layer: It is as wide as an even look at so many tokens: "
        "attention 1.00."
    ]


def heat_map(title, *layers):
    return {
        "title": title,
        "words": ["We", " are", "."],
        "layers": dict(zip("03", layers, strict=False)),
    }


def test_heat_maps_say_how_much_a_token_takes_from_itself():
    """The last number of each row: 1, 0.5 and 0 are a half in the mean, and 1, 1 and 1 are 1."""
    half = ["1000", "500 500", "300 700 0"]
    whole = ["1000", "0 1000", "0 0 1000"]
    text = heat.note([heat_map("softmax", half), heat_map("gla", half, whole)])
    assert text == (
        "Each row is a token of “We are.” (query); its shade says what share it takes of each "
        "token up to it (key), the mean over heads of absolute weights; the token itself, on the "
        "diagonal, gives on average: softmax 50 % and gla 75 %."
    )
    assert heat.note([heat_map("gla", whole)]).endswith("on average: gla 100 %.")
    assert heat.note([heat_map("a", half), heat_map("b", half)]).endswith("a 50 % and b 50 %.")


def test_heat_maps_stand_by_layer_with_softmax_first():
    models = [
        {"attention": [heat_map("gla", ["1000"], ["1000"])]},
        {"attention": None},
        {"attention": [heat_map("softmax, same q and k", ["1000"])]},
    ]
    maps = heat.attention_of(models)
    assert [one["title"] for one in maps] == ["softmax, same q and k", "gla"]
    (first, one), (second, two) = heat.figures(maps, "map")
    assert (first, second) == ("Attention of softmax, same q and k", "Attention of gla")
    assert one.count("<svg") == 1
    assert two.count("<svg") == 2
    assert "layer 0</span>" in two
    assert "layer 3</span>" in two
