"""Axes that can be read: round ticks, short numbers, words on heat maps, room between them."""

import pytest
import torch
from browser import CHROMIUM, Browser
from comparison_results import everything
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from train import heat_maps, plots
from train.figure import log_axis
from train.heat_maps import HeatMaps, save_attention_plot
from train.readable import short_number, three_digits
from train.report import inside, write_report
from train.report.ticks import MOST, log_ticks, round_ticks

ROOM = 7
"""Characters that fit beside the y axis of a chart of the page."""


def with_small_divisors(power):
    measured = everything()
    for one in measured["models"]:
        for run in one["runs"]:
            for readings in run.get("instruments") or []:
                found = [key for key in readings if key.startswith("smallest_divisor.layer")]
                for layer, key in enumerate(sorted(found)):
                    readings[key] *= 10.0 ** (power - layer)
    return measured


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (1e-6, 1, [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1]),
        (1e-9, 10, [1e-9, 1e-7, 1e-5, 1e-3, 0.1, 10]),
        (0.002, 0.2, [0.003, 0.01, 0.03, 0.1]),
        (0.002, 0.05, [0.003, 0.01, 0.03]),
        (7e-10, 3e-9, [7e-10, 1e-9, 1.5e-9, 2e-9, 3e-9]),
        (6, 9, [6, 7, 8, 9]),
        (1.02, 1.35, [1.1, 1.2, 1.3]),
    ],
)
def test_log_ticks_are_decades_and_closer_where_the_ends_are_near(low, high, ticks):
    assert log_ticks(low, high) == ticks


@given(st.floats(-12, 9), st.floats(0.12, 15))
def test_log_ticks_are_never_few_or_many_and_their_numbers_fit(start, decades):
    low, high = 10**start, 10 ** (start + decades)
    found = log_ticks(low, high)
    assert 2 <= len(found) <= MOST
    assert all(low <= tick <= high for tick in found)
    texts = [short_number(tick) for tick in found]
    assert len(set(texts)) == len(texts)
    assert max(map(len, texts)) <= ROOM


def test_round_ticks():
    assert round_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert round_ticks(3.9, 4.31) == [3.9, 4.0, 4.1, 4.2, 4.3]
    assert round_ticks(0.9e6, 3.2e6) == [1e6, 1.5e6, 2e6, 2.5e6, 3e6]


def test_short_numbers():
    values = (1e-9, 1.5e-5, 5e-4, 1e-3, 0.0015, 0.03, 1, 2.5, 10, 100, 1234, 3e6, 2e10, 0)
    assert [short_number(value) for value in values] == [
        *("1e-9", "1.5e-5", "5e-4", "0.001", "0.0015", "0.03", "1", "2.5", "10", "100", "1,234"),
        *("3e6", "2e10", "0"),
    ]
    values = (1.234e-7, 0.00012, 0.0012, -2e-5)
    assert [three_digits(value) for value in values] == [
        "1.23e-7",
        "1.20e-4",
        "0.00120",
        "-2.00e-5",
    ]


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([2e-9, 5e-5], ["1e-8", "1e-7", "1e-6", "1e-5"]),
        ([6.1, 6.9], ["4", "5", "7", "10"]),
        ([0.0, 0.002, 0.09], ["0.003", "0.01", "0.03", "0.1"]),
    ],
)
def test_log_axis_of_a_picture(values, texts):
    axes = Figure().subplots()
    log_axis(axes, values)
    low, high = axes.get_ylim()
    assert low < min(value for value in values if value) < max(values) < high
    assert [text.get_text() for text in axes.get_yticklabels()] == texts


def test_log_axis_of_nothing():
    axes = Figure().subplots()
    log_axis(axes, [0.0])
    assert axes.get_yscale() == "linear"
    assert [text.get_text() for text in axes.texts] == ["nothing above zero was measured"]


def test_instruments_are_drawn_with_short_numbers_and_their_own_ticks(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, *_: figures.append(figure))
    models = with_small_divisors(-6)["models"]
    plots.save_charts(inside.charts(models), [m["mixer"] for m in models], tmp_path / "a.png")
    (figure,) = figures
    figure.canvas.draw()
    of = {axes.get_title(loc="left"): axes for axes in figure.axes}
    divisor = of["Smallest divisor of the weights by layer"]
    assert [t.get_text() for t in divisor.get_yticklabels()] == ["1e-11", "1e-10", "1e-9"]
    along = of["Norm of the state along the text"]
    assert sorted(int(t.get_text()) for t in along.get_xticklabels()) == [64, 128, 192, 256]
    training = of["Gradient over training"]
    assert "1M" in [t.get_text() for t in training.get_xticklabels()]
    assert training.xaxis.get_offset_text().get_text() == ""


def test_a_heat_map_says_what_its_axes_are_and_rows_keep_apart(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(heat_maps, "save", lambda figure, *_: figures.append(figure))
    words = ["representatives"] * 12
    maps = [HeatMaps(f"m{n}", words, {0: torch.eye(12), 1: torch.eye(12)}) for n in range(3)]
    save_attention_plot(maps, tmp_path / "a.png")
    (figure,) = figures
    figure.canvas.draw()
    assert {axes.get_xlabel() for axes in figure.axes} == {"Key position"}
    assert [axes.get_ylabel() for axes in figure.axes] == ["Query position", ""] * 3
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    for upper, lower in zip(boxes, boxes[2:], strict=False):
        assert upper.y0 - lower.y1 > 0.15 * figure.dpi, "a sixth of an inch between rows"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_nothing_is_cut_off_in_a_browser(tmp_path):
    write_report(with_small_divisors(-6), tmp_path)
    outside = """Array.from(document.querySelectorAll('figure svg text')).filter((text) => {
        const a = text.getBBox(), b = text.ownerSVGElement.viewBox.baseVal;
        return a.x < b.x || a.y < b.y || a.x + a.width > b.width || a.y + a.height > b.height;
    }).map((text) => text.textContent)"""
    words = """Array.from(document.querySelectorAll('.maps > div'), (map) => {
        const [layer, query, key] = map.querySelectorAll('span');
        const [a, q, k, p] = [layer, query, key, map.querySelector('svg')].map(
            (element) => element.getBoundingClientRect());
        return [query.textContent, key.textContent, a.bottom <= p.top + 1, q.right <= p.left + 1,
            q.left >= 0, q.height > q.width, k.top >= p.bottom - 1, k.right <= innerWidth].join()
    })"""
    with Browser(tmp_path / "profile") as browser:
        for width, scheme in ((320, "light"), (390, "dark"), (1280, "light")):
            browser.open(tmp_path / "report.html", width, scheme)
            browser.run("document.querySelectorAll('details').forEach((one) => one.open = true)")
            assert browser.run(outside) == []
            said = set(browser.run(words))
            assert said == {"query position,key position" + ",true" * 6}
