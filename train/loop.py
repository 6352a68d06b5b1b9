"""The training loop."""

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from data.loader import Batch
from model.config import ModelConfig
from model.layers import MIXERS
from model.ops import OPS, native
from train import checkpoint as files
from train.compiling import compile_blocks, uncompile, uncompiled
from train.config import TrainConfig
from train.distributed import LAUNCHER_ECHO, Ranks
from train.evaluate import Evaluation, bits_per_byte
from train.interrupt import Interrupted, stop_on_signal
from train.machine import Machine, choose_machine
from train.memory import keep_freed_memory
from train.metrics import MetricsLog
from train.optimizer import make_optimizer, set_rate
from train.precision import bf16_products
from train.progress import Display
from train.recipes import recipe_of
from train.resume import Progress, check_data, claim_folder, is_applied
from train.run_data import run_data, training_batches, validation_batches
from train.run_folder import RunFolder
from train.run_instruments import RunInstruments
from train.sampling import sample_text
from train.schedule import rate_factor
from train.snapshot import Snapshot, whole_tokenizer
from train.starting import (
    dropout,
    epochs,
    final_fraction,
    new_model,
    seed_dropout,
    steps,
    warmup,
)
from train.trackers import start_trackers


@dataclass(frozen=True)
class TrainResult:
    """How a finished run ended."""

    folder: Path
    num_parameters: int
    tokens: int
    """Trained on, repetitions counted."""
    validation: Evaluation
    tokens_per_second: float
    """Median over the logged stretches of whole training steps."""


def train(config: TrainConfig, display: Display | None = None) -> TrainResult:
    """Trains one model; `ebb train`.

    Raises:
        ValueError: for settings, data or a folder that cannot be used.
        Diverged: when it has come to nothing.
        Interrupted: after Ctrl-C, when all is saved; after a second one, at once.
    """
    result = train_until(config, config.steps, display)
    assert result is not None
    return result


def train_until(
    config: TrainConfig, step: int, display: Display | None = None, *, announce: bool = True
) -> TrainResult | None:
    """As `train`, but a run that is not at its end after that step is saved, and None comes back.

    With `config.resume`, the next call goes on from there, exactly as if there had been no pause;
    it need not `announce` again what is trained on what.
    """
    keep_freed_memory()
    ranks = Ranks(config)
    own_display = Display(quiet=not ranks.is_main) if display is None else nullcontext(display)
    with ranks.told_once(), own_display as shown:
        ranks.check()
        with ranks.locked(config.folder):
            resumed = ranks.in_turn(lambda: claim_folder(config, shown))
            machine = ranks.in_turn(lambda: choose_machine(config, ranks.device, shown.say))
            with machine.in_use():
                result = _Run(config, shown, ranks, machine, resumed).run(step, announce)
        ranks.close()
        return result


