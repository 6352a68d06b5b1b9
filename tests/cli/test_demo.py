"""`ebb demo` from beginning to end on the built-in text, with a budget of two seconds."""

import json
import re

import matplotlib.image
import pytest
from runs import ebb, start_ebb


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Its folder, standard output and standard error."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        process = start_ebb("demo", "--budget", "2s", "--threads", "1", "--out", folder / "demo")
        output, error = process.communicate()
        assert process.returncode == 0, error
        yield folder / "demo", output, error


def test_demo_trains_samples_compares_and_names_its_files(demo):
    folder, output, error = demo
    for mixer in ("rwkv7", "attention"):
        sample = re.search(rf"─ {mixer} writes ─+\nThe people of the United States.*\n", output)
        assert sample, f"no sample of {mixer}"
        assert re.search(rf"^ ?{mixer} +1\.\d+ M ", output, re.M), f"{mixer} is not in the table"
    for name in ("report.md", "results.json", "loss.png", "generation.png"):
        assert f" {folder / name}\n" in output
    assert f"ebb generate {folder / 'runs' / 'rwkv7-0'} --prompt" in output
    assert "bits/byte" in error
    assert matplotlib.image.imread(folder / "loss.png").std() > 0.01
    results = json.loads((folder / "results.json").read_text())
    assert [model["mixer"] for model in results["models"]] == ["rwkv7", "attention"]
    assert results["data"]["vocab_size"] == 2048
    one, two = (model["parameters"] for model in results["models"])
    assert abs(one / two - 1) < 0.01


def test_demo_again_shows_the_same_at_once(demo, capsys):
    folder, output, _ = demo
    assert ebb("demo", "--budget", "2s", "--threads", "1", "--out", folder) == 0
    shown = capsys.readouterr()
    assert "is complete: nothing left to do." in shown.err
    assert shown.out == output
