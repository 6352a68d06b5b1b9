"""`ebb bench`: the command line of it."""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from rich.console import Console

from model.config import parse_size
from model.decode import check_weights
from model.ops import OPS
from model.presets import parse_mixer
from train import checkpoint as files
from train.bench import peers
from train.bench.contenders import Contender, formats_of, matched_shapes
from train.bench.growth import save_growth_plots
from train.bench.jobs import Job
from train.bench.machine import Machine
from train.bench.memory import peak_memory
from train.bench.ops import measure_op
from train.bench.rows import Row, machine_line, markdown, table
from train.bench.tasks import Budget, measure
from train.memory import keep_freed_memory
from train.precision import CPU, choose_precision, is_fast_in_bf16
from train.progress import Display
from train.settings import at_least, one_of, parse_count

STEP = 2048
"""Tokens of a training step, where one sequence is not longer."""


class Defaults(NamedTuple):
    """What a task measures when nothing is said: sizes with their contexts."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    mixers: str
    vocab_size: int
    takes: tuple[str, ...]
    """Options that have an effect on it."""


COMMON = ("mixers", "size", "vocab_size", "context", "against")
DEFAULTS = {
    "ops": Defaults((("", (1024,)),), "", 0, ("context",)),
    "train": Defaults(
        (("micro", (256, 1024, 4096)), ("4x512", (256,))),
        "rwkv7,attention",
        256,
        (*COMMON, "batch_size", "precision"),
    ),
    "prefill": Defaults((("small", (512,)),), "rwkv7,attention", 65_536, COMMON),
    "decode": Defaults((("small", (128,)),), "rwkv7", 65_536, (*COMMON, "weights")),
}
SHORT = {
    "ops": Defaults((("", (256,)),), "", 0, ()),
    "train": Defaults((("micro", (256,)),), "rwkv7,attention", 256, ()),
    "prefill": Defaults((("6x256", (512,)),), "rwkv7,attention", 8192, ()),
    "decode": Defaults((("6x256", (128,)),), "rwkv7", 8192, ()),
}
"""For all tasks one after the other, in about two minutes."""
FOR_ALL = ("mixers", "against")
AGAINST = {
    ("transformers", "train"): ("rwkv4", "mamba2"),
    ("transformers", "prefill"): ("rwkv4", "mamba2", "attention"),
    ("transformers", "decode"): ("rwkv4", "mamba2", "attention"),
    ("rwkv", "decode"): ("rwkv7",),
}
"""Models of another library, as we call them, for a task."""


@dataclass(frozen=True)
class BenchConfig:
    """Measure speed and memory, next to what the machine can do at all.

    Everything in a table takes turns, and so do matrix products and plain reads of memory: what
    slows the machine slows all. Models have random weights and the first one's number of
    parameters. Memory is the peak of a process that does only this, beyond Python and its
    libraries. Without a task all of them run, with short settings.
    """

    task: Annotated[
        str | None,
        tyro.conf.Positional,
        tyro.conf.arg(metavar="[ops|train|prefill|decode]"),
    ] = None
    """ops (the recurrences alone), train (whole steps), prefill (reading a prompt) or decode
    (writing, one token at a time)."""
    mixers: str | None = None
    """Names with commas between, as in `ebb train`; rwkv7,attention if not given, decoding
    rwkv7."""
    size: str | None = None
    """nano, micro, tiny or small, or layers and width such as 4x256. If not given: training micro
    and 4x512, else small."""
    vocab_size: int | None = None
    """Tokens in the vocabulary; training 256 if not given, else 65,536."""
    context: str | None = None
    """Tokens of a sequence or prompt, or, decoding, tokens already read; several, such as
    128,1k,4k,16k, give a table of growth and, with --out, a plot."""
    batch_size: int | None = None
    """Sequences of a training step; if not given as many as make 2,048 tokens."""
    weights: str | None = None
    """Formats to decode in, with commas between: fp32, bf16, int8 and int4. All that a mixer can
    be had in if not given."""
    precision: str | None = None
    """Of matrix products in training: fp32 or bf16; what `ebb train` would choose if not given."""
    against: str | None = None
    """transformers (its RWKV-4 and Mamba-2, and Llama but for training), rwkv (the package, which
    decodes), or both with a comma between."""
    seconds: float | None = None
    """To measure each row for, at least three turns; 10 if not given, 2 without a task."""
    memory: bool = True
    """Measure peak memory too, in a process for each row."""
    threads: int | None = None
    """CPU threads; what PyTorch chooses if not given."""
    json: bool = False
    """Print one JSON object instead of tables."""
    markdown: bool = False
    """Print the tables in Markdown."""
    out: Path | None = None
    """File to write the JSON object to; a plot of each growth is put beside it."""

    def __post_init__(self) -> None:
        """Refuses what cannot be measured, or has no effect.

        Raises:
            ValueError: naming the setting.
        """
        if self.task is not None and self.task not in DEFAULTS:
            raise ValueError(
                f"there is no task {self.task!r}; choose one of {', '.join(DEFAULTS)}, or none"
            )
        takes = FOR_ALL if self.task is None else DEFAULTS[self.task].takes
        for name in (*COMMON, "batch_size", "weights", "precision"):
            if getattr(self, name) is not None and name not in takes:
                where = f"on {self.task}" if self.task else "without a task"
                raise ValueError(f"{name.replace('_', '-')} has no effect {where}: leave it out")
        for name in ("vocab_size", "batch_size", "threads"):
            at_least(name, getattr(self, name), 1)
        if self.seconds is not None and not 0 <= self.seconds < math.inf:
            raise ValueError(f"seconds must be at least 0, but is {self.seconds}")
        if self.json and self.markdown:
            raise ValueError("choose one of --json and --markdown")
        if self.out is not None and self.out.suffix != ".json":
            raise ValueError(f"out must be the name of a .json file, but is {self.out}")
        _check_names(self)

    @property
    def tasks(self) -> list[str]:
        """In order."""
        return list(DEFAULTS) if self.task is None else [self.task]

    @property
    def budget(self) -> Budget:
        """Of a row."""
        if self.seconds is not None:
            return Budget(self.seconds)
        return Budget(2.0 if self.task is None else 10.0)


def bench(config: BenchConfig) -> None:
    """Runs `ebb bench`.

    Raises:
        ValueError: for a model or library that cannot be had.
    """
    for library in names_in(config.against):
        peers.check_installed(library)
    if config.out is not None and not config.out.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {config.out.parent} to write {config.out.name} in")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    machine, rows = Machine(), []
    with Display() as display:
        for task in config.tasks:
            machine.probe()
            found = [row for group in _groups(task, config, machine, display) for row in group]
            rows += found
            if not config.json:
                _show(found, config)
    report: dict[str, Any] = {"machine": machine.to_dict(), "rows": [row.to_dict() for row in rows]}
    if config.json:
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        sys.stdout.write(machine_line(report["machine"]) + "\n")
    if config.out is not None:
        files.save_json(config.out, report)
        for path in save_growth_plots(rows, config.out):
            display.say(f"Plot: {path}")


def names_in(text: str | None) -> list[str]:
    """Words between commas."""
    return [] if text is None else [name.strip() for name in text.split(",")]


def jobs_of(task: str, config: BenchConfig) -> list[list[Job]]:
    """What is measured, in groups that take turns: a group has one size.

    Raises:
        ValueError: for a mixer that cannot have that size.
    """
    defaults = (SHORT if config.task is None else DEFAULTS)[task]
    mixers = names_in(config.mixers or defaults.mixers)
    vocab_size = config.vocab_size or defaults.vocab_size
    groups = []
    for size, contexts in defaults.shapes if config.size is None else [(config.size, ())]:
        layers_and_width = parse_size(size)
        contenders: list[Contender] = []
        shapes = matched_shapes(mixers, layers_and_width, vocab_size)
        for mixer, shape in zip(mixers, shapes, strict=True):
            formats = ["fp32"]
            if task == "decode":
                formats = names_in(config.weights) or formats_of(shape)
            contenders += [Contender(shape, weights, mixer=mixer) for weights in formats]
        for library in names_in(config.against):
            for mixer in AGAINST.get((library, task), ()):
                shape = peers.shape_like(shapes[0], library, mixer, layers_and_width)
                contenders.append(Contender(shape, library=library, mixer=mixer))
        lengths = _lengths(config) or contexts or defaults.shapes[0][1]
        groups.append(
            [
                _job(task, contender, context, config)
                for context in lengths
                for contender in contenders
            ]
        )
        if config.context is not None:
            break  # the growth of one size
    return groups


def _job(task: str, contender: Contender, context: int, config: BenchConfig) -> Job:
    if task != "train":
        return Job(task, contender, context)
    batch_size = config.batch_size or max(1, STEP // context)
    precision = choose_precision(config.precision or "auto", CPU)
    return Job(task, contender, context, batch_size, precision)


def _lengths(config: BenchConfig) -> list[int]:
    return sorted({parse_count(text) for text in names_in(config.context)})


def _groups(
    task: str, config: BenchConfig, machine: Machine, display: Display
) -> Iterator[list[Row]]:
    """Measures a task group by group, and shows how far it is."""
    if task == "ops":
        defaults = (SHORT if config.task is None else DEFAULTS)[task]
        lengths = _lengths(config) or defaults.shapes[0][1]
        pairs = [(op, context) for context in lengths for op in OPS]
        with display.noted_task("ops", len(pairs)) as update:
            for done, (op, context) in enumerate(pairs):
                update(done, op)
                yield measure_op(op, context, machine, config.budget)
        return
    groups = jobs_of(task, config)
    done = 0
    with display.noted_task(task, sum(map(len, groups))) as update:
        for jobs in groups:
            update(done, f"{len(jobs)} in turn")
            rows = measure(jobs, machine, config.budget)
            for place, job in enumerate(jobs):
                if config.memory:
                    update(done, f"memory of {job.contender.name}")
                    rows[place] = rows[place].with_memory(peak_memory(job))
                done += 1
            yield rows


def _show(rows: Sequence[Row], config: BenchConfig) -> None:
    if config.markdown:
        sys.stdout.write(markdown(rows) + "\n\n")
    else:
        console = Console(file=sys.stdout, highlight=False)
        console.width = max(console.width, 100) if console.is_terminal else 140
        console.print(table(rows))
        console.print()
    sys.stdout.flush()


def _check_names(config: BenchConfig) -> None:
    """Refuses names that nothing has.

    Raises:
        ValueError: naming what there is.
    """
    mixers: list[Any] = [parse_mixer(name) for name in names_in(config.mixers)]
    if len(set(mixers)) != len(mixers):
        raise ValueError(f"mixers must be different, but are {config.mixers!r}")
    for weights in names_in(config.weights):
        check_weights(weights)
    if config.precision is not None:
        one_of("precision", config.precision, ("fp32", "bf16"))
    if config.precision == "bf16" and not is_fast_in_bf16(CPU):
        raise ValueError("bf16 is slow here, with no tiles (AMX) or no kernels: choose fp32")
    if config.size is not None:
        parse_size(config.size)
    _lengths(config)
    for library in names_in(config.against):
        if library not in peers.LIBRARIES:
            raise ValueError(f"against must be {' or '.join(peers.LIBRARIES)}, but is {library!r}")
        if not any((library, task) in AGAINST for task in config.tasks):
            raise ValueError(f"{library} is not there to {config.task}: leave out --against")
