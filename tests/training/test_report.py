"""The report of a comparison: its tables and figures are right and its files whole."""

import copy
import json

import matplotlib.image
import pytest
from comparison_results import attention, diverged, everything, gla, results, rwkv7
from rich.console import Console

from train.readable import readable_bytes
from train.report import escape_markdown, report_text, summary_table, write_report
from train.report.tables import MISSING


def rows_of(report, heading):
    section = report.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_results_table_has_the_right_numbers():
    header, _, *rows = rows_of(report_text(results(rwkv7(1.412), attention(1.455))), "Results")
    assert [dict(zip(header, row, strict=True)) for row in rows] == [
        {
            "mixer": "rwkv7",
            "parameters": "1,312,000",
            "validation loss": "4.095",
            "bits/byte": "1.412",
            "perplexity": "60.0",
            "training tokens/s": "5,000",
            "ms/token at 128": "0.520",
            "ms/token at 16,384": "0.520",
            "state at 128": "270 KB",
            "state at 16,384": "270 KB",
        },
        {
            "mixer": "attention",
            "parameters": "1,312,000",
            "validation loss": "4.220",
            "bits/byte": "1.455",
            "perplexity": "68.0",
            "training tokens/s": "9,500",
            "ms/token at 128": "0.400",
            "ms/token at 16,384": "2.65",
            "state at 128": "262 KB",
            "state at 16,384": "34 MB",
        },
    ]


def test_generation_table_has_a_row_a_point_and_none_where_nothing_was_measured():
    measured = results(rwkv7(1.4), attention(1.4))
    del measured["models"][1]["generation"][-1]
    _, _, *rows = rows_of(report_text(measured), "Generation")
    contexts = ("128", "512", "2,048", "4,096", "16,384")
    both = [[mixer, context] for context in contexts for mixer in ("rwkv7", "attention")]
    assert [row[:2] for row in rows] == both[:-1]
    weights = measured["models"][0]["weight_bytes"]
    sizes = [readable_bytes(weights + size) for size in (270_336, 8_388_608)]
    assert rows[6][1:] == ["4,096", "0.520", "0.494 to 0.562", "270 KB", sizes[0]]
    assert rows[7][1:] == ["4,096", "1.10", "1.04 to 1.19", "8.4 MB", sizes[1]]


def test_several_seeds_give_the_mean_and_its_interval():
    """Two seeds at 1.40 and 1.42: 12.706 times 0.02 / 2."""
    report = report_text(results(rwkv7(1.40, 1.42), attention(1.5, 1.5)))
    _, _, *rows = rows_of(report, "Results")
    assert [row[3] for row in rows] == ["1.410 ± 0.127", "1.500 ± 0.000"]
    assert len(rows_of(report, "Runs")) == 2 + 4


def test_terminal_table_fits_and_cuts_nothing(capsys):
    measured = results(rwkv7(1.412, 1.42), attention(1.455, 1.46))
    measured["models"][1]["mixer"] = "attention:square_l1"
    Console(width=80, force_terminal=False).print(summary_table(measured))
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= 80
    (row,) = (line.split() for line in lines if line.startswith(" rwkv7"))
    assert " ".join(row[1:]) == "1.31 M 4.106 1.416 5,000 0.520 0.520 270 KB 270 KB"
    number, row = next((n, row.split()) for n, row in enumerate(lines) if " attention" in row)
    assert " ".join(row[1:]) == "1.31 M 4.227 1.458 9,500 0.400 2.65 262 KB 34 MB"
    name, *deviations = lines[number + 1].split()
    assert row[0] + name == "attention:square_l1"
    assert deviations == ["±0.092", "±0.032"]


