"""`ebb convert --weights`: the folder of a run, made small to be passed on."""

import shlex
import shutil
from functools import partial
from pathlib import Path

from train import checkpoint as files
from train.card import card
from train.compact import shrink
from train.metrics import read_metrics
from train.readable import readable_bytes
from train.weights_file import SUFFIXES


def shrink_run(source: Path, target: Path, *, to: str) -> str:
    """Makes a folder to pass on from that of a run; returns what to say.

    Raises:
        ValueError: if the run cannot be read, or the folder not be written.
    """
    if target.suffix in SUFFIXES:
        raise ValueError(f"{target} is the name of a file, and --weights makes a folder.")
    config = files.read_config(source)
    model_config = files.model_config(source, config)
    weights = files.read_weights(source, model_config)
    tokenizer = files.read_tokenizer(source, config, model_config.vocab_size)
    lines = read_metrics(source / files.METRICS) if (source / files.METRICS).exists() else []
    page = card(target.name, config, lines, sum(x.numel() for x in weights.values()), to)
    with files.new_folder(target):
        files.save_weights(target / files.WEIGHTS, shrink(weights, to))
        files.write_atomically(target / files.TOKENIZER, tokenizer.save)
        if lines:
            copy = partial(shutil.copyfile, source / files.METRICS)
            files.write_atomically(target / files.METRICS, copy)
        files.write_atomically(target / files.CARD, lambda beside: files.write_text(beside, page))
        files.save_json(target / files.CONFIG, config)
    size = (target / files.WEIGHTS).stat().st_size
    return (
        f"{target}: {readable_bytes(size)} of weights in {to}. Measure what that costs: ebb eval "
        f"{shlex.quote(str(target))}; then complete {files.CARD}.\n"
    )
