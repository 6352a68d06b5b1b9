"""The report as markdown."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from train.report import heat, inside, prose, tables
from train.report.findings import summary
from train.report.outcomes import samples
from train.report.text import printable

PLOTS = {
    "loss.png": "Validation and training loss against tokens and against time",
    "compute.png": "Loss against training FLOPs, and bits per byte with their intervals",
    "generation.png": "Time per token and memory for the state against context",
    "lengths.png": "Loss by position and by the length of the window",
    "tasks.png": "Accuracy at each task",
    "instruments.png": "What the instruments read, by layer, over training and along the text",
    "attention.png": "Heat maps of the attention of each model, by layer",
}
"""What each picture shows, which is its text for those who cannot see it."""

ABOVE = {
    "generation.png": "Generation",
    "lengths.png": "Longer contexts",
    "instruments.png": tables.INSIDE,
}
"""The table that a picture follows."""


def report_text(results: dict[str, Any], plots: Sequence[str] = ()) -> str:
    """The report as markdown, images by relative name, no absolute path.

    Args:
        results: what `ebb compare` measured, format 1.
        plots: the pictures that stand beside the report.
    """
    parts = [f"# {escape_markdown(prose.title(results))}", "## Summary"]
    for section in summary(results):
        parts.append(f"**{section.title}**")
        parts.append("\n".join(f"- {escape_markdown(line)}" for line in section.lines))
    parts += ["## Results", _table(tables.overview(results))]
    parts.append(escape_markdown(prose.reading_notes(results)))
    parts += [_image(name) for name in plots if name in ("loss.png", "compute.png")]
    others = tables.tables(results)
    last_task = next((t for t in reversed(others) if t.title.startswith("Task: ")), None)
    for table in others:
        parts += [f"## {escape_markdown(table.title)}", _table(table)]
        parts.append(escape_markdown(prose.table_note(table.title, results)))
        if table.title == tables.INSIDE:
            said = inside.sentences(results["models"])
            parts.append("\n".join(f"- {escape_markdown(line)}" for line in said))
        parts += [_image(name) for name in plots if ABOVE.get(name) == table.title]
        parts += [_image("tasks.png")] if "tasks.png" in plots and table is last_task else []
    if maps := heat.attention_of(results["models"]):
        parts += ["## Attention on one sentence", escape_markdown(heat.note(maps))]
        parts += [_image(name) for name in plots if name == "attention.png"]
    written = samples(results["models"])
    parts += ["## Samples"] if written else []
    parts += [_sample(model) for model in written]
    parts += ["## How to repeat it", _recipe(results), "## Limits"]
    parts.append(escape_markdown(prose.limits(results)))
    return "\n\n".join(part for part in parts if part) + "\n"


def escape_markdown(text: str) -> str:
    """One line of text that markdown shows as it is."""
    shown = printable(text).replace("\n", " ").strip()
    shown = re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", shown)
    shown = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", shown)
    return re.sub(r"^([-+=])", r"\\\1", shown)


def _image(name: str) -> str:
    return f"![{PLOTS[name]}]({name})"


def _table(table: tables.Table) -> str:
    side = "--:" if table.numbers else ":--"
    lines = [[escape_markdown(cell) for cell in table.head]]
    lines.append([":--", *([side] * (len(table.head) - 1))])
    lines += [[escape_markdown(cell.text) for cell in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _sample(model: Mapping[str, Any]) -> str:
    sample = model["sample"]
    lines = [f"*Prompt:* {escape_markdown(sample['prompt'].replace(chr(10), ' '))}", ""]
    text = [escape_markdown(line) for line in sample["text"].strip().splitlines()]
    for number, line in enumerate(text):
        goes_on = line and number + 1 < len(text) and text[number + 1]
        lines.append(f"{line}\\" if goes_on else line)
    quote = "\n".join(f"> {line}".rstrip() for line in lines)
    return f"### {escape_markdown(model['mixer'])}\n\n{quote}"


def _recipe(results: dict[str, Any]) -> str:
    command, note, rows = prose.recipe(results)
    cells = [[tables.Cell(text) for text in row] for row in rows]
    table = tables.Table("", ["setting", "value"], cells, numbers=False)
    longest = max((len(run) for run in re.findall("`+", command)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{command}\n{fence}\n\n{note}\n\n{_table(table)}"
