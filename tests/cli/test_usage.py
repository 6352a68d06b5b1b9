"""What the command line says of itself, and of what it does not understand."""

import dataclasses
import importlib
import re
import subprocess
import sys

import pytest
from runs import ebb, only_line

from train.cli import COMMANDS


def plain(text):
    """Without colours and frames, on one line."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[─│╭╮╰╯]", " ", text).split())


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_names_every_flag(name, capsys):
    assert ebb(name, "--help") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    command = COMMANDS[name]
    text = plain(shown.out)
    assert text.startswith(f"usage: ebb {name}")
    config = getattr(importlib.import_module(command.module), command.config)
    for field in dataclasses.fields(config):
        if field.name not in ("checkpoint", "source", "target", "task"):
            assert f"--{field.name.replace('_', '-')} " in text.replace(",", " ")


def test_flags_that_people_rely_on(capsys):
    relied_on = {
        "train": "mixer size data tokenizer steps batch-size context seed threads out resume",
        "generate": "prompt tokens seed temperature",
        "compare": "mixers size data budget seeds out",
        "eval": "data json context extrapolate plot",
        "convert": "tokenizer group-norm-eps",
        "info": "json",
        "verify": "mixers quick full json",
        "bench": "mixers size context against weights threads json out",
    }
    for name, flags in relied_on.items():
        assert ebb(name, "-h") == 0
        text = plain(capsys.readouterr().out)
        assert all(f"--{flag}" in text for flag in flags.split())
        assert ("CHECKPOINT" in text) == (name in ("eval", "generate", "info", "verify"))
        assert (" SRC DST " in text) == (name == "convert")


def test_overview(capsys):
    assert ebb("--help") == 0
    shown = capsys.readouterr()
    assert all(f"  {name} " in shown.out for name in COMMANDS)
    assert ebb() == 2
    assert capsys.readouterr().out == shown.out
    assert ebb("--version") == 0
    assert re.fullmatch(r"ebb \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_overview_answers_without_loading_torch():
    script = """if True:
        import sys
        from train.cli import main
        assert main(["--help"]) == 0
        assert main(["--version"]) == 0
        assert main(["unknown"]) == 2
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["trian"], "there is no command 'trian'; choose one of demo, train, "),
        (["--verbose"], "there is no command '--verbose'; choose one of "),
        (
            ["train", "--mixer", "mamba9"],
            "there is no mixer 'mamba9'; choose one of attention, ",
        ),
        (
            ["train", "--mixer", "rwkv7:softmax"],
            "rwkv7:softmax: 'softmax' is no option of this ",
        ),
        (["train", "--mixer", "attention:"], "'attention:' has nothing after the colon"),
        (
            ["train", "--size", "huge"],
            "there is no size 'huge'; choose one of nano, micro, tiny, small",
        ),
        (["train", "--steps", "0"], "steps must be at least 1, but is 0"),
        (["train", "--batch-size", "-1"], "batch-size must be at least 1, but is -1"),
        (["train", "--seed", "-1"], "seed must be at least 0, but is -1"),
        (["train", "--learning-rate", "0"], "learning-rate must be above 0, but is 0.0"),
        (["train", "--learning-rate", "nan"], "learning-rate must be above 0, but is nan"),
        (["train", "--weight-decay", "nan"], "weight-decay must be at least 0, but is nan"),
        (
            ["train", "--precision", "fp16"],
            "there is no precision 'fp16'; choose one of auto, fp32, bf16, fp64",
        ),
        (["compare", "--mixers", "rwkv7,rwkv7"], "mixers must be different, but are 'rwkv7"),
        (["compare", "--mixers", "rwkv7,"], "there is no mixer ''; choose one of "),
        (["compare", "--size", "big"], "there is no size 'big'; choose one of nano, "),
        (
            ["compare", "--budget", "soon"],
            "budget must be like 500-steps, 20M-tokens, 1e15-flops or",
        ),
        (["compare", "--contexts", "1k,x"], "contexts must be numbers such as 128 or 4k, but one"),
        (["compare", "--seeds", "0"], "seeds must be at least 1, but is 0"),
        (
            ["compare", "--budget", "9k-tokens", "--batch-size", "0"],
            "batch-size must be at least 1, but is 0",
        ),
        (["compare", "--threads", "0"], "threads must be at least 1, but is 0"),
        (
            ["demo", "--budget", "4 minutes"],
            "budget must be like 500-steps, 20M-tokens, 1e15-flops or",
        ),
        (["compare", "--prompt", ""], "prompt must not be empty"),
        (["compare", "--mixers", "attention,softmax"], "mixers must be different"),
        (["train", "--warmup", "9", "--steps", "9"], "warmup must be less than the 9 steps, not 9"),
        (["train", "--learning-rate", "inf"], "learning-rate must be above 0"),
        (["train", "--optimizer", "sgd"], "there is no optimizer 'sgd'; choose one of adamw, muon"),
        (["train", "--schedule", "step"], "there is no schedule 'step'; choose one of cosine, wsd"),
        (["train", "--recipe", "gpu"], "there is no recipe 'gpu'; choose one of cpu-2min, "),
        (["train", "--dropout", "1"], "dropout must be at least 0 and below 1, but is 1.0"),
        (["train", "--final-fraction", "-1"], "final-fraction must be at least 0 and below 1, but"),
        (["train", "--find-lr", "--carry-state"], "--find-lr reads windows in any order"),
        (["train", "--find-lr", "--resume"], "choose one of --find-lr and --resume"),
        (["train", "--size", "4x100"], "there is no size '4x100'; choose one of nano, micro, tiny"),
        (["demo", "--threads", "0"], "threads must be at least 1, but is 0"),
        (["eval", "x", "--split", "test"], "split must be validation, train or all, but is 'test'"),
        (["eval", "x", "--stretch", "0"], "stretch must be at least 1, but is 0"),
        (["eval", "x", "--max-tokens", "1"], "max-tokens must be at least 2, but is 1"),
        (["eval", "x", "--threads", "0"], "threads must be at least 1, but is 0"),
        (["eval", "x", "--context", "0"], "context must be at least 1, but is 0"),
        (["eval", "x", "--extrapolate", "1"], "extrapolate must be 2, 4, 8, 16, 32, ..., but is 1"),
        (["eval", "x", "--extrapolate", "12"], "extrapolate must be 2, 4, 8, 16, 32, ..., but is "),
        (["eval", "x", "--plot", "p.png"], "plot is what --extrapolate draws: add --extrapolate "),
        (
            ["eval", "x", "--extrapolate", "2", "--plot", "p.pdf"],
            "plot must be the name of a .png, but is 'p.pdf'",
        ),
        (
            ["verify", "--mixers", "gla,mamba9"],
            "there is no mixer 'mamba9'; choose one of attention",
        ),
        (["verify", "--quick", "--full"], "choose one of --quick and --full"),
        (["verify", "--threads", "0"], "threads must be at least 1, but is 0"),
        (["generate", "x", "--tokens", "-1"], "tokens must be at least 0, but is -1"),
    ],
)
def test_bad_value_is_told_in_one_sentence(args, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ebb(*args) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert only_line(shown.err).startswith(said)
    assert shown.err == f"ebb: {only_line(shown.err)}\n"
    assert not list(tmp_path.iterdir()), "something was written"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["train", "--setps", "3"], "Unrecognized options: --setps"),
        (["train", "extra"], "extra"),
        (["train", "--steps", "many"], "Error parsing --steps: invalid literal for int()"),
        (["train", "--steps"], "--steps"),
        (["eval"], "CHECKPOINT"),
        (["info", "a", "b"], "b"),
    ],
)
def test_flag_that_cannot_be_read_is_named(args, said, capsys):
    assert ebb(*args) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in plain(shown.err)
    assert "Traceback" not in shown.err
    assert f"ebb {args[0]} --help" in plain(shown.err)
