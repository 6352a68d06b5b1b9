"""The instruments of a run: read in every validation, drawn at its end."""

from collections.abc import Iterator

from data.loader import Batch
from data.tokenizers import Tokenizer
from model.language_model import LanguageModel
from train.compiling import uncompiled
from train.config import TrainConfig
from train.distributed import Ranks
from train.instruments import parse_instruments, read_instruments


class RunInstruments:
    """Those that `--instruments` switches on; where it is not given, nothing is done.

    All processes call the methods together; the first one alone reads and draws.

    Args:
        config: of the run.
        ranks: its processes.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        chosen = config.instruments
        self._names = () if chosen is None else parse_instruments(chosen)
        self._folder, self._ranks = config.folder, ranks

    def read(self, model: LanguageModel, batches: Iterator[Batch]) -> dict[str, float]:
        """What they say of the first of the validation's batches, for `metrics.jsonl`."""
        alone = self._ranks.plain(model) if self._names else None
        if alone is None:
            return {}
        with uncompiled():
            return read_instruments(alone, next(batches), self._names)

    def draw(self, model: LanguageModel, batches: Iterator[Batch], tokenizer: Tokenizer) -> None:
        """The plots, into the folder of the run."""
        alone = self._ranks.plain(model) if self._names else None
        if alone is None:
            return
        from train.instrument_plots import save_plots  # matplotlib is slow to import

        text = tokenizer.decode(next(batches).inputs[0].tolist())
        with uncompiled():
            save_plots(self._folder, alone, tokenizer, text)
