"""Runs a task: groups of measurements that take turns, each beside what the machine can do."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from train.bench.contenders import Contender, Running, Workshop
from train.bench.jobs import Job, flops_per_token, prepared
from train.bench.machine import Machine
from train.bench.rows import Row
from train.benchmark import Measurement, burst, take_turns, timed

GEMM = "matrix products"


@dataclass(frozen=True)
class Budget:
    """How long each row is measured."""

    seconds: float
    rounds: int = 3
    """At least."""


def measure(jobs: Sequence[Job], machine: Machine, budget: Budget) -> list[Row]:
    """All jobs take turns with each other, with matrix products and, decoding, with plain reads.

    Args:
        jobs: of one task and one precision.
        machine: collects what it can do.
        budget: of each job.

    Raises:
        ValueError: for a model that cannot be had.
    """
    workshop = Workshop()
    models: dict[Contender, Running] = {}
    for job in jobs:
        if job.contender not in models:
            models[job.contender] = workshop.build(job.contender)
    run = _decoding if jobs[0].task == "decode" else _steps
    return run(jobs, models, machine, budget)


def _steps(
    jobs: Sequence[Job], models: dict[Contender, Running], machine: Machine, budget: Budget
) -> list[Row]:
    """Training and prefill: bound by matrix products."""
    runs: dict[Hashable, Callable[[], Sequence[float]]] = {
        job: timed(prepared(job, models[job.contender])) for job in jobs
    }
    runs[GEMM] = partial(machine.multiply, jobs[0].precision)
    found = take_turns(runs, rounds=budget.rounds, seconds=budget.seconds * len(jobs))
    gemm = median(found[GEMM])
    rows = []
    for job in jobs:
        tokens = job.context * job.batch_size
        speed = Measurement.of([tokens / seconds for seconds in found[job]])
        rows.append(_row(job, models[job.contender], speed, gemm))
    return rows


def _decoding(
    jobs: Sequence[Job], models: dict[Contender, Running], machine: Machine, budget: Budget
) -> list[Row]:
    """Token by token: bound by reading the weights. Every row has a plain read of its own size."""
    runs: dict[Hashable, Callable[[], Sequence[float]]] = {}
    sizes: dict[Job, int] = {}
    for job in jobs:
        begin, sizes[job] = models[job.contender].decoding(job.context)
        runs[job] = burst(begin, job.contender.shape.vocab_size)
    for size in sorted(set(sizes.values()), reverse=True):
        runs[size] = burst(machine.reading(size), 1)
    runs[GEMM] = machine.multiply
    found = take_turns(runs, rounds=budget.rounds, seconds=budget.seconds * len(jobs))
    machine.release()
    for size in set(sizes.values()):
        machine.note_reads(size, found[size])
    gemm = median(found[GEMM])
    rows = []
    for job in jobs:
        speed = Measurement.of([1 / seconds for seconds in found[job]])
        row = _row(job, models[job.contender], speed, gemm)
        plain = 1 / median(found[sizes[job]])
        rows.append(row.with_reading(sizes[job], plain))
    return rows


def _row(job: Job, running: Running, speed: Measurement, gemm: float) -> Row:
    shape = job.contender.shape
    gflops = 1e-9 * flops_per_token(job.task, running) * speed.median
    return Row(
        task=job.task,
        mixer=job.contender.name,
        form=None,
        d_model=shape.d_model,
        num_layers=shape.num_layers,
        vocab_size=shape.vocab_size,
        parameters=running.parameters,
        context=job.context,
        batch=job.batch_size,
        weights=job.contender.weights,
        tokens_per_s=speed.median,
        tokens_per_s_low=speed.low,
        tokens_per_s_high=speed.high,
        gflops=gflops,
        fraction_of_gemm=gflops / gemm,
        precision=None if job.task == "decode" else job.precision,
    )
