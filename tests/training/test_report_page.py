"""The HTML report: whole, safe and readable without a network; in a browser where there is one."""

import re
from html.parser import HTMLParser

import pytest
from browser import CHROMIUM, Browser
from comparison_results import attention, diverged, everything, gla, model, results, rwkv7

from train.report import summary_lines, write_report
from train.report.html import page

HIDDEN = """Array.from(document.querySelectorAll('svg[role]')).filter(
    (one) => !one.checkVisibility({contentVisibilityAuto: true})).map((one) => one.textContent)"""
"""The pictures that are in a part that is closed."""
VOID = {"meta", "link", "br", "img"}
SHAPES = {"path", "circle", "rect"}


class Page(HTMLParser):
    """Elements with their attributes and texts; fails where tags do not match."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag):
        return [data for name, data in self.texts if name == tag]


@pytest.fixture(scope="module")
def source():
    return page(everything())


@pytest.fixture(scope="module")
def parsed(source):
    return Page(source)


def many_models():
    """Ten mixers, three seeds, and long curves."""
    models = []
    for number in range(10):
        one = model(f"mixer-{number}", (1.4, 1.41, 1.42), 5000, (0.5,) * 5, [90_000] * 5)
        for run in one["runs"]:
            run["curve"] = run["curve"] * 60
        models.append(one)
    return results(*models)


def test_nothing_is_loaded_from_anywhere(source, parsed):
    for tag, attributes in parsed.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "action", "data", "srcset", "poster"):
                assert (tag, value) == ("link", "data:,")
    assert "@import" not in source
    assert set(re.findall(r"url\(([^)]*)\)", source)) == {
        f"#{attributes['id']}" for attributes in parsed.all("clippath")
    }
    assert "//" not in re.sub(r"(?m)^// .*$", "", source), "an address"
    (policy,) = [m["content"] for m in parsed.all("meta") if "http-equiv" in m]
    assert policy.startswith("default-src 'none'")


def test_page_fits_phones_and_both_schemes(source):
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in source
    assert "@media (prefers-color-scheme: dark)" in source


def luminance(color):
    """Of `#rrggbb`, from 0 to 1, as WCAG 2 defines it."""
    parts = [int(color[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_lines_stand_out_from_the_paper(source, dark):
    """Contrast of 4.5 for text and 3 for lines: level AA."""
    colors = dict(re.findall(r"--(\w+): (#\w{6});", source.split("prefers-color-scheme")[dark]))
    for paper in ("paper", "raised"):
        below = luminance(colors[paper])
        for name in ("ink", "quiet", "accent", *(f"c{n}" for n in range(7))):
            high, low = sorted((luminance(colors[name]), below), reverse=True)
            ratio = (high + 0.05) / (low + 0.05)
            assert ratio >= (3 if name.startswith("c") else 4.5), (name, paper, ratio)


def test_page_is_small(source):
    assert len(source.encode()) < 150_000
    assert len(page(many_models()).encode()) < 500_000


def test_names_and_samples_cannot_break_the_page():
    evil = "</td></script><script>alert(1)</script><img src=x onerror=alert(1)> & \"' \x1b\u202e"
    measured = everything()
    one = diverged(measured["models"][0], reason=evil)
    one["mixer"] = evil
    one["sample"] = {"prompt": evil, "text": evil}
    one["runs"][0]["folder"] = evil
    one["tasks"] = {evil: [{"point": {evil: evil}, "accuracy": 0.5, "seeds": []}]}
    measured["settings"] |= {"data": evil, "command": f"ebb compare --data {'x'}"}
    measured["data"] |= {"name": evil, "tokenizer": evil}
    measured["machine"]["processor"] = evil
    shown = page(measured)
    parsed = Page(shown)
    assert len(parsed.all("script")) == 1
    assert parsed.all("img") == []
    assert all("onerror" not in attributes for _, attributes in parsed.elements)
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert any("<script>alert(1)</script>" in text for text in parsed.text("blockquote"))


def test_summary_comes_first_then_tables_plots_and_the_recipe(parsed):
    headings = [text for tag, text in parsed.texts if tag == "h2"]
    assert headings[:2] == ["Summary", "Results"]
    assert headings[-3:] == ["Samples", "How to repeat it", "Limits"]
    assert "Softmax (attention) is not needed to predict" in parsed.text("p")[0]
    assert "ebb compare --mixers rwkv7 attention gla rwkv4 --out first" in parsed.text("code")
    assert "someone" not in "".join(data for _, data in parsed.texts)


def test_what_most_readers_want_is_open_and_the_rest_folded(source):
    parts = re.findall(r'<details class="part"( open)?><summary><h2>([^<]*)</h2></summary>', source)
    closed = [title for is_open, title in parts if not is_open]
    assert closed == [
        *("Inside the models", "Learning rates tried", "Runs"),
        *("Attention on one sentence", "How to repeat it"),
    ]
    assert [title for is_open, title in parts if is_open] == [
        *("Generation", "Longer contexts", "Task: recall", "Task: parity", "Samples", "Limits"),
    ]
    first = source.partition("<details class")[0]
    assert "<h2>Summary</h2>" in first
    assert "<h3>Loss by tokens</h3>" in first


def test_many_findings_are_all_there_and_the_later_ones_folded():
    measured = many_models()
    measured["models"][0]["mixer"] = "attention"
    parsed = Page(page(measured))
    found = "".join(data for _, data in parsed.texts)
    assert all(line in found for line in summary_lines(measured))
    assert "3 more" in parsed.text("summary"), "nine speeds, six of them at once"


def test_every_heading_of_a_measured_table_is_a_button(source, parsed):
    headings = [attributes for attributes in parsed.all("th") if attributes["scope"] == "col"]
    sortable = [attributes for attributes in headings if attributes.get("aria-sort") == "none"]
    assert len(sortable) == len(parsed.all("button")) == len(headings) - 3, (
        "all but those of the recipe, and the one without a word"
    )
    values = re.findall(r'<td data-value="([^"]*)">([^<]*)</td>', source)
    assert ("34603008", "35 MB") not in values
    assert ("33554432", "34 MB") in values


def test_every_chart_says_what_it_shows(parsed):
    pictures = [a for a in parsed.all("svg") if a.get("role") == "img"]
    assert len(pictures) == len(parsed.all("figure")) + 3 == 12 + 14 + 6
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for picture in pictures:
        assert set(picture["aria-labelledby"].split()) <= set(ids)
    assert any("attention ends at" in text for text in parsed.text("desc"))


def test_charts_show_what_was_measured():
    before, after = (page(results(rwkv7(x), attention(1.455))) for x in (1.412, 1.3))
    paths = [re.findall(r'<path class="line" d="([^"]*)"', text) for text in (before, after)]
    assert len(paths[0]) == len(paths[1])
    assert paths[0] != paths[1]
    assert "NaN" not in before
    assert "diverged" not in before


def test_a_run_that_diverged_is_marked(source):
    marks = re.findall(r"<title>rwkv4 diverged: its loss is not a finite number</title>", source)
    assert len(marks) == 3, "in the charts of loss by tokens, time and compute"


@pytest.mark.parametrize(
    "measured",
    [
        results(rwkv7(1.4)),
        results(rwkv7(1.4), gla(1.4)),
        results(diverged(rwkv7(1.4)), diverged(attention(1.4, 1.5))),
    ],
    ids=["one", "equal", "none left"],
)
def test_sparse_results_make_a_page(measured):
    for one in measured["models"][:1]:
        one |= {"generation": [], "sample": None}
    assert Page(page(measured)).all("table")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_a_browser(tmp_path):
    write_report(everything(), tmp_path)
    report = tmp_path / "report.html"
    inks = {}
    with Browser(tmp_path / "profile") as browser:
        for width, scheme in ((390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")):
            browser.open(report, width, scheme)
            assert browser.complaints() == []
            assert browser.requests() == [report.as_uri()]
            assert browser.run("document.documentElement.scrollWidth") <= width
            folded = browser.run(f"({HIDDEN}).length")
            assert folded == 14 + 1 + 6, "inside the models, learning rates, heat maps"
            if width < 600:
                assert browser.run("document.documentElement.scrollHeight") < 12_500
            closed = "document.querySelectorAll('.part:not([open]) > summary')"
            browser.run(f"{closed}.forEach((one) => one.click())")
            assert browser.run(HIDDEN) == []
            smallest = browser.run(
                "Math.min(...Array.from(document.querySelectorAll('figure > svg[role]'),"
                "(x) => Math.min(x.getBoundingClientRect().width / 300,"
                " x.getBoundingClientRect().height / 80)))"
            )
            assert smallest >= 1, "a chart is too small"
            widths = "Array.from(document.querySelectorAll('.maps svg'), (x) => x.clientWidth)"
            assert browser.run(f"Math.min(...{widths})") >= 150, "a heat map is too small"
            inks[width, scheme] = browser.run(
                "[getComputedStyle(document.body).backgroundColor,"
                " getComputedStyle(document.querySelector('svg text')).fill]"
            )
        browser.open(report, 1280, "light")
        assert browser.run(HIDDEN) != []
        browser.ask("Emulation.setEmulatedMedia", media="print")
        assert browser.run(HIDDEN) == [], "on paper nothing can be opened"
        assert inks[390, "light"] != inks[390, "dark"]
        assert inks[390, "dark"] == inks[1280, "dark"]
        click = "document.querySelectorAll('table')[0].querySelectorAll('button')[3].click()"
        names = "Array.from(document.querySelectorAll('table')[0].tBodies[0].rows,"
        names += "(row) => row.cells[0].textContent)"
        sorts = "document.querySelectorAll('table')[0].querySelectorAll('th')[3].ariaSort"
        browser.run(click)
        assert browser.run(names) == ["rwkv7", "gla", "attention", "rwkv4"]
        assert browser.run(sorts) == "ascending"
        browser.run(click)
        assert browser.run(names) == ["rwkv4", "attention", "gla", "rwkv7"]
        assert browser.run(sorts) == "descending"
        assert browser.complaints() == []
