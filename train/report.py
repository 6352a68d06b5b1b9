"""What `ebb compare` leaves behind: numbers, a report to read, and two figures."""

import math
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any, Literal, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from train.checkpoint import save_json, write_atomically
from train.findings import is_softmax
from train.findings import summary_lines as summary_lines
from train.readable import (
    listed,
    mean_and_deviation,
    readable_bytes,
    readable_count,
    readable_seconds,
    short_context,
    three_digits,
)

RESULTS = "results.json"
REPORT = "report.md"
LOSS_PLOT = "loss.png"
GENERATION_PLOT = "generation.png"
MISSING = "–"  # noqa: RUF001 - a dash in a table's cell, not a minus


class Column(NamedTuple):
    """A column of the results table; an empty heading leaves it out there."""

    name: str
    """Heading in the report."""
    short: str
    """Heading in the terminal."""
    cells: list[str]
    """One a mixer."""


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Writes `results.json`, `report.md`, `loss.png` and `generation.png`; the same each time.

    Args:
        results: what `ebb compare` measured, format 1.
        folder: made if it does not exist; older files of these names are replaced.

    Raises:
        ValueError: if the folder cannot be written.
    """
    from train.plots import save_generation_plot, save_loss_plot  # matplotlib is slow to import

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be made ({error.strerror}): choose another --out."
        ) from error
    save_json(folder / RESULTS, results)
    save_loss_plot(results, folder / LOSS_PLOT)
    save_generation_plot(results, folder / GENERATION_PLOT)
    text = report_text(results)
    write_atomically(folder / REPORT, lambda beside: _write(beside, text))


def summary_table(results: dict[str, Any]) -> Table:
    """One row a mixer, for the terminal; fits 80 columns, where long names are folded."""
    columns = [column for column in _columns(results) if column.short]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for number, column in enumerate(columns):
        justify: Literal["left", "right"] = "right" if number else "left"
        head = Text(column.short)
        table.add_column(head, justify=justify, overflow="fold", no_wrap=number > 0)
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*(Text(cell.replace(" ± ", "\n±")) for cell in cells))
    return table


def report_text(results: dict[str, Any]) -> str:
    """The report as markdown, images by relative name, no absolute path."""
    models = results["models"]
    columns = [column for column in _columns(results) if column.name]
    overview = list(zip(*(column.cells for column in columns), strict=True))
    parts = [
        f"# {_title(results)}",
        "## Summary",
        "\n".join(f"- {escape_markdown(line)}" for line in summary_lines(results)),
        "## Results",
        _markdown_table([column.name for column in columns], overview),
        _reading_notes(results),
        f"![Validation and training loss against tokens and against time]({LOSS_PLOT})",
    ]
    if any(model["generation"] for model in models):
        parts += [
            "## Generation",
            _markdown_table(*_generation_rows(models)),
            _state_note(models),
            f"![Time per token and memory for the state against context]({GENERATION_PLOT})",
        ]
    parts += ["## Runs", _markdown_table(*_run_rows(models))]
    parts += ["## Samples", *(_sample(model) for model in models)]
    parts += ["## How to repeat it", _recipe(results), "## Limits", _limits(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def escape_markdown(text: str) -> str:
    """One line of text that markdown shows as it is."""
    shown = "".join(char if char.isprintable() else " " for char in text).strip()
    shown = re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", shown)
    shown = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", shown)
    return re.sub(r"^([-+=])", r"\\\1", shown)


def _title(results: dict[str, Any]) -> str:
    mixers = listed([model["mixer"] for model in results["models"]])
    return escape_markdown(f"{mixers} on {PurePath(results['data']['name']).name}")


def _columns(results: dict[str, Any]) -> list[Column]:
    models = results["models"]
    contexts = sorted({point["context"] for m in models for point in m["generation"]})
    losses = [[run["validation_loss"] for run in m["runs"]] for m in models]
    bits = [[run["validation_bits_per_byte"] for run in m["runs"]] for m in models]
    perplexities = [[_perplexity(loss) for loss in values] for values in losses]
    speeds = [f"{m['training_speed']['tokens_per_second']:,.0f}" for m in models]
    columns = [
        Column("mixer", "mixer", [m["mixer"] for m in models]),
        Column("parameters", "", [f"{m['parameters']:,}" for m in models]),
        Column("", "params", [readable_count(m["parameters"]) for m in models]),
        Column("validation loss", "loss", [mean_and_deviation(values) for values in losses]),
        Column("bits/byte", "bits/\nbyte", [mean_and_deviation(values) for values in bits]),
        Column("perplexity", "", [mean_and_deviation(v, digits=1) for v in perplexities]),
        Column("training tokens/s", "train\ntok/s", speeds),
    ]
    measures: list[tuple[str, str, Callable[[float], str]]] = [
        ("ms/token", "ms_per_token", three_digits),
        ("state", "state_bytes", readable_bytes),
    ]
    for name, key, text in measures:
        for context in contexts[:1] + contexts[1:][-1:]:
            points = [{p["context"]: p[key] for p in m["generation"]} for m in models]
            cells = [text(found[context]) if context in found else MISSING for found in points]
            at = f"{name}\nat {short_context(context)}"
            columns.append(Column(f"{name} at {context:,}", at, cells))
    return columns


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _generation_rows(models: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    contexts = sorted({point["context"] for model in models for point in model["generation"]})
    head = ["context"]
    for model in models:
        head += [f"{model['mixer']} ms/token", "state", "state and weights"]
    rows = []
    for context in contexts:
        row = [f"{context:,}"]
        for model in models:
            points = {point["context"]: point for point in model["generation"]}
            if context in points:
                row += _generation_cells(points[context], model["weight_bytes"])
            else:
                row += [MISSING] * 3
        rows.append(row)
    return head, rows


def _generation_cells(point: dict[str, Any], weight_bytes: int) -> list[str]:
    middle, low, high = (three_digits(point[key]) for key in ("ms_per_token", "low", "high"))
    sizes = (point["state_bytes"], point["state_bytes"] + weight_bytes)
    return [f"{middle} ({low} to {high})", *(readable_bytes(size) for size in sizes)]


def _run_rows(models: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    head = ["run", "mixer", "seed", "validation loss", "bits/byte", "tokens", "time", "tokens/s"]
    rows = [
        [
            _without_folders(run["folder"]),
            model["mixer"],
            str(run["seed"]),
            f"{run['validation_loss']:.4f}",
            f"{run['validation_bits_per_byte']:.4f}",
            f"{run['tokens']:,}",
            readable_seconds(run["seconds"]),
            f"{run['tokens_per_second']:,.0f}",
        ]
        for model in models
        for run in model["runs"]
    ]
    return head, rows


def _reading_notes(results: dict[str, Any]) -> str:
    several = any(len(model["runs"]) > 1 for model in results["models"])
    deviation = "; ± is the standard deviation over seeds" if several else ""
    return (
        "Loss is in nats per token, on text that was not trained on; perplexity is its exponential"
        f"{deviation}. Training tokens/s is the median of measurements that take turns between "
        "the mixers. 1 KB is 1,000 bytes."
    )


def _state_note(models: list[dict[str, Any]]) -> str:
    softmax = [model["mixer"] for model in models if is_softmax(model["mixer"])]
    text = "Milliseconds are medians, with the middle half of the measurements in brackets."
    if softmax:
        text += (
            f" The softmax baseline ({listed(softmax)}) keeps the key and the value of every token "
            "it has read: its cache grows with the context, and so does the work for each token. "
            "This implementation copies the cache at every token; with memory set aside for it "
            "beforehand a long context would take about half the time."
        )
    return escape_markdown(text)


def _sample(model: dict[str, Any]) -> str:
    sample = model["sample"]
    lines = [f"*Prompt:* {escape_markdown(sample['prompt'].replace(chr(10), ' '))}", ""]
    text = [escape_markdown(line) for line in sample["text"].strip().splitlines()]
    for number, line in enumerate(text):
        goes_on = line and number + 1 < len(text) and text[number + 1]
        lines.append(f"{line}\\" if goes_on else line)
    quote = "\n".join(f"> {line}".rstrip() for line in lines)
    return f"### {escape_markdown(model['mixer'])}\n\n{quote}"


def _recipe(results: dict[str, Any]) -> str:
    settings, data, machine = (results[key] for key in ("settings", "data", "machine"))
    command, shortened = _portable(settings["command"])
    note = "\n\nFull paths in this command were cut to their last part." if shortened else ""
    rows = [
        ["size", settings["size"]],
        [
            "steps, batch size, context",
            f"{settings['steps']:,}, {settings['batch_size']:,}, {settings['context']:,}",
        ],
        ["seeds", ", ".join(str(seed) for seed in settings["seeds"])],
        ["data", _without_folders(data["name"])],
        ["tokenizer", f"{_without_folders(data['tokenizer'])}, {data['vocab_size']:,} tokens"],
        ["training, validation tokens", f"{data['train_tokens']:,}, {data['validation_tokens']:,}"],
        ["ebb, torch", f"{machine['ebb']}, {machine['torch']}"],
        ["processor", f"{machine['processor']}, {machine['threads']} threads"],
    ]
    table = _markdown_table(["setting", "value"], rows, right=False)
    return f"```\n{command}\n```{note}\n\n{table}"


def _limits(results: dict[str, Any]) -> str:
    models, machine = results["models"], results["machine"]
    parameters = max(model["parameters"] for model in models)
    tokens = max(run["tokens"] for model in models for run in model["runs"])
    seeds = max(len(model["runs"]) for model in models)
    limits = [
        f"These are small models (at most {readable_count(parameters)} parameters) after a short "
        f"training ({readable_count(tokens)} tokens, {three_digits(tokens / parameters)} for each "
        "parameter, where large models see 20 and more): an order found here may not hold for "
        "larger models or longer training.",
        "Each mixer has one recipe, fixed beforehand; none was tuned on this text.",
        f"Speeds are of this implementation on one machine with {machine['threads']} threads; "
        "another machine can order the mixers differently.",
        f"The text is {_without_folders(results['data']['name'])} alone, and the samples are one "
        "draw each.",
    ]
    if seeds == 1:
        limits.append("With one seed, chance cannot be told from a small difference.")
    elif seeds < 5:
        limits.append(f"{seeds} seeds give only a rough idea of the noise.")
    return escape_markdown(" ".join(limits))


def _portable(command: str) -> tuple[str, bool]:
    """A command without absolute paths, and whether it had any."""
    words = [_without_folders(word) for word in shlex.split(command)]
    return shlex.join(words), words != shlex.split(command)


def _without_folders(word: str) -> str:
    """`/a/b` and `--out=/a/b` without `/a/`; anything else as it is."""
    flag, equals, value = word.rpartition("=")
    return f"{flag}{equals}{PurePath(value).name}" if value.startswith("/") else word


def _markdown_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, right: bool = True
) -> str:
    ruler = [":--", *(["--:" if right else ":--"] * (len(head) - 1))]
    lines = [[escape_markdown(cell) for cell in head], ruler]
    lines += [[escape_markdown(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
