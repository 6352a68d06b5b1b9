"""The page beside a checkpoint that is passed on: what it is, and how well it does."""

from collections.abc import Mapping, Sequence
from typing import Any

from train.checkpoint import IMPORTED
from train.readable import readable_count

_BITS = {"bf16": "bfloat16", "int8": "8 bits, with a scale for each 32 weights"}


def card(
    name: str,
    config: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    num_parameters: int,
    weights: str,
) -> str:
    """A model card in Markdown, from what the folder of a run holds; the rest is for its owner.

    Args:
        name: of the folder.
        config: its `config.json`.
        metrics: the lines of its `metrics.jsonl`.
        num_parameters: of the model.
        weights: the format of the matrices, of `train.compact.FORMATS`.
    """
    model, train = config["model"], config["train"]
    rows = {
        "model": f"`{model['mixer']}`, {model['num_layers']} layers, width {model['d_model']}, "
        f"{readable_count(num_parameters)} parameters, {model['vocab_size']:,} tokens",
        "weights": f"matrices in {_BITS[weights]}; vectors as they were",
    }
    if IMPORTED in train:
        rows["from"] = f"an official checkpoint, {train[IMPORTED]}"
    else:
        rows |= _training(train, config.get("data", {}), metrics)
    table = "\n".join(f"| {row} | {value} |" for row, value in rows.items())
    return (
        f"# {name}\n\n"
        "A language model made with Ebb. Write with it: "
        f"`ebb generate {name} --prompt 'The'`.\n\n"
        f"| | |\n| --- | --- |\n{table}\n\n"
        "## Limits\n\n"
        "It goes on with a text as the text that it has read would, and knows nothing else: it "
        "answers no questions, and what it says need not be true.\n"
    )


def _training(
    train: Mapping[str, Any], data: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """Rows on the text, on how it was learned, and on the last validation."""
    steps = metrics[-1]["step"] if metrics else train["steps"]
    tokens = readable_count(steps * train["batch_size"] * train["context"])
    recipe = f"recipe `{train['recipe']}`" if train["recipe"] else f"`{train['optimizer']}`"
    rows = {
        "text": f"{data.get('name', train['data'])}",
        "training": f"{recipe}: {steps:,} steps of {train['batch_size']} x {train['context']} "
        f"tokens, {tokens} in all, seed {train['seed']}",
    }
    validations = [line for line in metrics if "validation_loss" in line]
    if validations:
        last = validations[-1]
        rows["validation"] = (
            f"{last['validation_loss']:.4f} nats a token, {last['validation_bits_per_byte']:.4f} "
            f"bits a byte, in windows of {train['context']} tokens, before the weights were rounded"
        )
    return rows
