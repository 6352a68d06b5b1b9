"""Threads, kernels and compilation: kept by a run that goes on; compiled blocks train alike."""

import dataclasses
import json
import signal

import pytest
import torch
from marks import needs_kernels, needs_tiles
from model_helpers import small_config
from runs import TINY, ebb, metrics, only_line, repeatable

from data.loader import Batch
from model.language_model import Block, LanguageModel
from model.layers.channel_mix import SwiGLU
from model.ops import native
from model.ops.native import loading
from train import loop
from train.compiling import compile_blocks
from train.loss import next_token_loss
from train.machine import Machine
from train.precision import CPU, bf16_products, choose_precision

HINT = "from here on the numbers differ from those of a run never stopped."


@pytest.fixture
def flags(workshop):
    return [
        *("train", "--data", workshop / "text.txt", *TINY, "--mixer", "attention"),
        *("--steps", "6", "--sample-every", "0", "--log-every", "1", "--eval-every", "3"),
    ]


def machine(folder):
    return json.loads((folder / "config.json").read_text())["machine"]


def test_what_a_run_computes_with_is_written_down(flags, tmp_path):
    assert ebb(*flags, "--steps", "1", "--out", tmp_path) == 0
    assert machine(tmp_path) == {
        "threads": 1,
        "backend": "native" if native.is_available() else "torch",
        "compile": False,
        "precision": choose_precision("auto", CPU),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def interrupted_run(flags, folder, monkeypatch, *more):
    """A run that is stopped after two steps, by a signal to this process."""
    added = loop.Progress.add

    def add(progress, *args):
        added(progress, *args)
        if progress.step == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Progress, "add", add)
        assert ebb(*flags, *more, "--out", folder) == 130
    return folder


@pytest.fixture
def threads(monkeypatch):
    """Every number of threads that is asked for; there is still only one."""
    asked = [1]
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: asked[-1])
    return asked


def test_threads_are_those_of_the_run_that_goes_on(flags, tmp_path, monkeypatch, threads, capsys):
    """Not given, they were PyTorch's own choice, which another process may make otherwise."""
    plain = [*flags[: flags.index("--threads")], *flags[flags.index("--threads") + 2 :]]
    threads.append(3)
    run = interrupted_run([*plain, "--backend", "torch"], tmp_path / "run", monkeypatch)
    assert machine(run)["threads"] == 3
    threads[:] = [1]
    capsys.readouterr()
    assert ebb("train", "--resume", "--out", run) == 0
    assert threads == [1, 3]
    assert machine(run)["threads"] == 3
    assert HINT not in capsys.readouterr().err


def test_other_threads_are_taken_on_demand(flags, tmp_path, monkeypatch, threads, capsys):
    run = interrupted_run([*flags, "--backend", "torch"], tmp_path / "run", monkeypatch)
    assert ebb("train", "--resume", "--out", run, "--threads", "2") == 0
    assert threads[-1] == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"Going on with threads 2 instead of 1: {HINT}" in said
    assert machine(run)["threads"] == 2


