"""The text of a run, by its settings: prepared, and in batches."""

from collections.abc import Iterator
from pathlib import Path

from data import loader
from data.loader import Batch, StretchBatches, TrainingBatches
from train.config import TrainConfig
from train.prepare import PreparedData, prepare_data
from train.progress import Display


def run_data(
    config: TrainConfig, display: Display, fixed_tokenizer: Path | None = None
) -> PreparedData:
    """The text in tokens; a resumed run's `fixed_tokenizer` stands above the settings.

    Raises:
        ValueError: for data or a tokenizer that cannot be read.
    """
    return prepare_data(
        config.data,
        config.column,
        config.tokenizer,
        config.vocab_size,
        display,
        fixed_tokenizer=fixed_tokenizer,
        stream=config.stream,
    )


def training_batches(config: TrainConfig, data: PreparedData) -> TrainingBatches | StretchBatches:
    """The batch of each step, of all processes together.

    Raises:
        ValueError: for a text that is too short.
    """
    return (StretchBatches if config.carry_state else TrainingBatches)(
        data.train.tokens,
        context=config.context,
        batch_size=config.batch_size,
        seed=config.seed,
        end_id=data.tokenizer.end_id,
    )


def validation_batches(config: TrainConfig, data: PreparedData) -> Iterator[Batch]:
    """The same batches at each validation.

    Raises:
        ValueError: for a text that is too short.
    """
    return loader.validation_batches(
        data.validation.tokens,
        context=config.context,
        batch_size=config.batch_size,
        end_id=data.tokenizer.end_id,
        max_tokens=config.eval_tokens,
    )
