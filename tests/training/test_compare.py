"""A whole comparison: interrupted, resumed, read; and not made twice."""

import json
import signal
import sys

import matplotlib.image
import numpy as np
import pytest
import torch
from runs import contents, ebb, metrics, only_line

from data.loader import TrainingBatches
from train import run_data
from train.compare import run_comparison
from train.compare_config import CompareConfig
from train.interrupt import Interrupted
from train.progress import Display

NAMES = ("attention", "linear_transformer")


class Impatient(Display):
    """Somebody who presses Ctrl-C when something is said for the second time."""

    def __init__(self, text):
        super().__init__()
        self.text, self.times = text, 0

    def say(self, text, style=None):
        super().say(text, style)
        self.times += text.startswith(self.text)
        if text.startswith(self.text) and self.times == 2:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def settings(workshop):
    """Of the smallest comparison that has everything."""
    return {
        "mixers": ",".join(NAMES),
        "size": "nano",
        "data": str(workshop / "text.txt"),
        "tokenizer": "bytes",
        "budget": "3-steps",
        "batch_size": 2,
        "context": 16,
        "seeds": 2,
        "contexts": "8,32",
        "eval_tokens": 64,
        "threads": 1,
        "out": workshop / "compare",
    }


@pytest.fixture(scope="module")
def seen(settings):
    """The batches of every run, by folder, of a comparison that is stopped in its second run."""
    seen = {}

    class Watched(TrainingBatches):
        def __getitem__(self, step):
            batch = super().__getitem__(step)
            run = sys._getframe(1).f_locals["self"].folder.name
            seen.setdefault(run, {})[step] = batch.inputs.numpy().copy()
            return batch

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_data, "TrainingBatches", Watched)
        with pytest.raises(Interrupted) as stop, Impatient("step 2:") as display:
            run_comparison(CompareConfig(**settings), display)
        folder = settings["out"]
        assert str(stop.value) == f"Saved; go on with: ebb compare --resume --out {folder}"
        assert not (folder / "results.json").exists()
        runs = folder / "runs"
        first = (runs / "attention-0" / "model.safetensors").stat().st_mtime_ns
        assert max(line["step"] for line in metrics(runs / "linear_transformer-0")) == 2
        assert ebb("compare", "--resume", "--out", folder) == 0
        again = (runs / "attention-0" / "model.safetensors").stat().st_mtime_ns
        assert again == first, "what was finished is trained again"
    torch.set_num_threads(threads)
    return seen


@pytest.fixture(scope="module")
def results(seen, settings):
    return json.loads((settings["out"] / "results.json").read_text())


def test_all_models_see_the_same_tokens_in_the_same_order(seen):
    assert sorted(seen) == [f"{name}-{seed}" for name in sorted(NAMES) for seed in (0, 1)]
    for seed in (0, 1):
        one, two = (seen[f"{name}-{seed}"] for name in NAMES)
        assert sorted(one) == sorted(two) == [0, 1, 2]
        assert all(np.array_equal(one[step], two[step]) for step in one)
    assert not np.array_equal(seen["attention-0"][0], seen["attention-1"][0])


def test_results_hold_everything(results, settings):
    assert [model["mixer"] for model in results["models"]] == list(NAMES)
    counts = [model["parameters"] for model in results["models"]]
    assert abs(counts[1] / counts[0] - 1) < 0.01
    for model in results["models"]:
        assert [run["seed"] for run in model["runs"]] == [0, 1]
        assert [point["context"] for point in model["generation"]] == [8, 32]
        assert model["training_speed"]["low"] <= model["training_speed"]["tokens_per_second"]
        assert model["sample"]["prompt"] == "The"
        assert model["sample"]["text"]
        assert model["learning_rate"] == 3.9e-3
        assert model["tuning"] is None
        assert model["steps"] == 3
        assert 4e6 < model["flops_per_token"] < 7e6
        study = model["lengths"]
        assert (study["context"], study["asked"]) == (16, 32)
        assert [entry["length"] for entry in study["lengths"]] == [16, 32, 64, 128, 256, 512]
        for point in model["generation"]:
            least = model["weight_bytes"] + point["state_bytes"]
            assert least < point["peak_memory_bytes"] < 4 * least
        for run in model["runs"]:
            folder = settings["out"] / run["folder"]
            last = metrics(folder)[-1]
            assert run["validation_loss"] == last["validation_loss"]
            assert run["validation_bits_per_byte"] == last["validation_bits_per_byte"]
            assert run["tokens"] == run["curve"][-1]["tokens"] == 3 * 2 * 16
            assert run["seconds"] > 0
            assert run["diverged"] is None
            assert [point["tokens"] for point in run["validation_curve"]] == [32, 64, 96]
    sizes = [[p["state_bytes"] for p in m["generation"]] for m in results["models"]]
    a_token = 4 * 2 * 128 * 4  # layers, key and value, width, bytes
    assert sizes[0][1] - sizes[0][0] == (32 - 8) * a_token, "a KV cache grows with every token"
    assert sizes[1][1] == sizes[1][0], "a recurrent state does not"
    assert results["settings"]["steps"] == 3
    assert results["data"]["vocab_size"] == 257


def test_report_stands_in_the_folder(results, settings):
    folder = settings["out"]
    text = (folder / "report.md").read_text()
    for model in results["models"]:
        bits = [run["validation_bits_per_byte"] for run in model["runs"]]
        assert f"{sum(bits) / 2:.3f}" in text
    plots = sorted(folder.glob("*.png"))
    assert [plot.name for plot in plots] == [
        "compute.png",
        "generation.png",
        "lengths.png",
        "loss.png",
    ]
    for plot in plots:
        assert plot.name in text
        assert matplotlib.image.imread(plot).std() > 0.01, "an empty picture"


