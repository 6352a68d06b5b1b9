"""Equal parameters for all mixers, and what the settings of a comparison mean."""

import pytest

from model.language_model import LanguageModel
from model.layers import MIXERS
from model.presets import preset
from train.compare import matched_shapes
from train.compare_config import CompareConfig
from train.matching import matched, num_parameters
from train.settings import parse_count


@pytest.mark.parametrize("size", ["nano", "micro"])
@pytest.mark.parametrize("first", sorted(MIXERS))
def test_parameters_match_within_a_hundredth(size, first):
    names = ",".join([first, *(set(MIXERS) - {first})])
    shapes = matched_shapes(CompareConfig(mixers=names, size=size), 2048)
    target = num_parameters(preset(size, first, 2048))
    for name, shape in shapes.items():
        assert shape.mixer == name
        assert abs(num_parameters(shape) / target - 1) < 0.01, name


def test_count_is_that_of_a_real_model():
    config = preset("nano", "rwkv7", 300)
    assert num_parameters(config) == sum(p.numel() for p in LanguageModel(config).parameters())


def test_model_that_is_too_large_to_match_is_refused():
    with pytest.raises(ValueError, match="without its channel mix, more than the 100,000 that"):
        matched(preset("nano", "rwkv7", 300), 100_000)


@pytest.mark.parametrize(
    ("text", "count"), [("128", 128), ("4k", 4096), ("2M", 2**21), (" 1K ", 1024)]
)
def test_counts_of_tokens(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "k", "0", "-1", "1.5k", "4kk", "four", "²"])
def test_what_is_no_count_is_refused(text):
    with pytest.raises(ValueError, match="contexts must be numbers such as 128 or 4k, but one is"):
        parse_count(text)


def test_contexts_rise_and_come_once():
    assert CompareConfig(contexts="1k,32,1024, 8").lengths == [8, 32, 1024]