def test_folder_holds_the_whole_report(tmp_path):
    measured = results(rwkv7(1.412), attention(1.455), gla(1.42))
    before = copy.deepcopy(measured)
    folder = tmp_path / "new" / "report"
    write_report(measured, folder)
    assert measured == before
    names = {path.name for path in folder.iterdir()}
    texts = {"results.json", "report.md", "report.html"}
    assert names == texts | {"loss.png", "generation.png"}
    assert json.loads((folder / "results.json").read_text()) == measured
    report = (folder / "report.md").read_text()
    for mixer in ("rwkv7", "attention", "gla"):
        assert f"### {mixer}\n" in report
    for image in ("loss.png", "generation.png"):
        assert f"]({image})" in report
        height, width, _ = matplotlib.image.imread(folder / image).shape
        assert (width, height) == (2100, 920)


def test_report_has_no_absolute_path_and_says_how_to_repeat():
    measured = results(rwkv7(1.4), attention(1.4))
    measured["settings"]["data"] = measured["data"]["name"] = "/home/someone/texts/novel.txt"
    measured["settings"]["command"] += " --data=/home/someone/texts/novel.txt"
    report = report_text(measured)
    assert "someone" not in report
    assert "ebb compare --mixers rwkv7 attention --out first --data=novel.txt" in report
    assert "Full paths in this command were cut" in report
    assert "tokens of novel.txt with one seed" in report
    for text in ("2.13.0", "0.1.0", "A CPU", "2 threads", "one machine", "small models"):
        assert text in report
    assert "its cache grows with the context" in report
    assert "copies the cache at every token" not in report


def test_a_pattern_is_named_with_its_folder():
    measured = results(rwkv7(1.4), attention(1.4))
    measured["settings"]["data"] = "/home/someone/stdlib/*.py"
    measured["data"]["name"] = "stdlib/*.py"
    measured["settings"]["command"] += " --data '/home/someone/stdlib/*.py'"
    report = report_text(measured)
    assert report.startswith("# rwkv7 and attention on stdlib/\\*.py\n")
    assert "tokens of stdlib/\\*.py with one seed" in report
    assert "--data 'stdlib/*.py'\n" in report
    assert "someone" not in report


def test_a_report_without_softmax_says_nothing_about_it():
    assert "softmax" not in report_text(results(rwkv7(1.4), gla(1.4)))