@needs_kernels
def test_backend_is_that_of_the_run_that_goes_on(flags, tmp_path, monkeypatch):
    reference = tmp_path / "reference"
    assert ebb(*flags, "--mixer", "rwkv7", "--backend", "torch", "--out", reference) == 0
    run = interrupted_run(
        [*flags, "--mixer", "rwkv7", "--backend", "torch"], tmp_path / "run", monkeypatch
    )
    assert ebb("train", "--resume", "--out", run) == 0
    assert machine(run)["backend"] == "torch"
    assert repeatable(run) == repeatable(reference)
    own = tmp_path / "native"
    assert ebb(*flags, "--mixer", "rwkv7", "--precision", "fp32", "--out", own) == 0
    losses = [[x["loss"] for x in metrics(f) if "loss" in x] for f in (own, reference)]
    weights = [(folder / "model.safetensors").read_bytes() for folder in (own, reference)]
    assert weights[0] != weights[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert native.is_available(), "the kernels were off for one run only"


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    def take_away():
        monkeypatch.setattr(loading, "FOLDER", tmp_path)
        loading._load.cache_clear()

    yield take_away
    loading._load.cache_clear()


@needs_kernels
def test_kernels_that_are_gone_are_told(flags, tmp_path, monkeypatch, no_library, capsys):
    run = interrupted_run(flags, tmp_path / "run", monkeypatch)
    no_library()
    capsys.readouterr()
    assert ebb("train", "--resume", "--out", run) == 1
    said = only_line(capsys.readouterr().err)
    assert said.startswith("no compiled kernels: install a C++ compiler and reinstall; ")
    assert said.endswith("to train without the native kernels, add --backend torch")
    assert ebb("train", "--resume", "--out", run, "--backend", "torch") == 0
    assert f"backend torch instead of native: {HINT}" in " ".join(capsys.readouterr().err.split())


def test_another_machine_is_told(flags, tmp_path, monkeypatch, capsys):
    run = interrupted_run(flags, tmp_path / "run", monkeypatch)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ABACUS")
    capsys.readouterr()
    assert ebb("train", "--resume", "--out", run) == 0
    assert f"here it is ABACUS: {HINT}" in " ".join(capsys.readouterr().err.split())


def test_random_numbers_go_on_where_they_were(flags, tmp_path, monkeypatch):
    """As a mixer of one's own may want them: here the channel mix drops some of its values."""
    plain = SwiGLU.forward

    def forward(self, x, state, context):
        y, state = plain(self, x, state, context)
        return torch.nn.functional.dropout(y, 0.5, self.training), state

    monkeypatch.setattr(SwiGLU, "forward", forward)
    assert ebb(*flags, "--out", tmp_path / "reference") == 0
    run = interrupted_run(flags, tmp_path / "run", monkeypatch)
    torch.manual_seed(9)
    assert ebb("train", "--resume", "--out", run) == 0
    assert repeatable(run) == repeatable(tmp_path / "reference")


@pytest.fixture
def quick_compiler(monkeypatch):
    """Traces and differentiates as torch.compile does, without the C++ compiler's seconds."""
    plain = torch.nn.Module.compile
    monkeypatch.setattr(Block, "compile", lambda self: plain(self, backend="aot_eager"))
    yield
    torch.compiler.reset()


@pytest.fixture
def graphs():
    """Counts what is compiled."""
    counts = torch._dynamo.utils.counters["stats"]
    counts.clear()
    return counts


def test_compiled_blocks_train_alike_and_go_on_exactly(
    flags, tmp_path, monkeypatch, quick_compiler, graphs
):
    folders = {name: tmp_path / name for name in ("plain", "compiled", "stopped")}
    run = [*flags, "--steps", "3"]
    assert ebb(*run, "--no-compile", "--out", folders["plain"]) == 0
    assert not graphs
    assert ebb(*run, "--compile", "--out", folders["compiled"]) == 0
    assert graphs["unique_graphs"] == 2, "one with and one without the start of a document"
    assert machine(folders["compiled"])["compile"] is True
    interrupted_run([*run, "--compile"], folders["stopped"], monkeypatch)
    assert ebb("train", "--resume", "--out", folders["stopped"]) == 0
    lines = {name: repeatable(folder) for name, folder in folders.items()}
    assert lines["stopped"] == lines["compiled"]
    for one, two in zip(lines["plain"], lines["compiled"], strict=True):
        assert one == pytest.approx(two, rel=1e-4)


@needs_kernels
def test_one_compilation_serves_all_layers(quick_compiler, graphs):
    """But for RWKV-7's first layer, which gives the others its values."""
    model = LanguageModel(dataclasses.replace(small_config("rwkv7"), num_layers=4))
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    assert compile_blocks(model, [Batch(tokens, tokens, None)], pytest.fail)
    assert graphs["unique_graphs"] == 2
    assert all(parameter.grad is None for parameter in model.parameters())


@needs_tiles
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_blocks_are_compiled_in_the_precision_of_the_run(quick_compiler, graphs):
    """So that none is left to compile when training has begun."""
    model = LanguageModel(small_config("attention"))
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    batch = Batch(tokens, tokens, None)
    assert compile_blocks(model, [batch], pytest.fail, bf16=True)
    compiled = graphs["unique_graphs"]
    with bf16_products(CPU, enabled=True):
        next_token_loss(model, *batch).backward()
    assert graphs["unique_graphs"] == compiled == 1
    next_token_loss(model, *batch).backward()
    assert graphs["unique_graphs"] == 2, "the test cannot tell precisions apart"


def test_failure_to_compile_is_one_sentence_and_no_more(flags, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no C++ compiler\nwas found")

    plain = torch.nn.Module.compile
    monkeypatch.setattr(Block, "compile", lambda self: plain(self, backend=fail))
    assert ebb(*flags, "--out", tmp_path / "plain") == 0
    assert ebb(*flags, "--compile", "--out", tmp_path / "compiled") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("The blocks cannot be compiled, so training goes on without (") == 1
    assert "no C++ compiler was found" in said
    assert machine(tmp_path / "compiled")["compile"] is False
    assert repeatable(tmp_path / "compiled") == repeatable(tmp_path / "plain")


def test_compiled_run_does_not_go_on_uncompiled_by_itself(
    flags, tmp_path, monkeypatch, quick_compiler, capsys
):
    run = interrupted_run([*flags, "--compile"], tmp_path / "run", monkeypatch)

    def fail(*_):
        raise RuntimeError("no C++ compiler")

    plain = torch.nn.Module.compile
    monkeypatch.setattr(Block, "compile", lambda self: plain(self, backend=fail))
    capsys.readouterr()
    assert ebb("train", "--resume", "--out", run) == 1
    said = only_line(capsys.readouterr().err)
    assert "no C++ compiler" in said
    assert said.endswith("to go on without, add --no-compile")
    assert ebb("train", "--resume", "--out", run, "--no-compile") == 0
    assert f"compile False instead of True: {HINT}" in " ".join(capsys.readouterr().err.split())


@pytest.fixture
def tiles(monkeypatch):
    """Gives the CPU tiles of bfloat16, or takes them."""

    def switch(on):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": on})
        assert choose_precision("auto", CPU) == ("bf16" if on else "fp32")

    return switch


@needs_kernels
@pytest.mark.parametrize("is_recorded", [True, False])
def test_precision_is_that_of_the_run_that_goes_on(
    flags, tmp_path, monkeypatch, tiles, capsys, is_recorded
):
    """Of one that was begun when there was no choice, too."""
    tiles(on=False)
    assert ebb(*flags, "--out", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        if not is_recorded:
            to_dict = Machine.to_dict

            def without(machine):
                return {k: v for k, v in to_dict(machine).items() if k != "precision"}

            patch.setattr(Machine, "to_dict", without)
        run = interrupted_run(flags, tmp_path / "run", monkeypatch)
        assert ("precision" in machine(run)) == is_recorded
    tiles(on=True)
    capsys.readouterr()
    assert ebb("train", "--resume", "--out", run) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "1 threads, fp32 ->" in said
    assert HINT not in said
    assert machine(run)["precision"] == "fp32"
    assert repeatable(run) == repeatable(tmp_path / "whole")


@needs_kernels
def test_precision_that_is_asked_for_replaces_the_old_one(
    flags, tmp_path, monkeypatch, tiles, capsys
):
    tiles(on=True)
    run = interrupted_run(flags, tmp_path / "run", monkeypatch)
    capsys.readouterr()
    assert ebb("train", "--resume", "--precision", "fp64", "--out", run) == 1
    assert only_line(capsys.readouterr().err).startswith(
        f"The run in {run} was made with precision bf16, not fp64: "
    )
    assert ebb("train", "--resume", "--precision", "fp32", "--out", run) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"Going on with precision fp32 instead of bf16: {HINT}" in said
    assert machine(run)["precision"] == "fp32"


@needs_kernels
def test_bf16_that_a_run_did_not_ask_for_ends_where_it_is_slow(
    flags, tmp_path, monkeypatch, tiles, capsys
):
    tiles(on=True)
    run = interrupted_run(flags, tmp_path / "run", monkeypatch)
    assert machine(run)["precision"] == "bf16"
    tiles(on=False)
    capsys.readouterr()
    assert ebb("train", "--resume", "--out", run) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"Going on with precision fp32 instead of bf16, which is slow here: {HINT}" in said
    assert machine(run)["precision"] == "fp32"
