"""Data sets of the hub by name: from a cache that local builders have filled, and offline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

ROWS = [f"document {i}: \u00e9 {'x' * (i % 7)}" for i in range(60)]
SIDES = {"train": ROWS[:40], "validation": ROWS[40:50], "test": ROWS[50:]}
SCRIPT = """
import json, sys
from data.corpora import load_corpus
for line in sys.stdin:
    try:
        corpus = load_corpus(**json.loads(line))
        found = {"train": list(corpus.train), "validation": list(corpus.validation)}
        found |= {"name": corpus.name, "fingerprint": corpus.fingerprint}
    except ValueError as error:
        found = {"error": str(error)}
    print(json.dumps(found), flush=True)
"""


class Local(datasets.GeneratorBasedBuilder):
    """Two configurations with three splits, as a data set of the hub has them."""

    BUILDER_CONFIGS = [datasets.BuilderConfig("plain"), datasets.BuilderConfig("loud")]  # noqa: RUF012

    def _info(self):
        features = {"text": datasets.Value("string"), "size": datasets.Value("int64")}
        return datasets.DatasetInfo(features=datasets.Features(features))

    def _split_generators(self, dl_manager):
        return [
            datasets.SplitGenerator(name=side, gen_kwargs={"rows": rows})
            for side, rows in SIDES.items()
        ]

    def _generate_examples(self, rows):
        for number, row in enumerate(rows):
            text = row.upper() if self.config.name == "loud" else row
            yield number, {"text": text, "size": len(text)}


class Offline:
    """A process without the hub, whose cache holds `org/name`; asked line by line."""

    def __init__(self, folder: Path) -> None:
        self.environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)}
        for config in ("plain", "loud"):
            Local(
                cache_dir=str(folder / "datasets"),
                dataset_name="name",
                repo_id="org/name",
                config_name=config,
                hash="0123",
            ).download_and_prepare()
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**self.environment, "PYTHONPATH": str(Path(__file__).parents[2])},
            cwd=folder,
            text=True,
        )

    def __call__(self, source: str, **options: object) -> dict:
        self.process.stdin.write(json.dumps({"source": source, **options}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    offline = Offline(tmp_path_factory.mktemp("hub"))
    yield offline
    offline.process.communicate(timeout=60)
    assert offline.process.returncode == 0


def test_configuration_and_splits_of_its_own(load):
    plain, loud = load("org/name:plain"), load("org/name:loud")
    assert plain["train"] == SIDES["train"]
    assert plain["validation"] == SIDES["validation"]
    assert plain["name"] == "org/name:plain"
    assert loud["train"] == [row.upper() for row in SIDES["train"]]
    assert loud["fingerprint"] != plain["fingerprint"]


def test_one_split_is_divided(load):
    found = load("org/name:loud:test")
    assert len(found["validation"]) == 1
    assert sorted(found["train"] + found["validation"]) == [row.upper() for row in SIDES["test"]]
    part = load("org/name:plain:train", validation_fraction=0.5)
    assert len(part["validation"]) == 20


def test_streaming_takes_the_first_documents(load):
    found = load("org/name:plain", stream=7)
    assert found["train"] == SIDES["train"][:7]
    assert found["validation"] == SIDES["validation"][:7]
    split = load("org/name:plain:test", stream=5)
    assert sorted(split["train"] + split["validation"]) == SIDES["test"][:5]
    all_of_it, whole = load("org/name:loud", stream=1000), load("org/name:loud")
    assert all_of_it["fingerprint"] == whole["fingerprint"]
    assert load("org/name:plain", stream=7) == found


def test_what_is_not_there_gives_one_sentence(load):
    for source, options, said in (
        ("org/name:plain", {"column": "body"}, "no column 'body' in 'org/name:plain': choose one"),
        ("org/name:plain", {"column": "body", "stream": 5}, "no column 'body' in 'org/name:plain'"),
        ("org/name:plain", {"column": "size"}, "holds int values, not text"),
        ("org/name:plain", {"column": "size", "stream": 5}, "holds int values, not text"),
        ("org/name:quiet", {}, "could not be loaded from the Hugging Face hub"),
        ("org/name:plain:gone", {}, "could not be loaded from the Hugging Face hub"),
        ("org/name:plain:gone", {"stream": 5}, "could not be loaded from the Hugging Face hub"),
        ("org/other", {}, "'org/other' is no file or folder here"),
        ("org/other:config", {}, "could not be loaded from the Hugging Face hub"),
        ("org/other::split", {}, "could not be loaded from the Hugging Face hub"),
        ("org/other", {"stream": 5}, "could not be loaded from the Hugging Face hub"),
        ("org/name:plain", {"stream": 0}, "documents to stream is 0: choose one above 0"),
        ("sotu", {"stream": 5}, "nothing to stream from 'sotu'"),
    ):
        error = load(source, **options)["error"]
        assert said in error
        assert "\n" not in error
        assert error.endswith(".")