def test_equal_results_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        write_report(results(rwkv7(1.412, 1.42), attention(1.455, 1.45)), tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_loss_plot_shows_the_losses(tmp_path):
    """Other losses, another picture; the figure on generation stays the same."""
    write_report(results(rwkv7(1.412), attention(1.455)), tmp_path / "a")
    write_report(results(rwkv7(1.30), attention(1.455)), tmp_path / "b")
    same = {
        name: (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        for name in ("loss.png", "generation.png")
    }
    assert same == {"loss.png": False, "generation.png": True}


def only_one(measured):
    del measured["models"][1:]


def one_context(measured):
    for one in measured["models"]:
        del one["generation"][1:]


def no_generation(measured):
    for one in measured["models"]:
        one["generation"] = []


def no_curves(measured):
    for one in measured["models"]:
        one["runs"][0] |= {"curve": [], "validation_curve": []}


def one_point(measured):
    for one in measured["models"]:
        run = one["runs"][0]
        run |= {"curve": run["curve"][:1], "validation_curve": run["validation_curve"][:1]}


def far_apart(measured):
    for point in measured["models"][1]["generation"]:
        point["state_bytes"] *= 10**6
        for key in ("ms_per_token", "low", "high"):
            point[key] *= 10**5


@pytest.mark.parametrize(
    "change", [only_one, one_context, no_generation, no_curves, one_point, far_apart]
)
def test_sparse_and_extreme_results_are_reported(change, tmp_path):
    measured = results(rwkv7(1.412), attention(1.455))
    change(measured)
    write_report(measured, tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert ("## Generation" in report) is (change is not no_generation)
    assert len(rows_of(report, "Results")) == 2 + len(measured["models"])
    for image in ("loss.png", "generation.png"):
        assert matplotlib.image.imread(tmp_path / image).shape[:2] == (920, 2100)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("# not *a* `title`", "\\# not \\*a\\* \\`title\\`"),
        ("1. one", "1\\. one"),
        ("1.5 of it", "1.5 of it"),
        ("- item | cell", "\\- item \\| cell"),
        ("    <b>&amp;", "\\<b\\>\\&amp;"),
        ("a\x1b[31m\u202eb", "a \\[31m b"),
    ],
)
def test_text_cannot_break_the_markdown(text, shown):
    assert escape_markdown(text) == shown


def test_a_sample_stays_inside_its_quote():
    measured = results(rwkv7(1.4))
    measured["models"][0]["sample"] = {
        "prompt": "Two\nlines",
        "text": "\n## Limits\n\n```\n===\u2028next\n",
    }
    section = report_text(measured).split("### rwkv7\n\n")[1].split("\n\n## How")[0]
    assert section.splitlines() == [
        "> *Prompt:* Two lines",
        ">",
        "> \\#\\# Limits",
        ">",
        "> \\`\\`\\`\\",
        "> \\===\\",
        "> next",
    ]


def test_everything_that_may_be_measured_is_reported(tmp_path):
    write_report(everything(), tmp_path)
    report = (tmp_path / "report.md").read_text()
    header, _, *rows = rows_of(report, "Results")
    cells = [dict(zip(header, row, strict=True)) for row in rows]
    assert [row["runs finished"] for row in cells] == ["3 of 3"] * 3 + ["2 of 3"]
    assert [row["FLOPs/token"] for row in cells] == ["8.1e6", "8.9e6", "8.4e6", "7.9e6"]
    assert cells[3]["bits/byte"].startswith("1.610 ±"), "the mean of the runs that finished"
    run = next(row for row in rows_of(report, "Runs") if row[0] == "runs/rwkv4-1")
    assert run[3:5] == ["diverged at step 40", MISSING]
    last = rows_of(report, "Task: recall")[-1]
    assert last[:3] == ["num pairs 32", "40.0 ± 12.7 %", "97.0 ± 12.7 %"]
    assert rows_of(report, "Longer contexts")[-1][2] == "5.1000"
    assert len(rows_of(report, "Learning rates tried")) == 2 + 12
    assert rows_of(report, "Generation")[-1][-1] == "6.3 MB"
    for image in ("loss", "compute", "generation", "lengths", "tasks"):
        assert report.count(f"]({image}.png)") == 1
        assert matplotlib.image.imread(tmp_path / f"{image}.png").shape[:2] == (920, 2100)


def test_a_comparison_of_which_every_run_diverged_is_reported(tmp_path):
    write_report(results(*(diverged(one) for one in (rwkv7(1.4), attention(1.5)))), tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert [row[3] for row in rows_of(report, "Results")[2:]] == ["diverged", "diverged"]
    assert "## Samples" not in report
    assert "report.html" in {path.name for path in tmp_path.iterdir()}


def test_steps_are_shown_where_each_mixer_has_its_own():
    measured = results(rwkv7(1.4), attention(1.5))
    for one, steps in zip(measured["models"], (1500, 1200), strict=True):
        one["steps"] = steps
    header, _, *rows = rows_of(report_text(measured), "Results")
    assert [row[header.index("steps")] for row in rows] == ["1,500", "1,200"]


def test_a_run_that_broke_off_at_once_is_reported(tmp_path):
    measured = results(diverged(rwkv7(1.4), step=1), attention(1.5))
    run = measured["models"][0]["runs"][0]
    run |= {"curve": [], "tokens": 0, "seconds": 0.0, "tokens_per_second": None}
    write_report(measured, tmp_path)
    rows = rows_of((tmp_path / "report.md").read_text(), "Runs")
    assert rows[2][3:] == ["diverged at step 1", MISSING, "0", "0 s", MISSING]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"another --out"):
        write_report(results(rwkv7(1.4)), tmp_path / "file" / "report")
