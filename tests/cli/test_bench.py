"""`ebb bench`: what it measures, what it makes of that, and what it refuses."""

import importlib.util
import json
import multiprocessing
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import tyro
from marks import needs_kernels, needs_tiles
from runs import ebb, only_line

from model.config import parse_size
from model.language_model import LanguageModel
from model.ops import OPS, native
from train.bench import command, machine, memory
from train.bench.command import BenchConfig, jobs_of
from train.bench.contenders import shape_of
from train.bench.growth import save_growth_plots
from train.bench.machine import Machine
from train.bench.rows import Row, cells
from train.benchmark import burst, take_turns
from train.matching import num_parameters
from train.precision import CPU, choose_precision

TINY = ["--size", "1x64", "--vocab-size", "50", "--seconds", "0", "--threads", "1"]
ROW = {
    *("task", "mixer", "d_model", "num_layers", "vocab_size", "context", "batch", "weights"),
    *("tokens_per_s", "gflops", "fraction_of_gemm", "fraction_of_bandwidth", "peak_memory_bytes"),
}


@pytest.fixture(autouse=True)
def _small_probe(monkeypatch):
    monkeypatch.setattr(machine, "PLAIN", 2**24)


def read(capsys, *args):
    capsys.readouterr()
    assert ebb("bench", *args, "--json") == 0
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 1
    report = json.loads(shown.out)
    assert {"gemm_gflops", "bandwidth_gbs", "threads"} <= set(report["machine"])
    assert report["machine"]["threads"] == 1
    assert min(report["machine"]["gemm_gflops"], report["machine"]["bandwidth_gbs"]) > 0.1
    for row in report["rows"]:
        assert set(row) >= ROW
        assert 0 < row["tokens_per_s_low"] <= row["tokens_per_s"] <= row["tokens_per_s_high"]
    return report