class _Run:
    """One run: built from its settings or its newest snapshot, then stepped to the end."""

    def __init__(
        self,
        config: TrainConfig,
        display: Display,
        ranks: Ranks,
        machine: Machine,
        resumed: Snapshot | None,
    ) -> None:
        self.config, self.display, self.folder, self.ranks = config, display, config.folder, ranks
        self.precision = machine.precision
        self.data = ranks.in_turn(
            lambda: run_data(
                config, display, whole_tokenizer(self.folder, resumed.step) if resumed else None
            )
        )
        if resumed is not None:
            check_data(self.folder, self.data.fingerprint)
        self.batches = training_batches(config, self.data)
        self._validation_batches()  # refuses a text that is too short before anything is trained
        torch.manual_seed(config.seed)
        self.model = new_model(config, self.data.tokenizer, is_resumed=resumed is not None)
        self.steps = steps(config, self.data.train.tokens.size)
        self.dropout = dropout(config, self.data.train.tokens.size)
        self.model.set_dropout(self.dropout)
        model_config = self.model.config
        if self.precision == "fp64":
            self.model.double()
        self.recipe = recipe_of(model_config.mixer)
        self.rate = config.learning_rate or self.recipe.learning_rate(model_config.d_model)
        decay = self.recipe.weight_decay if config.weight_decay is None else config.weight_decay
        self.progress = Progress()
        if resumed is not None:
            files.fill(self.model, resumed.weights, f"The checkpoint in {self.folder}")
            self.progress = Progress(**resumed.progress)
        if machine.compile:
            compiles = self._compile(must=resumed is not None)
            machine = dataclasses.replace(machine, compile=compiles)
        self.carry = ranks.carry(self.model) if config.carry_state else None
        ranks.prepare(self.model)
        self.optimizer = make_optimizer(self.model, self.recipe, self.rate, decay, config.optimizer)
        if resumed is not None:
            self.optimizer.load_state_dict(ranks.divided(resumed.optimizer, self.optimizer))
            if self.carry is not None:
                self.carry.restore(resumed.extra, ranks.device)
        self.files = RunFolder(config, self.progress)
        self.instruments = RunInstruments(config, ranks)
        if resumed is not None:
            ranks.in_turn(lambda: self.files.go_on_from(resumed))
        ranks.wait()  # until all have read the old files
        ranks.on_main(lambda: self._begin_files(model_config, machine))
        start_trackers(ranks.accelerator, config)

    @property
    def bf16(self) -> bool:
        """Whether a step has its products in bfloat16."""
        return self.precision == "bf16"

    def run(self, until: int, announce: bool) -> TrainResult | None:
        """Steps to the end, to the step at which to pause, or to an interrupt."""
        if announce:
            self._announce()
        try:
            return self._run(min(until, self.steps))
        except KeyboardInterrupt:
            raise Interrupted(f"Stopped at once; {self.files.how_to_go_on()}") from None

    def _run(self, until: int) -> TrainResult | None:
        config, progress = self.config, self.progress
        every = config.eval_every or max(1, self.steps // 10)
        save_every = config.save_every or every
        sample_every = every if config.sample_every is None else config.sample_every
        validation: Evaluation | None = None
        with (
            stop_on_signal(self.display.say, LAUNCHER_ECHO * (self.ranks.count > 1)) as stop,
            self.display.noted_task("Step", self.steps, progress.step) as show,
        ):
            note, is_due = "", False
            while progress.step < until and not self.ranks.any(stop.requested):
                start = time.perf_counter()
                batch = self.batches[progress.step]
                loss, norm = self._step(batch)
                num_bytes = int(self.data.token_bytes[batch.targets.numpy()].sum())
                progress.add(loss, norm, config.clip, time.perf_counter() - start, num_bytes)
                is_last = progress.step == self.steps
                is_given_up = progress.skipped_in_a_row >= config.max_skipped
                if progress.step % config.log_every == 0 or is_last or is_given_up:
                    self._log()
                if progress.skipped_in_a_row:
                    look = partial(self.files.look_at_skipped, loss, norm, self.display.say)
                    self.ranks.in_turn(look)
                if progress.step % every == 0 or is_last:
                    validation = self._validate()
                    note = f" val {validation.bits_per_byte:.3f}"
                if sample_every and (progress.step % sample_every == 0 or is_last):
                    self._show_sample()
                is_due |= progress.step % save_every == 0
                if is_last or (is_due and not progress.skipped_in_a_row):
                    self._save(is_good=True)
                    is_due = False
                show(progress.step, self._note(loss, num_bytes) + note)
            if progress.step < self.steps:
                self._save(is_good=not progress.skipped_in_a_row)
                if not self.ranks.any(stop.requested):
                    return None
                done = f"Saved after step {progress.step} of {self.steps}"
                raise Interrupted(f"{done}; {self.files.how_to_go_on()}")
        self.instruments.draw(self.model, self._validation_batches(), self.data.tokenizer)
        if validation is None:  # resumed when nothing was left to do
            validation = self._evaluate()
        return TrainResult(
            folder=self.folder,
            num_parameters=self.model.num_parameters(),
            tokens=progress.step * config.batch_size * config.context,
            validation=validation,
            tokens_per_second=statistics.median(progress.speeds),
        )

    def _step(self, batch: Batch) -> tuple[float, float]:
        """One step; its loss and the norm of its gradient, which is applied if both are finite."""
        factor = rate_factor(
            self.progress.step,
            steps=self.steps,
            warmup=warmup(self.config, self.steps),
            final_fraction=final_fraction(self.config),
            schedule=self.config.schedule,
        )
        set_rate(self.optimizer, self.rate * factor)
        seed_dropout(self.dropout, self.config.seed, self.progress.step)
        loss = self.ranks.forward_backward(batch, bf16=self.bf16, carry=self.carry)
        norm = self.ranks.clip(self.model.parameters(), self.config.clip)
        if is_applied(loss, norm):
            if self.carry is not None:
                self.carry.keep()
            with bf16_products(self.ranks.device, enabled=self.bf16):  # Muon has some
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def _log(self) -> None:
        self._write_metrics(
            **self.progress.end_stretch(self.config.batch_size * self.config.context),
            learning_rate=self.optimizer.param_groups[0]["lr"]
            / self.optimizer.param_groups[0]["lr_scale"],
        )

    def _note(self, loss: float, num_bytes: int) -> str:
        speed = f"{self.progress.speeds[-1]:,.0f} tok/s " if self.progress.speeds else ""
        bits = bits_per_byte(loss * self.config.batch_size * self.config.context, num_bytes)
        return f"{speed}loss {loss:.3f} {bits:.3f} bits/B"

    def _validation_batches(self) -> Iterator[Batch]:
        return validation_batches(self.config, self.data)

    def _evaluate(self) -> Evaluation:
        """Loss on the validation text."""
        with uncompiled():
            return self.ranks.evaluate(
                self.model, self._validation_batches(), self.data.token_bytes
            )

    def _validate(self) -> Evaluation:
        """Loss on the validation text, written down; keeps the best weights; shows a sample."""
        result, progress = self._evaluate(), self.progress
        if not math.isfinite(result.loss):
            raise self.files.diverged(
                f"The validation loss is not finite at step {progress.step:,}"
            )
        self._write_metrics(
            validation_loss=result.loss,
            validation_bits_per_byte=result.bits_per_byte,
            **self.instruments.read(self.model, self._validation_batches()),
        )
        if progress.best_loss is None or result.loss < progress.best_loss:
            progress.best_loss = result.loss
            best = self.ranks.whole(self.model.state_dict())
            self.ranks.on_main(lambda: self.files.save_best(best))
        self.display.say(
            f"step {progress.step:,}: validation {result.loss:.4f} nats/token, "
            f"{result.bits_per_byte:.4f} bits/byte"
        )
        return result

    def _show_sample(self) -> None:
        model = self.ranks.plain(self.model)
        if model is None:
            return
        with uncompiled():
            text = sample_text(
                model, self.data.tokenizer, tokens=60, seed=self.config.seed, prompt="\n"
            )
        self.display.say("  " + " ".join(text.split()), style="dim")

    def _write_metrics(self, **values: float) -> None:
        step = self.progress.step
        line = {
            "step": step,
            "tokens": step * self.config.batch_size * self.config.context,
            "seconds": round(self.progress.seconds, 3),
            **values,
        }
        self.ranks.on_main(lambda: self.metrics.append(line))
        self.ranks.accelerator.log(line, step)

    def _save(self, *, is_good: bool) -> None:
        carried = {} if self.carry is None else self.carry.tensors()
        weights = self.ranks.whole(self.model.state_dict())
        optimizer = self.ranks.whole(self.optimizer.state_dict())
        self.ranks.on_main(lambda: self.files.save(weights, optimizer, carried, is_good=is_good))

    def _begin_files(self, model_config: ModelConfig, machine: Machine) -> None:
        self.files.write_settings(model_config, self.data, machine)
        self.metrics = MetricsLog(self.folder / files.METRICS, self.progress.step)

    def _compile(self, *, must: bool) -> bool:
        """Compiles the blocks in all processes, or in none; whether it worked."""
        self.model.to(self.ranks.device)
        batch = self.ranks.share(self.batches[0], 0)
        starts = torch.zeros_like(batch.inputs, dtype=torch.bool)
        kinds = [batch._replace(reset=None), batch._replace(reset=starts)]
        compiled = self.ranks.in_turn(
            lambda: compile_blocks(self.model, kinds, self.display.say, bf16=self.bf16, must=must)
        )
        if not self.ranks.any(not compiled):
            return True
        uncompile(self.model)
        return False

    def _announce(self) -> None:
        config, data = self.config, self.data
        cut = f" in {self.steps:,} of {config.steps:,} steps" if self.steps < config.steps else ""
        self.display.say(
            f"{config.mixer} {config.size}: {self.model.num_parameters():,} parameters, "
            f"{data.tokenizer.name} tokenizer ({data.tokenizer.vocab_size:,}), {data.name}: "
            f"{data.train.tokens.size:,} training tokens, "
            f"{epochs(config, data.train.tokens.size):.2f} epochs{cut}, "
            f"{f'dropout {self.dropout:g}, ' if self.dropout else ''}"
            f"{torch.get_num_threads()} threads, {self.precision} "
            f"-> {self.folder}"
        )
        if OPS[MIXERS[self.model.config.mixer].op].native and not native.is_available():
            self.display.say(f"The recurrence runs in plain PyTorch: {native.status()}.")
        if self.progress.step:
            self.display.say(f"Going on after step {self.progress.step:,}.")
