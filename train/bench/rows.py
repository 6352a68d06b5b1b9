"""What was measured, as values, and as tables for people and for a page."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from train.readable import readable_bytes, readable_count, short_context, three_digits

TITLES = {
    "ops": "Recurrences alone, K = V = 64",
    "train": "Training: whole steps",
    "prefill": "Reading a prompt",
    "decode": "Writing, one token at a time",
}


@dataclass(frozen=True)
class Row:
    """One measurement. What does not apply, or cannot be had, is None."""

    task: str
    mixer: str
    """Or op; with the library in brackets, where it is another."""
    form: str | None
    """Of an op: how it is run, and whether backwards too."""
    d_model: int
    num_layers: int | None
    vocab_size: int | None
    parameters: int | None
    """All of them."""
    context: int
    """Tokens of a sequence; decoding, tokens already read."""
    batch: int
    weights: str | None
    """The format that they are kept in."""
    tokens_per_s: float
    """Median."""
    tokens_per_s_low: float
    """Of the middle half of the measurements."""
    tokens_per_s_high: float
    gflops: float | None
    """GFLOP/s of the products with the weights."""
    fraction_of_gemm: float | None
    """Of the rate of matrix products, measured in turn with it."""
    bytes_per_s: float | None = None
    """Read, decoding: the weights less the embedding, and the state."""
    fraction_of_bandwidth: float | None = None
    """Of the rate of a plain read of as many bytes, measured in turn with it."""
    peak_memory_bytes: int | None = None
    """Of a process that does only this, beyond Python and its libraries."""
    precision: str | None = None
    """Of matrix products, where there are any."""

    def with_memory(self, peak: int | None) -> "Row":
        """The same with a peak."""
        return dataclasses.replace(self, peak_memory_bytes=peak)

    def with_reading(self, count: int, plain: float) -> "Row":
        """The same, with `count` bytes read a token, of which plain reads make so many a second."""
        return dataclasses.replace(
            self,
            bytes_per_s=count * self.tokens_per_s,
            fraction_of_bandwidth=self.tokens_per_s / plain,
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def cells(row: Row) -> dict[str, str]:
    """For people, by heading; headings without a value in any row are left out of a table."""
    spread = (row.tokens_per_s_high - row.tokens_per_s_low) / row.tokens_per_s / 2
    return {
        "model": row.mixer,
        "form": row.form or "",
        "shape": f"{row.num_layers} x {row.d_model}" if row.num_layers else "",
        "vocabulary": _or_none(row.vocab_size, "{:,}".format),
        "parameters": _or_none(row.parameters, readable_count),
        "weights": row.weights or "" if row.task == "decode" else "",
        "precision": row.precision or "" if row.task == "train" else "",
        "context": short_context(row.context),
        "batch": str(row.batch) if row.task == "train" else "",
        "tokens/s": three_digits(row.tokens_per_s),
        "±": f"{spread:.0%}",
        "GFLOP/s": "" if row.task == "decode" else _or_none(row.gflops, three_digits),
        "of products": ""
        if row.task == "decode"
        else _or_none(row.fraction_of_gemm, "{:.0%}".format),
        "GB/s": _or_none(row.bytes_per_s, lambda rate: three_digits(1e-9 * rate)),
        "of reading": _or_none(row.fraction_of_bandwidth, "{:.0%}".format),
        "memory": _or_none(row.peak_memory_bytes, readable_bytes),
    }


LEFT = ("model", "form", "shape", "weights", "precision")
"""Columns of words."""


def _or_none(value: Any, text: Any) -> str:
    return "" if value is None else str(text(value))


def columns(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of a table; what is the same for no row is not there."""
    lines = [cells(row) for row in rows]
    headings = [name for name in lines[0] if any(line[name] for line in lines)]
    return headings, [[line[name] for name in headings] for line in lines]


def table(rows: Sequence[Row]) -> Table:
    """For the terminal."""
    headings, lines = columns(rows)
    shown = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left")
    shown.title, shown.title_style = TITLES[rows[0].task], "bold"
    for heading in headings:
        left = heading in LEFT
        shown.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for line in lines:
        shown.add_row(*line)
    return shown


def markdown(rows: Sequence[Row]) -> str:
    """For a page."""
    headings, lines = columns(rows)
    rule = ["---" if heading in LEFT else "--:" for heading in headings]
    return "\n".join("| " + " | ".join(line) + " |" for line in (headings, rule, *lines))


def machine_line(machine: dict[str, Any]) -> str:
    """What the rows are compared with."""
    rounded = machine["gemm_gflops_bf16"]
    in_bf16 = f", in bf16 {rounded:,.0f}" if rounded else ""
    return (
        f"{machine['processor']}, {machine['threads']} threads: matrix products "
        f"{machine['gemm_gflops']:.0f} GFLOP/s{in_bf16}, plain reads "
        f"{machine['bandwidth_gbs']:.1f} GB/s (medians of this run); recurrences: "
        f"{machine['recurrences']}"
    )
