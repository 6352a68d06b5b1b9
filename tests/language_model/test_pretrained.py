"""Official RWKV weights <-> ours: every bit there and back, and what is wrong is named."""

import pytest
import torch
from model_helpers import random_model, small_config
from official import TITLES, bits, official_shapes, official_weights, same_tensors

from model.language_model import LanguageModel
from model.layers.rwkv7 import default_rank
from model.presets import from_dict
from model.pretrained import find_version, from_official, to_official
from model.pretrained.tables import VERSIONS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "rwkv4": {},
    "rwkv5": {"group_norm_eps": 64e-5},
    "rwkv6": {"group_norm_eps": 64e-5, "shift_rank": 5, "decay_rank": 3},
    "rwkv7": {
        "group_norm_eps": 64e-5,
        "decay_rank": 5,
        "iclr_rank": 3,
        "value_rank": 6,
        "gate_rank": 7,
        "first_value_residual": True,
    },
}


def test_every_version_is_here():
    assert {name: version.title for name, version in VERSIONS.items()} == TITLES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("version", TITLES)
def test_there_and_back_keeps_every_bit(version, dtype):
    official = official_weights(version, dtype)
    for index, tensor in enumerate(official.values()):  # no value is special
        tensor.view(-1)[index % tensor.numel()] = (torch.nan, -torch.inf, -0.0)[index % 3]
    before = {name: bits(tensor) for name, tensor in official.items()}
    config, own = from_official(official)
    assert all(tensor.dtype == dtype for tensor in own.values())
    assert same_tensors(to_official(config, own), official)
    assert {name: bits(tensor) for name, tensor in official.items()} == before


@pytest.mark.parametrize("version", TITLES)
def test_the_configuration_follows_from_the_shapes(version):
    config, own = from_official(official_weights(version))
    assert config.to_dict() == {
        "mixer": version,
        "vocab_size": 31,
        "d_model": 24,
        "num_layers": 3,
        "head_dim": 8,
        "ffn_dim": 56,
        "options": OPTIONS[version],
    }
    assert from_dict(config.to_dict()) == config
    model = LanguageModel(config)
    model.load_state_dict(own, strict=True)
    assert torch.isfinite(model(torch.arange(31)[None]).logits).all()


@pytest.mark.parametrize("version", TITLES)
@pytest.mark.parametrize(("layers", "width", "head"), [(1, 8, 8), (2, 192, 64), (13, 12, 4)])
def test_other_shapes(version, layers, width, head):
    official = official_weights(version, layers=layers, width=width, head=head, ffn=5, vocab=2)
    config, own = from_official(official)
    assert (config.num_layers, config.d_model, config.ffn_dim) == (layers, width, 5)
    assert config.head_dim == (min(width & -width, 64) if version == "rwkv4" else head)
    assert same_tensors(to_official(config, own), official)
    LanguageModel(config).load_state_dict(own, strict=True)


def test_a_first_layer_without_what_nothing_uses():
    official = official_weights("rwkv7", first_value_residual=False)
    config, own = from_official(official)
    assert not config.options.first_value_residual
    assert same_tensors(to_official(config, own), official)
    config, own = from_official(official_weights("rwkv7", layers=1, first_value_residual=False))
    assert config.options.value_rank is None


@pytest.mark.parametrize("layers", [1, 3])
def test_a_model_of_ours_has_all_that_the_official_trainer_insists_on(layers):
    """Also the first layer's value residual, which ours does not have: zeros."""
    model = random_model(small_config("rwkv7", num_layers=layers), dtype=torch.bfloat16)
    official = to_official(model.config, model.state_dict(), complete_first=True)
    expected = official_shapes("rwkv7", layers=layers, width=32, head=8, ffn=128, vocab=29)
    assert official.keys() == expected.keys()
    rank = default_rank(1.7, 32)
    for name, shape in (("v0", (1, 1, 32)), ("v1", (32, rank)), ("v2", (rank, 32))):
        zeros = official[f"blocks.0.att.{name}"]
        assert (zeros.shape, zeros.dtype) == (shape, torch.bfloat16)
        assert not zeros.any()
    config, _ = from_official(official)
    assert config.options.first_value_residual
    assert not any(
        name.startswith("blocks.0.att.v") and name[-1] in "012"
        for name in to_official(model.config, model.state_dict())
    )


@pytest.mark.parametrize("version", TITLES)
def test_whatever_is_missing_is_named(version):
    official = official_weights(version)
    for name in official:
        rest = {other: tensor for other, tensor in official.items() if other != name}
        with pytest.raises(ValueError, match=f"a whole {TITLES[version]} model: {name} is missing"):
            from_official(rest)


