"""What a run makes of its text once: a BPE of bounded size, and tokens that later runs find."""

import pytest
from runs import write_text

from data.corpora import load_corpus
from data.tokenizers import train_bpe
from train import prepare
from train.progress import Display


@pytest.mark.parametrize("every", [1, 3])
def test_a_bpe_is_trained_on_evenly_spread_pieces(tmp_path, monkeypatch, capsys, every):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("data.tokenizers.cut._PIECE_CHARACTERS", 200)
    corpus = load_corpus(str(write_text(tmp_path / "text.txt")))
    monkeypatch.setattr(prepare, "BPE_BYTES", -(-corpus.num_bytes // every))
    with Display() as display:
        made = prepare.prepare_data(str(tmp_path / "text.txt"), "text", "bpe", 400, display)
    texts = list(corpus.train.texts())
    assert len(texts) > 10 * every
    assert made.tokenizer.fingerprint == train_bpe(texts[::every], 400).fingerprint
    assert (made.tokenizer.fingerprint == train_bpe(texts, 400).fingerprint) == (every == 1)
    assert ("one in 3 pieces of text.txt" in capsys.readouterr().err) == (every == 3)
