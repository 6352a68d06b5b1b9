"""What the tests of generation share: settings, generators, and a model that says one thing."""

from collections.abc import Sequence
from pathlib import Path

import torch
from model_helpers import random_model, small_config

from data.tokenizers import Tokenizer
from model.language_model import LanguageModel
from model.sampling import Sampling
from train import checkpoint

GREEDY = Sampling(temperature=0)
BOLD = Sampling(1.3, 1.1, top_k=20, top_p=0.95, min_p=0.01)
SCRIPT = "é漢🙂nave"  # no byte comes twice


def seeds(*numbers: int) -> list[torch.Generator]:
    """One generator a number."""
    return [torch.Generator().manual_seed(number) for number in numbers]


def write_run(folder: Path, model: LanguageModel, tokenizer: Tokenizer) -> Path:
    """A folder that `ebb` reads as a run."""
    folder.mkdir()
    model = model.float()
    checkpoint.save_json(folder / checkpoint.CONFIG, {"model": model.config.to_dict(), "train": {}})
    checkpoint.save_weights(folder / checkpoint.WEIGHTS, model.state_dict())
    tokenizer.save(folder / checkpoint.TOKENIZER)
    return folder


def parrot(tokenizer: Tokenizer, ids: Sequence[int]) -> LanguageModel:
    """A model that says the ids in a circle, and begins it after any other token.

    Its blocks give nothing, so that the features tell the last token, and the head knows the next.
    """
    following = [ids[0]] * tokenizer.vocab_size
    for token, after in zip(ids, [*ids[1:], ids[0]], strict=True):
        following[token] = after
    assert len(set(ids)) == len(ids), "a token comes twice"
    config = small_config("rwkv7", vocab_size=tokenizer.vocab_size, d_model=320, num_layers=1)
    model = random_model(config)
    with torch.no_grad():
        model.blocks[0].time_mix.output.weight.zero_()
        model.blocks[0].channel_mix.value.weight.zero_()
        features, _ = model.features(torch.arange(tokenizer.vocab_size)[:, None])
        logits = 60 * torch.nn.functional.one_hot(torch.tensor(following), tokenizer.vocab_size)
        model.head.weight.copy_(torch.linalg.lstsq(features[:, 0], logits.double()).solution.T)
    return model
