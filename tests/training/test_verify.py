"""`ebb verify` passes what is right, and catches what is planted: in an op, a form or a mixer."""

import functools
import json
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import pytest
import torch
from model_helpers import random_model, small_config
from runs import TINY, ebb, only_line, write_text
from torch import Tensor, nn

from model.config import MixerOptions, ModelConfig
from model.language_model import LanguageModel
from model.layers import MIXERS, TRANSFORMER, Mixer
from model.layers.attention import AttentionOptions
from model.layers.channel_mix import SwiGLU
from model.layers.layer import Layer
from model.ops import FORMS, OPS, Op, native
from train.verify import command, verify
from train.verify.command import every_mixer
from train.verify.running import map_tensors


def late_decay(function):
    @functools.wraps(function)
    def wrapped(*args, log_decay=None, **rest):
        if log_decay is not None:
            log_decay = torch.cat([torch.zeros_like(log_decay[:, :1]), log_decay[:, :-1]], dim=1)
        return function(*args, log_decay=log_decay, **rest)

    return wrapped


def lost_gradient_of_state(function):
    @functools.wraps(function)
    def wrapped(*args, initial_state=None, **rest):
        return function(*args, initial_state=map_tensors(torch.detach, initial_state), **rest)

    return wrapped


def transposed_state(function):
    """Seen by the values alone where K = V."""

    @functools.wraps(function)
    def wrapped(*args, **rest):
        o, state = function(*args, **rest)
        return o, state.mT

    return wrapped


BUGS = (late_decay, lost_gradient_of_state, transposed_state)
bugs = pytest.mark.parametrize("bug", BUGS)


def failed(report):
    """`(check, form, dtype)` of all cells beyond their tolerance."""
    return {(cell.check, cell.form, cell.dtype) for cell in report.cells if not cell.ok}


def test_an_op_passes():
    report = verify(OPS["wkv4"], dtypes=(torch.float64,))
    assert report.ok, report.worst.sentence()
    found = {(cell.form, cell.dtype) for cell in report.cells}
    compiled = ("native",) if native.is_available() else ()
    assert found == {(form, "float64") for form in (*FORMS, *compiled)}
    assert {c.check for c in report.cells} >= {"lengths", "definition", "split", "resets", "slopes"}


@pytest.mark.parametrize(("bug", "form"), [*zip(BUGS, FORMS, strict=True)])
def test_a_bug_in_one_form_of_an_op_is_caught(bug, form):
    op = OPS["additive"]._replace(**{form: bug(getattr(OPS["additive"], form))})
    wrong = failed(verify(op, dtypes=(torch.float32,)))
    assert wrong
    if form != "recurrent":  # from which everything else would be off
        assert {found for _, found, _ in wrong} == {form}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_bug_in_one_dtype_of_the_recurrent_form_is_caught(dtype):
    right, wrong = OPS["delta"].recurrent, lost_gradient_of_state(OPS["delta"].recurrent)

    @functools.wraps(right)
    def recurrent(q, *args, **rest):
        return (wrong if q.dtype == dtype else right)(q, *args, **rest)

    report = verify(OPS["delta"]._replace(recurrent=recurrent), dtypes=(dtype,))
    assert not report.ok


@bugs
def test_a_bug_that_all_forms_of_an_op_share_is_caught(bug):
    """The definition has it too: cuts, documents and slopes tell."""
    report = verify(Op(*map(bug, OPS["additive"])), dtypes=(torch.float64,))
    assert {check for check, _, _ in failed(report)} & {"split", "resets", "slopes"}


def test_an_op_of_the_table_is_held_against_its_formula(monkeypatch):
    """A decay that comes after the write is a recurrence too, but another one."""

    def wrong(function):
        @functools.wraps(function)
        def wrapped(q, k, v, *, log_decay=None, **rest):
            if log_decay is not None:
                g = log_decay if log_decay.dim() == 4 else log_decay[..., None]
                k = k * g.clamp(min=-1000).exp()
            return function(q, k, v, log_decay=log_decay, **rest)

        return wrapped

    op = Op(*map(wrong, OPS["additive"]))
    monkeypatch.setitem(OPS, "additive", op)
    wrong_checks = {check for check, _, _ in failed(verify(op, dtypes=(torch.float64,)))}
    assert wrong_checks == {"definition"}


def test_an_op_that_crashes_is_a_finding():
    def crash(**inputs):
        raise IndexError("index 9 is out of range")

    report = verify(OPS["additive"]._replace(chunked=crash), dtypes=(torch.float64,))
    assert {form for _, form, _ in failed(report)} == {"chunked"}
    assert "IndexError: index 9 is out of range" in report.worst.sentence()
    assert report.worst.to_dict()["error"] is None


