"""The training loop."""

import dataclasses
import math
import shlex
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from data.loader import Batch, StretchBatches, TrainingBatches, validation_batches
from model.config import ModelConfig
from model.language_model import LanguageModel
from model.layers import MIXERS
from model.ops import OPS, native
from model.presets import preset
from train import checkpoint as files
from train.carry import Carry
from train.config import TrainConfig
from train.distributed import LAUNCHER_ECHO, Ranks
from train.evaluate import Evaluation, bits_per_byte
from train.interrupt import Interrupted, stop_on_signal
from train.memory import keep_freed_memory
from train.metrics import MetricsLog
from train.optimizer import make_optimizer, set_rate
from train.prepare import prepare_data
from train.progress import Display
from train.recipes import recipe_of
from train.resume import Progress, check_data, claim_folder
from train.sampling import sample_text
from train.schedule import rate_factor
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
        Interrupted: after Ctrl-C, when everything is saved.
    """
    keep_freed_memory()
    ranks = Ranks(config)
    own_display = Display(quiet=not ranks.is_main) if display is None else nullcontext(display)
    with ranks.told_once(), own_display as shown:
        ranks.check()
        with ranks.locked(config.folder):
            result = _Run(config, shown, ranks).run()
        ranks.close()
        return result


class _Run:
    """One run: built from its settings or its newest snapshot, then stepped to the end."""

    def __init__(self, config: TrainConfig, display: Display, ranks: Ranks) -> None:
        self.config, self.display, self.folder = config, display, config.folder
        self.ranks = ranks
        resumed = ranks.in_turn(lambda: claim_folder(config, display))
        self.data = ranks.in_turn(
            lambda: prepare_data(
                config.data,
                config.column,
                config.tokenizer,
                config.vocab_size,
                display,
                fixed_tokenizer=self.folder / files.TOKENIZER if resumed else None,
                stream=config.stream,
            )
        )
        if resumed is not None:
            check_data(self.folder, self.data.fingerprint)
        self.carry = Carry() if config.carry_state else None
        self.batches = (StretchBatches if config.carry_state else TrainingBatches)(
            self.data.train.tokens,
            context=config.context,
            batch_size=config.batch_size,
            seed=config.seed,
            end_id=self.data.tokenizer.end_id,
        )
        self._validation_batches()  # refuses a text that is too short before anything is trained
        torch.manual_seed(config.seed)
        model_config = preset(
            config.size, config.mixer, self.data.tokenizer.vocab_size, ffn_dim=config.ffn_dim
        )
        self.model = LanguageModel(model_config)
        if config.precision == "fp64":
            self.model.double()
        self.recipe = recipe_of(model_config.mixer)
        self.rate = config.learning_rate or self.recipe.learning_rate
        decay = self.recipe.weight_decay if config.weight_decay is None else config.weight_decay
        self.progress = Progress()
        if resumed is not None:
            files.fill(self.model, resumed.weights, f"The checkpoint in {self.folder}")
            self.progress = Progress(**resumed.progress)
        ranks.prepare(self.model)
        self.optimizer = make_optimizer(self.model, self.recipe, self.rate, decay)
        if resumed is not None:
            self.optimizer.load_state_dict(ranks.divided(resumed.optimizer, self.optimizer))
            if self.carry is not None:
                self.carry.restore(self.model, config.batch_size, resumed.extra)
        ranks.wait()  # until all have read the old files
        ranks.on_main(lambda: self._begin_files(model_config))
        start_trackers(ranks.accelerator, config)

    def run(self) -> TrainResult:
        """Steps to the end, or to an interrupt."""
        config, progress = self.config, self.progress
        every = config.eval_every or max(1, config.steps // 10)
        save_every = config.save_every or every
        sample_every = every if config.sample_every is None else config.sample_every
        self._announce()
        validation: Evaluation | None = None
        with (
            stop_on_signal(self.display.say, LAUNCHER_ECHO * (self.ranks.count > 1)) as stop,
            self.display.noted_task("Step", config.steps, progress.step) as show,
        ):
            note = ""
            while progress.step < config.steps and not self.ranks.any(stop.requested):
                start = time.perf_counter()
                batch = self.batches[progress.step]
                loss, norm = self._step(batch)
                num_bytes = int(self.data.token_bytes[batch.targets.numpy()].sum())
                progress.add(loss, norm, time.perf_counter() - start, num_bytes)
                is_last = progress.step == config.steps
                if progress.step % config.log_every == 0 or is_last:
                    self._log()
                if progress.step % every == 0 or is_last:
                    validation = self._validate()
                    note = f" val {validation.bits_per_byte:.3f}"
                if sample_every and (progress.step % sample_every == 0 or is_last):
                    self._show_sample()
                if progress.step % save_every == 0 or is_last:
                    self._save()
                show(progress.step, self._note(loss, num_bytes) + note)
            if progress.step < config.steps:
                self._save()
                raise Interrupted(
                    f"Saved after step {progress.step} of {config.steps}; go on with: "
                    f"ebb train --resume --out {shlex.quote(str(self.folder))}"
                )
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
        """One optimiser step; its loss and the norm of its gradient."""
        factor = rate_factor(
            self.progress.step,
            steps=self.config.steps,
            warmup=self._warmup(),
            final_fraction=self.recipe.final_fraction,
        )
        set_rate(self.optimizer, self.rate * factor)
        loss = self.ranks.forward_backward(
            batch, bf16=_is_bf16(self.config.precision), carry=self.carry
        )
        norm = self.ranks.clip(self.model.parameters(), self.config.clip)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._diverged("loss or its gradient", self.progress.step + 1)
        if self.carry is not None:
            self.carry.keep()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def _warmup(self) -> int:
        steps = self.config.steps
        if self.config.warmup is not None:
            return self.config.warmup
        return min(max(10, steps // 50), steps - 1)

    def _log(self) -> None:
        loss, norm = statistics.fmean(self.progress.losses), self.progress.norm
        nats = sum(self.progress.losses) * self.config.batch_size * self.config.context
        bits = bits_per_byte(nats, self.progress.num_bytes)
        self.progress.end_stretch(self.config.batch_size * self.config.context)
        self._write_metrics(
            loss=loss,
            bits_per_byte=bits,
            gradient_norm=norm,
            learning_rate=self.optimizer.param_groups[0]["lr"]
            / self.optimizer.param_groups[0]["lr_scale"],
            tokens_per_second=self.progress.speeds[-1],
        )

    def _note(self, loss: float, num_bytes: int) -> str:
        speed = f"{self.progress.speeds[-1]:,.0f} tok/s " if self.progress.speeds else ""
        bits = bits_per_byte(loss * self.config.batch_size * self.config.context, num_bytes)
        return f"{speed}loss {loss:.3f} {bits:.3f} bits/B"

    def _validation_batches(self) -> Any:
        return validation_batches(
            self.data.validation.tokens,
            context=self.config.context,
            batch_size=self.config.batch_size,
            end_id=self.data.tokenizer.end_id,
            max_tokens=self.config.eval_tokens,
        )

    def _evaluate(self) -> Evaluation:
        """Loss on the validation text."""
        return self.ranks.evaluate(self.model, self._validation_batches(), self.data.token_bytes)

    def _validate(self) -> Evaluation:
        """Loss on the validation text, written down; keeps the best weights; shows a sample."""
        result, progress = self._evaluate(), self.progress
        if not math.isfinite(result.loss):
            raise self._diverged("validation loss", progress.step)
        self._write_metrics(
            validation_loss=result.loss, validation_bits_per_byte=result.bits_per_byte
        )
        if progress.best_loss is None or result.loss < progress.best_loss:
            progress.best_loss = result.loss
            best = self.ranks.whole(self.model.state_dict())
            self.ranks.on_main(lambda: files.save_weights(self.folder / files.BEST, best))
        self.display.say(
            f"step {progress.step:,}: validation {result.loss:.4f} nats/token, "
            f"{result.bits_per_byte:.4f} bits/byte"
        )
        return result

    def _show_sample(self) -> None:
        model = self.ranks.plain(self.model)
        if model is None:
            return
        text = sample_text(
            model, self.data.tokenizer, tokens=60, seed=self.config.seed, prompt="\n"
        )
        self.display.say("  " + " ".join(text.split()), style="dim")

    def _diverged(self, what: str, step: int) -> ValueError:
        return ValueError(
            f"The {what} is not finite at step {step}; the last checkpoint is as it was. Start "
            "afresh with a lower --learning-rate or a longer --warmup."
        )

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

    def _save(self) -> None:
        """A snapshot to resume from, and the weights as `ebb generate` reads them."""
        weights = self.ranks.whole(self.model.state_dict())
        optimizer = self.ranks.whole(self.optimizer.state_dict())
        self.ranks.on_main(lambda: self._write(weights, optimizer))

    def _write(self, weights: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
        progress = dataclasses.asdict(self.progress)
        carried = {} if self.carry is None else self.carry.tensors()
        files.save_snapshot(
            self.folder, files.Snapshot(self.progress.step, weights, optimizer, progress, carried)
        )
        files.save_weights(self.folder / files.WEIGHTS, weights)

    def _begin_files(self, model_config: ModelConfig) -> None:
        files.save_json(
            self.folder / files.CONFIG,
            {
                "model": model_config.to_dict(),
                "train": self.config.to_dict(),
                "data": {"name": self.data.name, "fingerprint": self.data.fingerprint},
            },
        )
        files.write_atomically(self.folder / files.TOKENIZER, self.data.tokenizer.save)
        self.metrics = MetricsLog(self.folder / files.METRICS, self.progress.step)

    def _announce(self) -> None:
        config, data = self.config, self.data
        self.display.say(
            f"{config.mixer} {config.size}: {self.model.num_parameters():,} parameters, "
            f"{data.tokenizer.name} tokenizer ({data.tokenizer.vocab_size:,}), {data.name}: "
            f"{data.train.tokens.size:,} training tokens, "
            f"{config.steps * config.batch_size * config.context / data.train.tokens.size:.2f} "
            f"epochs, {torch.get_num_threads()} threads -> {self.folder}"
        )
        if OPS[MIXERS[self.model.config.mixer].op].native and not native.is_available():
            self.display.say(f"The recurrence runs in plain PyTorch: {native.status()}.")
        if self.progress.step:
            self.display.say(f"Going on after step {self.progress.step:,}.")


def _is_bf16(precision: str) -> bool:
    """Whether matrix products run in bfloat16; validation and samples are always in float32."""
    if precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return precision == "bf16"


def train_command(config: TrainConfig) -> None:
    """Runs `ebb train` and prints how it ended."""
    result = train(config)
    if not PartialState().is_main_process:
        return
    sys.stdout.write(
        f"{result.folder}: {result.num_parameters:,} parameters, {result.tokens:,} tokens at "
        f"{result.tokens_per_second:,.0f} tokens/s; validation {result.validation.loss:.4f} "
        f"nats/token, {result.validation.bits_per_byte:.4f} bits/byte\n"
        f"Write with it: ebb generate {shlex.quote(str(result.folder))} --prompt 'The'\n"
    )
