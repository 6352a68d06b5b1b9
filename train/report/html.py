"""The report as one page of HTML: nothing is loaded from anywhere, now or when it is opened.

Plain strings, and `safe` around everything that was measured, named or written by a model:
there is one page, and a template language would be one more thing to learn. A content security
policy forbids every outside address, and every script but the one that sorts the tables.
"""

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from train.report import chart, heat, inside, prose, svg, tables
from train.report.findings import Section, summary
from train.report.outcomes import finite, samples
from train.report.tables import INSIDE
from train.report.text import safe

FEW = 6
"""Findings that are shown at once."""
ATTENTION, RECIPE = "Attention on one sentence", "How to repeat it"
FOLDED = (INSIDE, "Learning rates tried", "Runs", ATTENTION, RECIPE)
"""Parts that only some readers look for: closed at first, so that a phone's page is not endless."""


def page(results: dict[str, Any]) -> str:
    """The whole page."""
    models = results["models"]
    pictures = _Pictures([model["mixer"] for model in models])
    title = prose.title(results)
    body = [
        f"<h1>{safe(title)}</h1>",
        _summary(summary(results)),
        "<section><h2>Results</h2>",
        _table(tables.overview(results)),
        f"<p class=note>{safe(prose.reading_notes(results))} Click a heading to sort by it.</p>",
        pictures.row(chart.loss_charts(models), chart.estimates(models)),
        "</section>",
    ]
    drawn = {
        "Learning rates tried": chart.tuning_charts(models),
        "Generation": chart.generation_charts(models),
        "Longer contexts": chart.length_charts(models),
        INSIDE: inside.charts(models),
        **{f"Task: {name}": found for name, found in chart.task_charts(models).items()},
    }
    body += [
        _part(
            table.title,
            f'<div class="beside"><div>{_table(table)}'
            f"{_note(prose.table_note(table.title, results))}</div>"
            f"{pictures.row(drawn.get(table.title, []))}</div>",
        )
        for table in tables.tables(results)
    ]
    body += [_attention(models), _samples(models), _recipe(results)]
    body.append(_part("Limits", f"<p>{safe(prose.limits(results))}</p>"))
    return _document(title, "\n".join(part for part in body if part))