@pytest.mark.parametrize("version", TITLES)
def test_whatever_is_too_much_is_named(version):
    for name in ("blocks.1.att.time_state", "blocks.1.ffn.s1", "head_q.weight", "blocks.x.y"):
        official = official_weights(version) | {name: torch.zeros(2)}
        with pytest.raises(ValueError, match=f"{name} is not part of this version"):
            from_official(official)


@pytest.mark.parametrize("version", TITLES)
def test_whatever_has_another_shape_is_named(version):
    official = official_weights(version)
    for name, tensor in official.items():
        for wrong in (tensor[..., :-1], tensor[None], tensor.new_zeros(0)):
            with pytest.raises(ValueError, match=f"{TITLES[version]}: {name} is .*, not "):
                from_official(official | {name: wrong})


def test_many_names_are_counted():
    official = {
        name: tensor for name, tensor in official_weights("rwkv6").items() if ".ffn." not in name
    }
    with pytest.raises(ValueError, match=r"blocks\.0\.ffn\.key\.weight, .* and 9 more are missing"):
        from_official(official)
    official = official_weights("rwkv6")
    del official["blocks.1.ln1.bias"]
    official["blocks.1.ln3.bias"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"ln1\.bias is missing; blocks\.1\.ln3\.bias is not part"):
        from_official(official)


def test_a_layer_that_is_left_out_is_named():
    official = official_weights("rwkv5")
    kept = {name: x for name, x in official.items() if not name.startswith("blocks.1.")}
    with pytest.raises(ValueError, match=r"blocks\.1\.ln1\.weight, .* are missing; blocks\.2\."):
        from_official(kept)
    kept["blocks.99999999999.ln1.weight"] = torch.zeros(24)
    with pytest.raises(ValueError, match=r"blocks\.99999999999\.ln1\.weight"):
        from_official(kept)


def test_early_forms_are_refused_by_name():
    official = official_weights("rwkv5")
    heads = {n: x[:, :1] if "time_decay" in n else x for n, x in official.items()}
    with pytest.raises(ValueError, match=r"this is RWKV-5\.1 \(one decay a head\)"):
        from_official(heads)
    vectors = {n: x[:, 0] if "time_decay" in n else x for n, x in official.items()}
    with pytest.raises(ValueError, match=r"this is RWKV-5\.1 \(one decay a head\)"):
        from_official(vectors)
    without = {n: x for n, x in vectors.items() if "gate" not in n and "mix_g" not in n}
    with pytest.raises(ValueError, match=r"this is RWKV-5\.0 .*no gate.* of RWKV-4, 5\.2, 6 or 7"):
        from_official(without)


def test_what_is_not_rwkv_is_told():
    llama = {"model.embed_tokens.weight": torch.zeros(3, 4), "blocks.0.att.x": torch.zeros(1)}
    for weights in ({}, llama, {"blocks.": torch.zeros(1)}, {"blocks": torch.zeros(1)}):
        with pytest.raises(ValueError, match="not the weights of an RWKV model"):
            from_official(weights)
    assert find_version({"blocks.7.att.k_k": torch.zeros(1)}) == "rwkv7"


def test_numbers_that_are_no_weights():
    official = official_weights("rwkv4")
    for wrong in (torch.zeros(24, 24, dtype=torch.int8), torch.eye(24).to_sparse()):
        with pytest.raises(ValueError, match=r"blocks\.2\.att\.key\.weight holds .*: give weights"):
            from_official(official | {"blocks.2.att.key.weight": wrong})


def test_dtypes_may_differ_but_not_within_one_tensor_of_ours():
    official = official_weights("rwkv5", torch.bfloat16)
    for name in official:
        if "time_decay" in name or "time_faaaa" in name:
            official[name] = official[name].float()
    config, own = from_official(official)
    assert same_tensors(to_official(config, own), official)
    official["blocks.1.att.time_mix_v"] = official["blocks.1.att.time_mix_v"].float()
    with pytest.raises(ValueError, match=r"bfloat16 and float32 are mixed in blocks\.1\.att\.time"):
        from_official(official)


def test_the_eps_that_no_file_holds():
    for version in ("rwkv5", "rwkv6", "rwkv7"):
        config, _ = from_official(official_weights(version), group_norm_eps=1e-5)
        assert config.options.group_norm_eps == 1e-5
    with pytest.raises(ValueError, match="RWKV-4 has no norm over heads: leave group-norm-eps out"):
        from_official(official_weights("rwkv4"), group_norm_eps=1e-5)


def test_another_mixer_has_no_official_form():
    model = random_model(small_config("retnet"))
    with pytest.raises(ValueError, match=r"retnet has no official form; RWKV-4, .* have one"):
        to_official(model.config, model.state_dict())


def test_what_is_not_stacked_is_not_copied():
    official = official_weights("rwkv7")
    _, own = from_official(official)
    theirs = {tensor.data_ptr() for tensor in official.values()}
    assert {n.split(".")[-1] for n, x in own.items() if x.data_ptr() not in theirs} == {"mix"}