class Memory(NamedTuple):
    """The state of `Fading`."""

    matrix: Tensor


@dataclass(frozen=True)
class FadingOptions(MixerOptions):
    """None but the base's."""


class Fading(Layer):
    """A user's own mixer: a decay from the data, its recurrence written by hand in two ways."""

    Options: ClassVar[type[MixerOptions]] = FadingOptions
    bug = ""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.width = 6
        self.qkv = nn.Linear(config.d_model, 3 * self.width, bias=False)
        self.decay = nn.Linear(config.d_model, 1)
        self.output = nn.Linear(self.width, config.d_model, bias=False)

    def initial_state(self, batch_size):
        weight = self.output.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        return Memory(weight.new_zeros(batch_size, self.width, self.width, dtype=wide))

    def forward(self, x, state, context):
        wide = torch.promote_types(x.dtype, torch.float32)  # sums of decays need their digits
        q, k, v = self.qkv(x).to(wide).chunk(3, dim=-1)
        g = nn.functional.logsigmoid(self.decay(x).to(wide))[..., 0]
        if self.bug == "late":
            g = torch.cat([torch.zeros_like(g[:, :1]), g[:, :-1]], dim=1)
        matrix = state.matrix.detach() if self.bug == "detached" else state.matrix
        form = self.by_steps if context.form == "recurrent" else self.at_once
        o, matrix = form(q, k, v, g, matrix, context.reset)
        return self.output(o.to(x.dtype)), Memory(matrix.mT if self.bug == "transposed" else matrix)

    @staticmethod
    def by_steps(q, k, v, g, state, reset):
        outputs = []
        for t in range(q.shape[1]):
            if reset is not None:
                state = state.masked_fill(reset[:, t, None, None], 0.0)
            state = g[:, t, None, None].exp() * state + k[:, t, :, None] * v[:, t, None]
            outputs.append((q[:, t, None] @ state)[:, 0])
        return torch.stack(outputs, dim=1), state

    @staticmethod
    def at_once(q, k, v, g, state, reset):
        time, total = q.shape[1], g.cumsum(dim=1)
        place = torch.zeros_like(g) if reset is None else reset.to(g.dtype)
        document = place.cumsum(dim=1)
        seen = torch.ones(time, time, dtype=torch.bool).tril() & (
            document[:, :, None] == document[:, None]
        )
        weights = (total[:, :, None] - total[:, None]).masked_fill(~seen, -torch.inf).exp()
        old = total.exp() * (document == 0)
        o = (q @ k.mT * weights) @ v + (q * old[..., None]) @ state
        final = old[:, -1, None, None] * state + (k * weights[:, -1, :, None]).mT @ v
        return o, final


MINE = Mixer(Fading, SwiGLU, TRANSFORMER, "", "S = w S + k v^T", "the user")


@pytest.mark.parametrize("target", [MINE, Fading], ids=["mixer", "layer"])
def test_a_mixer_that_is_in_no_table_passes(target):
    table = dict(MIXERS)
    report = verify(target)
    assert report.ok, report.worst.sentence()
    assert {c.part.rpartition(" ")[2] for c in report.cells} == (
        {"layer", "model"} if target is MINE else {"layer"}
    )
    assert table == MIXERS


@pytest.mark.parametrize("bug", ["late", "detached", "transposed"])
def test_a_bug_in_a_user_s_mixer_is_caught(bug, monkeypatch):
    monkeypatch.setattr(Fading, "bug", bug)
    report = verify(MINE, dtypes=(torch.float64,))
    wrong = {(c.part, c.check) for c in report.cells if not c.ok}
    assert {part for part, _ in wrong} == {"Fading layer", "Fading model"}
    assert ("Fading layer", "split") in wrong


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("by_steps", "the definition"),
        ("at_once", "the other forms"),
    ],
)
def test_a_bug_in_one_form_of_a_user_s_mixer_is_caught(name, problem, monkeypatch):
    right = getattr(Fading, name)

    def wrong(q, k, v, g, state, reset):
        return right(q, k, v, g, state.detach(), reset)

    monkeypatch.setattr(Fading, name, staticmethod(wrong))
    assert not verify(Fading, dtypes=(torch.float32,)).ok, problem


