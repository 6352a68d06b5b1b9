"""Runs to generate with, and what is printed then."""

import pytest
from generation_helpers import SCRIPT, parrot, write_run
from model_helpers import random_model, small_config

from data.tokenizers import byte_tokenizer
from train.generate import GenerateConfig, generate


@pytest.fixture(scope="session")
def random_run(tmp_path_factory):
    """A random model of bytes: what it says is mostly not even UTF-8."""
    config = small_config("rwkv7", vocab_size=257)
    folder = tmp_path_factory.mktemp("runs") / "random"
    return write_run(folder, random_model(config), byte_tokenizer())


@pytest.fixture(scope="session")
def parrot_run(tmp_path_factory):
    tokenizer = byte_tokenizer()
    model = parrot(tokenizer, list(SCRIPT.encode()))
    return write_run(tmp_path_factory.mktemp("runs") / "parrot", model, tokenizer)


@pytest.fixture
def text_of(capsys):
    """What `ebb generate` prints for these settings."""

    def text_of(folder, prompt="", **settings):
        capsys.readouterr()
        generate(GenerateConfig(folder, prompt=prompt, **settings))
        return capsys.readouterr().out

    return text_of
