"""`ebb convert`: official RWKV checkpoints into the folder of a run and back; runs made small."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
from torch import Tensor

from data.tokenizers import Tokenizer, load_tokenizer
from model.config import ModelConfig
from model.pretrained import find_version, from_official, to_official
from model.pretrained.tables import VERSIONS
from train import checkpoint as files
from train.compact import FORMATS
from train.readable import listed
from train.settings import one_of
from train.shrink_run import shrink_run
from train.weights_file import SAFETENSORS, SUFFIXES, read_weights, write_weights


@dataclass(frozen=True)
class ConvertConfig:
    """Import an official RWKV checkpoint, or export a run, as one or as a small folder.

    From a file (.pth, .pt, .bin or .safetensors) of RWKV-4, 5.2, 6 or 7 to the folder of a run,
    which generate, eval and info read like any other; the version is found from the names in it.
    From the folder of a run to a file (.pth or .safetensors) in the official naming. Every weight
    keeps its bits, both ways. With --weights, from the folder of a run to one to pass on, which is
    read like any: small weights, tokenizer, settings, metrics and a page that says what it is.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """An official checkpoint, or the folder of a run."""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The folder to make, or the file to write; it must not exist."""
    tokenizer: str | None = None
    """Of the imported model, as in `ebb train`; without one the folder can be looked at, but
    neither write nor be evaluated until a tokenizer.json is put into it."""
    weights: str | None = None
    """Make a folder to pass on, with matrices in this format: bf16, or int8 (8.5 bits a weight)."""
    group_norm_eps: float | None = None
    """Of the norm over the heads, which is in no checkpoint; the official code's 64e-5 if not
    given."""

    def __post_init__(self) -> None:
        """Refuses what cannot be done.

        Raises:
            ValueError: naming the setting.
        """
        if self.weights is not None:
            one_of("format of weights to pass on", self.weights, FORMATS)
        eps = self.group_norm_eps
        if eps is not None and not 0 < eps < float("inf"):
            raise ValueError(f"group-norm-eps must be above 0, but is {eps}")


def convert(config: ConvertConfig) -> None:
    """Runs `ebb convert`.

    Raises:
        ValueError: for a source that cannot be converted, or a target that is there already.
    """
    source, target = config.source, config.target
    if not source.exists():
        raise ValueError(f"There is no {source}: name a checkpoint, or the folder of a run.")
    if target.exists() and not (target.is_dir() and source.is_file() and _is_empty(target)):
        raise ValueError(f"{target} is there already: remove it, or choose another place.")
    if source.is_dir():
        for name in ("tokenizer", "group_norm_eps"):
            if getattr(config, name) is not None:
                raise ValueError(
                    f"{name.replace('_', '-')} is for an official checkpoint that comes in: leave "
                    "it out"
                )
        export = export_run if config.weights is None else partial(shrink_run, to=config.weights)
        sys.stdout.write(export(source, target))
    elif config.weights is not None:
        raise ValueError("weights are made small from the folder of a run: convert into one first")
    else:
        sys.stdout.write(import_checkpoint(config))


def import_checkpoint(config: ConvertConfig) -> str:
    """Makes the folder of a run from an official checkpoint; returns what to say.

    Raises:
        ValueError: if the file cannot be read, is not RWKV, or does not fit the tokenizer.
    """
    source, target = config.source, config.target
    if target.suffix in SUFFIXES:
        raise ValueError(
            f"{target} is the name of a file: a checkpoint is imported into a folder, and exported "
            "from one."
        )
    official = read_weights(source)
    try:
        title = VERSIONS[find_version(official)].title
        model_config, weights = from_official(official, group_norm_eps=config.group_norm_eps)
    except ValueError as error:
        raise ValueError(f"{source} cannot be imported: {error}.") from error
    del official
    tokenizer = _tokenizer(config.tokenizer, model_config)
    with files.new_folder(target):
        write_weights(target / files.WEIGHTS, weights)
        if tokenizer is not None:
            files.write_atomically(target / files.TOKENIZER, tokenizer.save)
        files.save_json(  # the last: without it the folder is no run
            target / files.CONFIG,
            {
                "model": model_config.to_dict(),
                "train": {files.IMPORTED: title, "file": source.name},
            },
        )
    said = f"{target}: {title}, {_described(model_config, weights)}\n"
    if tokenizer is None:
        return said + f"It has no tokenizer yet: {files.HOW_TO_ADD_A_TOKENIZER}.\n"
    return said


def export_run(source: Path, target: Path) -> str:
    """Writes a run as an official checkpoint; returns what to say.

    Raises:
        ValueError: if the run cannot be read or has no official form, or the file not be written.
    """
    if target.suffix not in (".pth", SAFETENSORS):
        raise ValueError(
            f"{target} must end in .pth or {SAFETENSORS}: a run becomes a file, or with --weights "
            "a folder."
        )
    if not target.absolute().parent.is_dir():
        raise ValueError(f"There is no folder {target.parent} to write {target.name} in.")
    config = files.read_config(source)
    model_config = files.model_config(source, config)
    if model_config.mixer not in VERSIONS:
        known = listed([version.title for version in VERSIONS.values()])
        raise ValueError(
            f"{source} holds a {model_config.mixer} model, which has no official form; "
            f"{known} have one."
        )
    weights = files.read_weights(source, model_config)
    imported = files.IMPORTED in config["train"]
    official = to_official(model_config, weights, complete_first=not imported)
    write_weights(target, official)
    title = VERSIONS[model_config.mixer].title
    return f"{target}: {title}, {_described(model_config, official)}\n"


def _tokenizer(spec: str | None, config: ModelConfig) -> Tokenizer | None:
    """The tokenizer to put beside the weights; the model may have more tokens than it, not fewer.

    Raises:
        ValueError: if it cannot be read, or does not fit.
    """
    if spec is None:
        return None
    tokenizer = load_tokenizer(spec)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"The tokenizer {spec} has {tokenizer.vocab_size} tokens, but the model only "
            f"{config.vocab_size}: give the one that it was trained with."
        )
    return tokenizer


def _is_empty(folder: Path) -> bool:
    return all(file.name == ".lock" for file in folder.iterdir())


def _described(config: ModelConfig, weights: Mapping[str, Tensor]) -> str:
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()})
    count = sum(tensor.numel() for tensor in weights.values())
    return (
        f"{config.num_layers} layers, width {config.d_model}, {config.vocab_size:,} tokens, "
        f"{count:,} parameters in {listed(dtypes)}"
    )