def test_a_model_is_checked_with_its_own_weights():
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig("rwkv7", 40, d_model=32, num_layers=2, head_dim=8))
    kept = {name: x.clone() for name, x in model.state_dict().items()}
    report = verify(model)
    assert report.ok, report.worst.sentence()
    assert {cell.part for cell in report.cells} == {"rwkv7 model"}
    assert {cell.dtype for cell in report.cells} == {"float64", "float32", "bfloat16"}
    assert all(torch.equal(x, kept[name]) for name, x in model.state_dict().items())


def test_weights_that_magnify_rounding_widen_the_tolerance_and_say_so(capsys):
    """Those of a user's model, whose sums of weights come near zero; never those drawn here."""
    options = AttentionOptions(score="relu_l1")
    config = small_config("attention", num_layers=2, options=options)
    model = random_model(config, seed=6)  # a draw whose sums do: one of eight does
    report = verify(model, dtypes=(torch.float32,))
    assert report.ok, report.worst.sentence()
    widened = [cell for cell in report.cells if cell.widened]
    assert widened
    assert all(1e-5 < cell.error <= cell.tolerance for cell in widened)
    command.show(report)
    said = capsys.readouterr().out
    assert "~ beyond the usual tolerance" in said
    assert said.count("~") == 1 + len(widened)
    drawn = verify("attention:relu_l1", dtypes=(torch.float32,))
    assert not any(cell.widened for cell in drawn.cells)


def test_a_bug_in_a_user_s_weights_is_no_rounding(monkeypatch):
    """A fault of 1e-3 in float32 alone is far above what one rounding does."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig("retnet", 40, d_model=32, num_layers=2, head_dim=8))
    for parameter in model.blocks.parameters():  # as after training: a new block adds nothing
        torch.nn.init.normal_(parameter, std=0.2)
    chunked = OPS["additive"].chunked

    def off(*args, **rest):
        o, state = chunked(*args, **rest)
        return (o * 1.001 if o.dtype == torch.float32 else o), state

    monkeypatch.setitem(OPS, "additive", OPS["additive"]._replace(chunked=off, native=None))
    assert not verify(model, dtypes=(torch.float32,)).ok


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("mamba9",), "there is no mixer 'mamba9'"),
        ((3,), "a mixer, a layer, an op or a model can be verified, but not 3"),
        ((), "give at least one target"),
    ],
)
def test_what_cannot_be_verified_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        verify(*arguments)
    with pytest.raises(ValueError, match="mode must be one of quick, full"):
        verify("gla", mode="slow")


def test_an_op_with_an_unknown_argument_is_refused():
    def recurrent(q, k, v, *, gamma, initial_state=None):
        raise AssertionError("not called")

    with pytest.raises(ValueError, match="the op needs an argument 'gamma'"):
        verify(OPS["additive"]._replace(recurrent=recurrent))


def test_every_row_of_every_table_is_named():
    names = every_mixer()
    assert len(set(names)) == len(names)
    assert {name.partition(":")[0] for name in names} == set(MIXERS)


def test_command_in_two_processes(capsys, monkeypatch):
    monkeypatch.setattr(command, "FEW", 0)
    flags = ["--mixers", "linear_transformer", "--threads", "2", "--json"]
    assert ebb("verify", *flags) == 0
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 1
    report = json.loads(shown.out)
    assert report["ok"]
    parts = {"additive op", "linear_transformer layer", "linear_transformer model"}
    assert {cell["part"] for cell in report["cells"]} == parts
    assert all(cell["ok"] and 0 <= cell["error"] <= cell["tolerance"] for cell in report["cells"])


def test_a_planted_bug_ends_in_one_sentence(capsys, monkeypatch):
    op = OPS["additive"]
    monkeypatch.setitem(OPS, "additive", op._replace(chunked=lost_gradient_of_state(op.chunked)))
    assert ebb("verify", "--mixers", "linear_transformer") == 1
    shown = capsys.readouterr()
    assert only_line(shown.err).startswith("not proven: ")
    assert "chunked form in float64" in only_line(shown.err)
    assert "!" in shown.out
    assert all(len(line) <= 100 for line in shown.out.splitlines())


def test_a_checkpoint(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text, run = write_text(tmp_path / "text.txt"), tmp_path / "run"
    flags = ["--data", text, *TINY, "--mixer", "gla", "--sample-every", "0"]
    assert ebb("train", *flags, "--steps", "2", "--out", run) == 0
    capsys.readouterr()
    assert ebb("verify", run, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert {cell["part"] for cell in report["cells"]} == {"gla model"}
    assert ebb("verify", tmp_path / "nothing") == 1
    assert "nothing" in only_line(capsys.readouterr().err)