class _Pictures:
    """Draws charts under names that are unique on the page."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.drawn = names, 0

    def row(self, charts: Sequence[chart.Chart], found: chart.Estimates | None = None) -> str:
        """Side by side where there is room."""
        figures = []
        if found is not None:
            figures.append(self._figure(found.title, found.note, "", self._estimates(found)))
        for one in charts:
            mixers = sorted({line.mixer for line in one.lines})
            figures.append(
                self._figure(
                    one.title,
                    one.note,
                    self._legend(mixers),
                    svg.draw(one, self.names, self._key()),
                )
            )
        return f'<div class="charts">{"".join(figures)}</div>' if figures else ""

    def _estimates(self, found: chart.Estimates) -> str:
        return svg.draw_estimates(found, self.names, self._key())

    def _key(self) -> str:
        self.drawn += 1
        return f"c{self.drawn}"

    def _legend(self, mixers: Sequence[int]) -> str:
        entries = [
            f'<li><svg viewBox="0 0 28 8" aria-hidden="true" class="{svg.series_class(mixer)}">'
            f'<path class="line" d="M0 4H28"/></svg>{safe(self.names[mixer])}</li>'
            for mixer in mixers
        ]
        return f'<ul class="legend">{"".join(entries)}</ul>'

    def _figure(self, title: str, note: str, legend: str, picture: str) -> str:
        return (
            f"<figure><h3>{safe(title)}</h3>{legend}{picture}"
            f"<figcaption>{safe(note)}</figcaption></figure>"
        )


def _summary(sections: Sequence[Section]) -> str:
    first, *rest = sections
    verdict, *others = first.lines
    parts = [f'<p class="verdict">{safe(verdict)}</p>', _bullets(others)]
    groups = [
        f"<div><h3>{safe(section.title)}</h3>{_bullets(section.lines)}</div>" for section in rest
    ]
    parts.append(f'<div class="groups">{"".join(groups)}</div>')
    return f'<section class="summary"><h2>Summary</h2>{"".join(parts)}</section>'


def _part(title: str, content: str) -> str:
    """What a reader can fold."""
    is_open = "" if title in FOLDED else " open"
    heading = f"<summary><h2>{safe(title)}</h2></summary>"
    return f'<details class="part"{is_open}>{heading}{content}</details>'


def _bullets(lines: Sequence[str]) -> str:
    """With many mixers there are many findings: the later ones wait behind a click."""
    shown = FEW if len(lines) > FEW + 2 else len(lines)
    first, more = (
        "".join(f"<li>{safe(line)}</li>" for line in part)
        for part in (lines[:shown], lines[shown:])
    )
    rest = f"<details><summary>{len(lines) - shown} more</summary><ul>{more}</ul></details>"
    return f"<ul>{first}</ul>{rest if more else ''}" if lines else ""


def _note(text: str) -> str:
    return f'<p class="note">{safe(text)}</p>' if text else ""


def _table(table: tables.Table, *, sortable: bool = True) -> str:
    head = "".join(_heading(name, sortable=sortable) for name in table.head)
    rows = []
    for row in table.rows:
        first, *others = (
            f' data-value="{cell.value!r}"' if finite(cell.value) else "" for cell in row
        )
        cells = [f'<th scope="row"{first}>{safe(row[0].text)}</th>']
        cells += [
            f"<td{value}>{safe(cell.text)}</td>"
            for value, cell in zip(others, row[1:], strict=True)
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    kind = "numbers" if table.numbers else "words"
    name = safe(table.title or "Settings")
    return (
        f'<div class="table" role="region" tabindex="0" aria-label="{name}">'
        f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
        "</table></div>"
    )


def _heading(name: str, *, sortable: bool) -> str:
    if not sortable or not name:
        return f'<th scope="col">{safe(name)}</th>'
    return f'<th scope="col" aria-sort="none"><button type="button">{safe(name)}</button></th>'


def _attention(models: Sequence[dict[str, Any]]) -> str:
    maps = heat.attention_of(models)
    if not maps:
        return ""
    shown = [
        f'<figure><h3>{safe(title)}</h3><div class="maps">{pictures}</div></figure>'
        for title, pictures in heat.figures(maps, "map")
    ]
    note = f"<p class=note>{safe(heat.note(maps))}</p>"
    return _part(ATTENTION, f"{note}{''.join(shown)}")


def _samples(models: Sequence[dict[str, Any]]) -> str:
    quotes = [
        f"<h3>{safe(model['mixer'])}</h3><blockquote dir=auto>"
        f"<b>{safe(model['sample']['prompt'])}</b>{safe(model['sample']['text'])}</blockquote>"
        for model in samples(models)
    ]
    if not quotes:
        return ""
    note = "<p class=note>Bold: the prompt. One draw each.</p>"
    return _part("Samples", f"{note}{''.join(quotes)}")


def _recipe(results: dict[str, Any]) -> str:
    command, note, rows = prose.recipe(results)
    cells = [[tables.Cell(text) for text in row] for row in rows]
    table = tables.Table("", ["setting", "value"], cells, numbers=False)
    return _part(
        RECIPE,
        f"<pre tabindex=0><code>{safe(command)}</code></pre>"
        f"<p class=note>{safe(note)}</p>{_table(table, sortable=False)}",
    )


@cache
def _asset(name: str) -> str:
    return files("train.report").joinpath(name).read_text(encoding="utf-8")


def _document(title: str, body: str) -> str:
    script, style = _asset("page.js"), _asset("page.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<link rel="icon" href="data:,">\n<title>{safe(title)}</title>\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f"<script>{script}</script>\n</body>\n</html>\n"
    )
