"""One signature a family, and one sentence for each mistake."""

import inspect

import pytest
import torch
from helpers import Case, every_way, has_heads, make_inputs, way

from model.ops import FORMS, OPS

every_form = pytest.mark.parametrize("form", FORMS)
every_op = pytest.mark.parametrize("op", OPS)


@every_way(*OPS)
def test_all_forms_take_the_same_arguments(op, form):
    expected = dict(inspect.signature(OPS[op].recurrent).parameters)
    actual = dict(inspect.signature(way(op, form)).parameters)
    if form == "chunked":
        chunk_size = actual.pop("chunk_size")
        assert chunk_size.kind == chunk_size.KEYWORD_ONLY
        assert chunk_size.default >= 1
    assert actual == expected
    kinds = {name: parameter.kind for name, parameter in actual.items()}
    positional = ["q", "k", "v"] if has_heads(op) else ["k", "v"]
    assert [*kinds][: len(positional)] == positional
    assert set([*kinds.values()][len(positional) :]) == {inspect.Parameter.KEYWORD_ONLY}
    if has_heads(op):
        assert actual["scale"].default == 1.0


@every_op
def test_an_unknown_form_is_refused(op):
    with pytest.raises(ValueError, match="form must be one of parallel, chunked, recurrent"):
        OPS[op].form("fast")


@pytest.mark.parametrize("size", [0, -1])
@every_op
def test_chunk_size_must_be_positive(op, size):
    with pytest.raises(ValueError, match=f"chunk_size must be at least 1, but is {size}"):
        OPS[op].chunked(**make_inputs(op, Case()), chunk_size=size)


def bad(**changes):
    """A change of the inputs by name, each from the input of that name or that of k."""
    return lambda x: {n: change(x.get(n, x["k"])) for n, change in changes.items()}


MISTAKES = {
    "three_axes": (bad(k=lambda k: k[0]), r"k and v must be \[B, T, H, K\]"),
    "k_and_v_differ": (bad(v=lambda v: v[:, 1:]), r"k and v must be .* \[2, 16, 2, 12\]"),
    "value_with_three_axes": (bad(v=lambda v: v[..., 0]), "k and v must be"),
    "no_tokens": (
        bad(q=lambda x: x[:, :0], k=lambda x: x[:, :0], v=lambda x: x[:, :0]),
        "at least one token",
    ),
    "q": (
        bad(q=lambda q: q[..., 1:]),
        r"q must be \[2, 17, 2, 8\] as k is, but is \[2, 17, 2, 7\]",
    ),
    "reset_shape": (
        bad(reset=lambda k: torch.zeros(2, 16, dtype=torch.bool)),
        r"reset must be a bool tensor \[2, 17\], but is torch.bool \[2, 16\]",
    ),
    "reset_dtype": (
        bad(reset=lambda k: torch.zeros(2, 17)),
        r"reset must be a bool tensor \[2, 17\], but is torch.float32",
    ),
    "a": (bad(a=lambda a: a[:, 1:]), r"a must be \[2, 17, 2, 8\] as k is"),
    "b": (bad(b=lambda b: b[..., :1]), r"b must be \[2, 17, 2, 8\] as k is"),
    "log_decay": (
        bad(log_decay=lambda k: -k[..., :1].abs()),
        r"log_decay must be \[2, 17, 2\] or \[2, 17, 2, 8\], but is \[2, 17, 2, 1\]",
    ),
    "bonus": (
        bad(bonus=lambda k: k[0, 0, :, 1:]),
        r"bonus must be \[H, K\] = \[2, 8\], but is \[2, 7\]",
    ),
}


@every_way(*(op for op in OPS if has_heads(op)))
@pytest.mark.parametrize("mistake", MISTAKES)
def test_shapes_that_do_not_fit_are_refused(op, mistake, form):
    change, message = MISTAKES[mistake]
    function, inputs = way(op, form), make_inputs(op, Case())
    changed = change(inputs)
    if not changed.keys() <= inspect.signature(function).parameters.keys():
        with pytest.raises(TypeError, match="unexpected keyword"):
            function(**inputs | changed)
        return
    if op == "delta" and mistake == "no_tokens":
        changed |= {n: inputs[n][:, :0] for n in ("a", "b")}
    with pytest.raises(ValueError, match=message):
        function(**inputs | changed)


CHANNEL_MISTAKES = {
    "with_heads": (bad(k=lambda k: k[..., None]), r"k and v must both be \[B, T, D\]"),
    "one_axis_short": (bad(k=lambda k: k[0], v=lambda v: v[0]), "k and v must both be"),
    "k_and_v_differ": (bad(v=lambda v: v[:, 1:]), r"k and v must both .* \[2, 16, 8\]"),
    "no_tokens": (bad(k=lambda k: k[:, :0], v=lambda v: v[:, :0]), "at least one token"),
    "reset_shape": (
        bad(reset=lambda k: torch.zeros(2, 16, dtype=torch.bool)),
        r"reset must be a bool tensor \[2, 17\], but is torch.bool \[2, 16\]",
    ),
    "log_decay_with_time": (
        bad(log_decay=lambda g: g.expand(2, 17, 8)),
        r"log_decay must be \[D\] = \[8\], but is \[2, 17, 8\]",
    ),
    "bonus": (bad(bonus=lambda u: u[1:]), r"bonus must be \[D\] = \[8\], but is \[7\]"),
    "initial_state": (
        bad(initial_state=lambda state: state._replace(den=state.den[:, :1])),
        r"initial_state.den must be \[2, 8\], but is \[2, 1\]",
    ),
}


@every_way("wkv4")
@pytest.mark.parametrize("mistake", CHANNEL_MISTAKES)
def test_shapes_of_channels_that_do_not_fit_are_refused(op, mistake, form):
    change, message = CHANNEL_MISTAKES[mistake]
    inputs = make_inputs("wkv4", Case(state=True))
    with pytest.raises(ValueError, match=message):
        way(op, form)(**inputs | change(inputs))


@every_way("additive", "delta")
def test_a_transposed_state_is_refused(op, form):
    inputs = make_inputs(op, Case(state=True))
    inputs["initial_state"] = inputs["initial_state"].mT
    message = r"initial_state must be \[2, 2, 8, 12\], but is \[2, 2, 12, 8\]"
    with pytest.raises(ValueError, match=message):
        way(op, form)(**inputs)


@every_way("additive")
def test_a_normalised_state_has_one_column_more(op, form):
    inputs = make_inputs(op, Case(state=True)) | {"normalize": True}
    with pytest.raises(ValueError, match=r"initial_state must be \[2, 2, 8, 13\]"):
        way(op, form)(**inputs)


@every_form
@pytest.mark.parametrize("field", ["key", "value"])
def test_a_cache_of_another_shape_is_refused(form, field):
    inputs = make_inputs("attention", Case(state=True))
    cache = inputs["initial_state"]
    inputs["initial_state"] = cache._replace(**{field: getattr(cache, field)[..., 1:]})
    with pytest.raises(ValueError, match=r"the cache holds keys .* do not fit"):
        OPS["attention"].form(form)(**inputs)
