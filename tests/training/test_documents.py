"""Packed documents: what one says changes no other's loss, whatever the mixer and the form."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_helpers import ALL_MIXERS, FORMS, random_model, small_config

from data.corpora import load_corpus
from data.loader import StretchBatches, validation_batches
from data.packing import pack
from data.tokenizers import byte_tokenizer
from model.presets import parse_mixer
from train.carry import Carry

DOCUMENTS = ["first of all", "the second one is changed", "x", "and the last of them"]
CHANGED = "an intruder: THE CHANGED!"
WRITTEN = byte_tokenizer()
SCORES = ["square_l1", "entmax", "square_l1:constant"]


def packed(tmp_path, second):
    """Token ids of the documents, by way of a table, a corpus and the cache."""
    rows = [*DOCUMENTS[:1], second, *DOCUMENTS[2:]]
    for side, texts in (("train", rows), ("validation", ["for the other side"])):
        lines = "\n".join(json.dumps({"text": text}) for text in texts)
        (tmp_path / f"{side}.jsonl").write_text(lines)
    corpus = load_corpus(f"{tmp_path}/*.jsonl")
    train, _ = pack(corpus, WRITTEN, tmp_path / "cache")
    return np.asarray(train.tokens)


@pytest.fixture
def both(tmp_path):
    """The same documents twice, but for the second; and which document each token is of."""
    texts = [packed(tmp_path, second) for second in (DOCUMENTS[1], CHANGED)]
    assert texts[0].shape == texts[1].shape
    owner = np.repeat(range(len(DOCUMENTS)), [len(text) + 1 for text in DOCUMENTS])
    return texts, owner


def model_of(mixer):
    row, _, words = mixer.partition(":")
    options = {"options": parse_mixer(mixer)[1]} if words else {}
    return random_model(small_config(row, vocab_size=WRITTEN.vocab_size, num_layers=2, **options))


@torch.no_grad()
def losses(model, batch, form):
    logits = model(batch.inputs, form=form, reset=batch.reset).logits
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")


@pytest.mark.parametrize("mixer", [*ALL_MIXERS, *(f"attention:{score}" for score in SCORES)])
def test_a_changed_document_leaves_the_losses_of_the_others_as_they_were(both, mixer):
    texts, owner = both
    model, length = model_of(mixer), texts[0].size - 1
    for form in FORMS:
        windows = (
            validation_batches(text, context=length, batch_size=1, end_id=WRITTEN.end_id)
            for text in texts
        )
        before, after = (losses(model, next(window), form) for window in windows)
        others = torch.from_numpy(owner[1:] != 1)
        error = (before - after)[others].abs().max() / before.max()
        assert error <= 1e-12, f"{form}: {error}"
        assert not torch.equal(before[~others], after[~others])


@pytest.mark.parametrize("mixer", [mixer for mixer in ALL_MIXERS if mixer != "attention"])
def test_nor_does_it_when_the_state_is_carried(both, mixer):
    """The last stretches hold nothing but the last document."""
    texts, owner = both
    model, found, places = model_of(mixer), [], []
    for text in texts:
        batches = StretchBatches(text, context=6, batch_size=1, seed=0, end_id=WRITTEN.end_id)
        carry, values = Carry(model.initial_state(1)), []
        for batch in map(batches.__getitem__, range(batches.steps_per_epoch)):
            values.append(float(carry.loss(model, *batch).detach()))
            carry.keep()
            places.append(_place(text, batch))
        found.append(values)
    clean = [step for step, at in enumerate(places[: len(found[0])]) if owner[at] == 3]
    assert len(clean) >= 2
    for step in clean:
        assert found[0][step] == pytest.approx(found[1][step], rel=1e-12)
    assert found[0] != found[1]


def _place(text, batch):
    window = [*batch.inputs[0].tolist(), int(batch.targets[0, -1])]
    [at] = [i for i in range(text.size) if text[i : i + len(window)].tolist() == window]
    return at