def test_training_counts_six_operations_a_weight(capsys, tmp_path):
    out = tmp_path / "speed.json"
    flags = [*TINY, "--mixers", "rwkv7,attention", "--context", "64,16", "--batch-size", "2"]
    report = read(capsys, "train", *flags, "--no-memory", "--out", out)
    assert json.loads(out.read_text()) == report
    rows = report["rows"]
    assert [(row["context"], row["mixer"]) for row in rows] == [
        (context, mixer) for context in (16, 64) for mixer in ("rwkv7", "attention")
    ]
    model = LanguageModel(shape_of("rwkv7", parse_size("1x64"), 50))
    for row in rows:
        shape = (row["num_layers"], row["d_model"], row["vocab_size"], row["batch"])
        assert shape == (1, 64, 50, 2)
        assert row["parameters"] == pytest.approx(model.num_parameters(), rel=0.02)
        multiplied = row["parameters"] - 50 * 64
        assert row["gflops"] == pytest.approx(6e-9 * multiplied * row["tokens_per_s"])
        assert 0 < row["fraction_of_gemm"] < 1
        assert row["fraction_of_bandwidth"] is None
        assert row["peak_memory_bytes"] is None
    assert (tmp_path / "speed-train.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_prompt_needs_the_head_once(capsys):
    (row,) = read(capsys, "prefill", *TINY, "--mixers", "gla", "--context", "40", "--no-memory")[
        "rows"
    ]
    multiplied = row["parameters"] - 2 * 50 * 64
    assert row["gflops"] == pytest.approx(2e-9 * multiplied * row["tokens_per_s"])
    assert row["batch"] == 1


@needs_kernels
def test_decoding_in_every_format(capsys):
    report = read(capsys, "decode", *TINY, "--mixers", "rwkv7,attention", "--no-memory")
    rows = {(row["mixer"], row["weights"]): row for row in report["rows"]}
    formats = ["fp32", "bf16", "int8", "int4"]
    assert list(rows) == [*(("rwkv7", name) for name in formats), ("attention", "fp32")]
    sizes = [
        rows["rwkv7", name]["bytes_per_s"] / rows["rwkv7", name]["tokens_per_s"] for name in formats
    ]
    assert sizes == sorted(sizes, reverse=True)
    parameters = rows["rwkv7", "fp32"]["parameters"] - 50 * 64
    assert 4 * parameters < sizes[0] < 6 * parameters
    for row in rows.values():
        assert 0 < row["fraction_of_bandwidth"] < 2


def test_without_kernels_everything_is_there_but_the_native_rows(capsys, monkeypatch):
    monkeypatch.setattr(native, "is_available", lambda: False)
    report = read(capsys, "decode", *TINY, "--mixers", "rwkv7", "--no-memory")
    assert [row["weights"] for row in report["rows"]] == ["fp32"]
    report = read(capsys, "ops", "--context", "16", "--seconds", "0", "--threads", "1")
    assert {row["form"].split(",")[0] for row in report["rows"]} == {"chunked", "recurrent"}


def test_ops(capsys):
    rows = read(capsys, "ops", "--context", "32", "--seconds", "0", "--threads", "1")["rows"]
    assert list(dict.fromkeys(row["mixer"] for row in rows)) == list(OPS)
    for row in rows:
        flops = {"additive": 5, "delta": 9}.get(row["mixer"])
        if flops is not None:
            flops *= 8 * 64 * 64 * (3 if row["form"].endswith("backward") else 1)
            assert row["gflops"] == pytest.approx(1e-9 * flops * row["tokens_per_s"])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
def test_peak_memory_is_that_of_the_row_alone(capsys):
    """At least the logits and their gradient; what this process holds is not counted."""
    held = torch.ones(64 * 2**20)
    flags = [*TINY, "--mixers", "attention", "--context", "2k", "--batch-size", "8"]
    (row,) = read(capsys, "train", *flags, "--vocab-size", "300")["rows"]
    assert 2 * 8 * 2048 * 300 * 4 < row["peak_memory_bytes"] < held.numel() * 4


@pytest.mark.filterwarnings("ignore")  # theirs
def test_other_libraries_take_part(capsys):
    flags = [*TINY, "--size", "2x64", "--mixers", "rwkv7", "--context", "4", "--no-memory"]
    rows = read(capsys, "decode", *flags, "--weights", "fp32", "--against", "transformers,rwkv")
    names = ["rwkv7", "rwkv4 (transformers)", "mamba2 (transformers)", "llama (transformers)"]
    assert [row["mixer"] for row in rows["rows"]] == [*names, "rwkv7 (rwkv)"]
    ours, theirs = rows["rows"][0], rows["rows"][-1]
    assert ours["parameters"] == theirs["parameters"]
    report = read(capsys, "train", *flags, "--batch-size", "2", "--against", "transformers")
    assert [row["mixer"] for row in report["rows"]] == names[:3]


def test_library_that_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert ebb("bench", "decode", "--against", "rwkv") == 1
    said = only_line(capsys.readouterr().err)
    assert said == "rwkv is not installed: `pip install rwkv`, or leave out --against rwkv"


def test_tables(capsys):
    flags = ["prefill", *TINY, "--mixers", "retnet", "--context", "8,16", "--no-memory"]
    assert ebb("bench", *flags, "--markdown") == 0
    heading, rule, *lines = capsys.readouterr().out.splitlines()
    assert heading.startswith("| model | shape | vocabulary | parameters | context | tokens/s |")
    assert rule.count("|") == heading.count("|") == lines[0].count("|")
    assert [line.split(" | ")[4] for line in lines[:2]] == ["8", "16"]
    assert "GFLOP/s" in lines[-1]
    assert ebb("bench", *flags) == 0
    shown = capsys.readouterr().out
    assert "Reading a prompt" in shown
    assert "1 x 64" in shown


def test_what_is_measured_when_nothing_is_said():
    micro, wide = jobs_of("train", BenchConfig("train"))
    assert [(job.contender.mixer, job.context) for job in micro] == [
        (mixer, context) for context in (256, 1024, 4096) for mixer in ("rwkv7", "attention")
    ]
    assert [job.batch_size for job in micro] == [8, 8, 2, 2, 1, 1]
    for group, width in ((micro, 256), (wide, 512)):
        counts = {num_parameters(job.contender.shape) for job in group}
        assert max(counts) < 1.02 * min(counts)
        assert {job.contender.shape.d_model for job in group} == {width}
    (decoding,) = jobs_of("decode", BenchConfig("decode"))
    shape = decoding[0].contender.shape
    assert (shape.num_layers, shape.d_model, shape.vocab_size) == (12, 768, 65_536)
    if native.is_available():
        assert [job.contender.weights for job in decoding] == ["fp32", "bf16", "int8", "int4"]


def test_the_commands_of_the_page_can_be_run():
    page = (Path(__file__).parents[2] / "train" / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^ebb bench (.+)$", page, re.MULTILINE)
    assert len(commands) > 5
    for flags in commands:
        config = tyro.cli(BenchConfig, args=flags.split())
        assert config.markdown
        if config.task != "ops":
            assert jobs_of(config.task, config)


def test_turns_alternate_and_the_first_is_not_counted():
    order = []

    def run(name):
        order.append(name)
        return [float(len(order))]

    found = take_turns({name: lambda name=name: run(name) for name in "ab"}, rounds=2)
    assert order == list("ababab")
    assert found == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_turns_go_on_until_the_time_is_up():
    found = take_turns({"a": lambda: [time.sleep(0.01) or 0.01]}, rounds=1, seconds=0.1)
    assert 5 < len(found["a"]) < 12


def test_a_burst_starts_from_the_same_text():
    begun = []
    turn = burst(lambda: begun.append([]) or begun[-1].append, 7)
    assert [len(turn()) for _ in range(2)] == [10, 10]
    assert [len(tokens) for tokens in begun] == [13, 13]
    assert all(token.shape == (1,) and 0 <= token < 7 for token in begun[0])


def test_plain_reads_touch_all_of_the_memory():
    """Twice as many bytes take about twice as long."""
    host, token = Machine(), torch.zeros(1)
    large, small = host.reading(64 * 2**20)(), host.reading(8 * 2**20)()

    def best(read):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            read(token)
            times.append(time.perf_counter() - start)
        return min(times)

    assert best(large) > 3 * best(small)


@pytest.mark.parametrize("precision", ["fp32", None, pytest.param("bf16", marks=needs_tiles)])
def test_products_are_compared_with_those_of_the_same_precision(capsys, precision):
    asked = [] if precision is None else ["--precision", precision]
    report = read(capsys, "train", *TINY, "--mixers", "gla", "--context", "64", *asked)
    chosen = precision or choose_precision("auto", CPU)
    (row,) = report["rows"]
    assert row["precision"] == chosen
    rates = {"fp32": "gemm_gflops", "bf16": "gemm_gflops_bf16"}
    gemm = report["machine"][rates[chosen]]
    assert row["fraction_of_gemm"] == pytest.approx(row["gflops"] / gemm, rel=0.7)
    assert (report["machine"]["gemm_gflops_bf16"] is None) == (chosen == "fp32")


@needs_tiles
def test_tiles_are_faster():
    made = Machine()
    assert max(made.multiply("bf16")) > 1.5 * max(made.multiply())


def test_a_slow_precision_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert ebb("bench", "train", *TINY, "--precision", "bf16") == 2
    assert only_line(capsys.readouterr().err).startswith("bf16 is slow here, with no tiles (AMX)")


def test_no_plot_of_a_single_context(tmp_path):
    row = Row("train", "rwkv7", None, 64, 1, 50, 100, 16, 1, "fp32", 9.0, 8.0, 10.0, 1.0, 0.5)
    assert save_growth_plots([row], tmp_path / "x.json") == []
    assert cells(row)["±"] == "11%"


def interrupt_after(seconds):
    threading.Timer(seconds, os.kill, [os.getpid(), signal.SIGINT]).start()


def test_ctrl_c_while_measuring(capsys):
    start = time.monotonic()
    interrupt_after(1.0)
    assert ebb("bench", "train", *TINY, "--seconds", "300", "--no-memory") == 130
    assert only_line(capsys.readouterr().err) == "Interrupted."
    assert time.monotonic() - start < 60


def test_ctrl_c_leaves_no_process_behind(capsys, monkeypatch):
    def interrupted(job):
        interrupt_after(0.2)
        return memory.peak_memory(job)

    monkeypatch.setattr(command, "peak_memory", interrupted)
    assert ebb("bench", "train", *TINY, "--mixers", "gla", "--context", "16") == 130
    assert only_line(capsys.readouterr().err) == "Interrupted."
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["fly"], "there is no task 'fly'; choose one of ops, train, prefill, decode, or none"),
        (["train", "--mixers", "mamba9"], "there is no mixer 'mamba9'; choose one of "),
        (["train", "--mixers", "gla,gla"], "mixers must be different, but are 'gla,gla'"),
        (["train", "--size", "4x100"], "there is no size '4x100'; choose one of nano, "),
        (["train", "--context", "1k,x"], "contexts must be numbers such as 128 or 4k, but one"),
        (["train", "--weights", "int8"], "weights has no effect on train: leave it out"),
        (["decode", "--batch-size", "2"], "batch-size has no effect on decode: leave it out"),
        (["decode", "--weights", "fp8"], "weights must be one of fp32, bf16, int8, int4, but"),
        (["decode", "--precision", "bf16"], "precision has no effect on decode: leave it out"),
        (
            ["train", "--precision", "fp64"],
            "there is no precision 'fp64'; choose one of fp32, bf16",
        ),
        (["ops", "--mixers", "gla"], "mixers has no effect on ops: leave it out"),
        (["--size", "micro"], "size has no effect without a task: leave it out"),
        (["train", "--against", "rwkv"], "rwkv is not there to train: leave out --against"),
        (["train", "--against", "jax"], "against must be transformers or rwkv, but is 'jax'"),
        (["train", "--seconds", "nan"], "seconds must be at least 0, but is nan"),
        (["train", "--threads", "0"], "threads must be at least 1, but is 0"),
        (["train", "--json", "--markdown"], "choose one of --json and --markdown"),
        (["train", "--out", "folder"], "out must be the name of a .json file, but is folder"),
    ],
)
def test_bad_value_is_told_in_one_sentence(args, said, capsys):
    assert ebb("bench", *args) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert only_line(shown.err).startswith(said)


def test_work_that_cannot_be_done_is_told_in_one_sentence(capsys, tmp_path):
    flags = ["decode", *TINY, "--mixers", "attention", "--weights", "int8"]
    assert ebb("bench", *flags) == 1
    assert only_line(capsys.readouterr().err).startswith("there is no native step: ")
    flags = ["prefill", *TINY, "--against", "transformers"]
    assert ebb("bench", *flags) == 1
    assert only_line(capsys.readouterr().err).startswith("the RWKV-4 of transformers has at least")
    assert ebb("bench", "ops", "--out", tmp_path / "none" / "x.json") == 1
    assert only_line(capsys.readouterr().err).startswith(f"there is no folder {tmp_path / 'none'}")