def test_command_in_the_results_repeats_the_comparison(results, settings):
    assert results["settings"]["command"].startswith("ebb compare --mixers attention,linear_")
    assert "--budget 3-steps" in results["settings"]["command"].replace("'", "")


def test_complete_comparison_is_shown_and_not_made_again(results, settings, capfd):
    before = contents(settings["out"])
    (settings["out"] / "report.md").unlink()  # as if it had been stopped just before
    assert ebb("compare", "--resume", "--out", settings["out"]) == 0
    shown = capfd.readouterr()
    assert "is complete: nothing left to do." in shown.err
    for name in ("report.md", "results.json", "loss.png", "generation.png"):
        assert str(settings["out"] / name) + "\n" in shown.out, "a path is broken or missing"
    assert contents(settings["out"]) == before


def test_comparison_is_refused_without_resume_or_with_other_settings(results, settings, capsys):
    folder = settings["out"]
    before = contents(folder)
    assert ebb("compare", "--out", folder) == 1
    said = only_line(capsys.readouterr().err)
    assert said.startswith(f"{folder} already holds a comparison: add --resume to go on")
    assert ebb("compare", "--resume", "--out", folder, "--budget", "9-steps") == 1
    said = only_line(capsys.readouterr().err)
    assert f"{folder} was made with budget 3-steps, not 9-steps: " in said
    assert contents(folder) == before


def test_damaged_settings_are_named(tmp_path, capsys):
    (tmp_path / "comparison.json").write_text('{"settings": {')
    assert ebb("compare", "--resume", "--out", tmp_path) == 2
    said = only_line(capsys.readouterr().err)
    assert said.startswith(f"{tmp_path / 'comparison.json'} is damaged (")


def settings_change(**changes):
    return lambda plan: plan["settings"].update(changes)


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        (lambda plan: plan["settings"].pop("extrapolate"), 1, " (which had no extrapolate)"),
        (lambda plan: plan["settings"].pop("task_steps"), 1, " (which had no task-steps)"),
        (settings_change(depth=3), 2, ", with settings that this one does not take (there is no d"),
        (settings_change(mixers="rwkv3"), 2, ", with settings that this one does not take (there"),
        (settings_change(mixers=["gla"]), 2, ", with settings that this one does not take (a val"),
        (settings_change(seeds="two"), 2, ", with settings that this one does not take (a value "),
        (lambda plan: plan.update(steps={"gla": 3}), 1, " (with another plan)"),
        (lambda plan: plan["steps"].update(attention="3"), 1, " (with another plan)"),
        (lambda plan: plan.update(tuning={}), 1, " (with another plan)"),
        (lambda plan: plan.update(tuning={n: [{"rate": 1}] for n in NAMES}), 1, " (with another"),
        (lambda plan: plan.update(turns=[1]), 1, " (with another plan)"),
    ],
)
def test_a_folder_of_another_version_is_refused_in_a_sentence(
    settings, tmp_path, capsys, change, status, said
):
    """What is written there is not touched, and the way out is named."""
    steps = dict.fromkeys(NAMES, 3)
    plan = {"settings": CompareConfig(**settings).to_dict(), "steps": steps, "turns": 1}
    plan |= {"tuning": None}
    change(plan)
    (tmp_path / "comparison.json").write_text(json.dumps(plan))
    before = contents(tmp_path)
    assert ebb("compare", "--resume", "--out", tmp_path) == status
    told = only_line(capsys.readouterr().err)
    assert told.startswith(f"{tmp_path} was made by another version of Ebb{said}")
    assert told.endswith(": go on with that version, or choose another --out.")
    assert contents(tmp_path) == before


def test_time_is_turned_into_steps_once(settings, tmp_path):
    """What the steps came to is written down before the first of them, and held to."""
    config = CompareConfig(
        **{**settings, "mixers": "attention", "budget": "2s", "seeds": 1, "out": tmp_path}
    )
    with pytest.raises(Interrupted), Impatient("step ") as display:
        run_comparison(config, display)
    plan = json.loads((tmp_path / "comparison.json").read_text())
    (steps,) = plan["steps"].values()
    assert 2 < steps < 2000
    assert ebb("compare", "--resume", "--out", tmp_path) == 0
    assert json.loads((tmp_path / "comparison.json").read_text()) == plan
    run = tmp_path / "runs" / "attention-0"
    assert metrics(run)[-1]["step"] == steps
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["steps"] == steps
    assert results["settings"]["budget"] == "2s"


def test_instruments_read_every_run_and_change_none(settings, results, tmp_path):
    """The models of one seed are those of the comparison without them."""
    changes = {"seeds": 1, "instruments": "attention,states", "out": tmp_path, "extrapolate": 0}
    with Display() as display:
        run_comparison(CompareConfig(**{**settings, **changes}), display)
    found = json.loads((tmp_path / "results.json").read_text())
    for model in found["models"]:
        (run,) = model["runs"]
        (*_, last) = run["instruments"]
        assert last["tokens"] == 96
        assert 0 < last["attention_norm.layer0"] < 17
        assert ("state_norm.layer0" in last) == (model["mixer"] == "linear_transformer")
        (maps,) = model["attention"]
        assert [*maps["layers"]] == [*"0123"]
        name = f"runs/{model['mixer']}-0/model.safetensors"
        assert (tmp_path / name).read_bytes() == (settings["out"] / name).read_bytes()
    page = (tmp_path / "report.html").read_text()
    assert page.count('class="maps"') == len(NAMES)
    assert (tmp_path / "instruments.png").exists()
    assert (tmp_path / "attention.png").exists()
    plain = json.loads((settings["out"] / "results.json").read_text())
    assert all(not model.get("attention") for model in plain["models"])
    assert not (settings["out"] / "attention.png").exists()
