"""config.json, as any version of transformers writes it, read right or refused by name.

Catches: a model that would be computed wrongly because a field was overlooked, rope fields read from one of the two
places only, an EOS id missed, a traceback for a malformed file.
"""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
from transformers import AutoConfig

from common.config import SHAPES, ModelConfig, RopeScaling
from common.errors import UserError

GOOD = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(folder, raw, generation=None):
    (folder / "config.json").write_text(raw if isinstance(raw, str) else json.dumps(raw))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.from_pretrained(folder)


def test_a_plain_config(tmp_path):
    config = read(tmp_path, GOOD)
    assert config == ModelConfig(300, 64, 96, 2, 4, 2, 16, 1e-5, 10000.0, None, 512, False, 1, (2,))


def test_fields_that_old_checkpoints_leave_out_take_their_defaults(tmp_path):
    raw = {k: v for k, v in GOOD.items() if k not in ("num_key_value_heads", "rms_norm_eps", "architectures")}
    config = read(tmp_path, raw | {"head_dim": None})
    assert (config.num_key_value_heads, config.head_dim, config.rms_norm_eps) == (4, 16, 1e-6)
    assert config.rope_theta == 10000.0 and not config.tie_word_embeddings


def test_head_dim_is_read_where_it_is_given(tmp_path):
    assert read(tmp_path, GOOD | {"head_dim": 40}).head_dim == 40


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, id="transformers 4"),
        pytest.param({"rope_theta": 500000.0, "rope_scaling": {"type": "llama3", **LLAMA3}}, id="early transformers 4"),
        pytest.param(
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}}, id="transformers 5"
        ),
    ],
)
def test_llama3_scaling_in_each_place_it_is_written(tmp_path, fields):
    config = read(tmp_path, GOOD | fields)
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    "rope", [{"rope_theta": 7.5}, {"rope_parameters": {"rope_theta": 7.5, "rope_type": "default"}}]
)
def test_theta_in_each_place_it_is_written(tmp_path, rope):
    config = read(tmp_path, GOOD | rope)
    assert config.rope_theta == 7.5 and config.rope_scaling is None


def test_a_scaling_beside_rope_parameters_counts_as_in_transformers(tmp_path):
    """One that somebody adds to a config.json that transformers 5 wrote must not be passed over."""
    raw = GOOD | {"rope_theta": 7.5, "rope_parameters": {"rope_type": "default", "rope_theta": 7.5}}
    config = read(tmp_path, raw | {"rope_scaling": {"rope_type": "llama3", **LLAMA3}})
    hf = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert hf["rope_type"] == "llama3" and config.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
    assert config.rope_theta == hf["rope_theta"] == 7.5
    with pytest.raises(UserError, match="linear"):
        read(tmp_path, raw | {"rope_scaling": {"type": "linear", "factor": 2.0}})


@pytest.mark.parametrize("name", SHAPES)
def test_what_we_write_is_read_alike_by_us_and_by_transformers(name, tmp_path):
    scaled = dataclasses.replace(SHAPES[name], rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192), head_dim=48)
    for i, config in enumerate((SHAPES[name], scaled)):
        folder = tmp_path / str(i)
        folder.mkdir()
        assert read(folder, config.to_hf_dict()) == config
        hf = AutoConfig.from_pretrained(folder)
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                      "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"):  # fmt: skip
            assert getattr(hf, field) == getattr(config, field), field
        assert hf.rope_parameters["rope_theta"] == config.rope_theta
        assert hf.rope_parameters["rope_type"] == ("llama3" if config.rope_scaling else "default")


def test_parameters_are_counted_as_transformers_counts_them(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    for tied in (False, True):
        config = dataclasses.replace(SHAPES["tiny"], head_dim=24, tie_word_embeddings=tied)
        hf = LlamaForCausalLM(LlamaConfig.from_dict(config.to_hf_dict()))
        assert config.num_parameters == sum(p.numel() for p in hf.parameters())
        assert config.kv_bytes_per_token(2) == 2 * 2 * 2 * 24 * 2  # K and V, layers, KV heads, head_dim, bytes


def test_all_eos_ids_of_generation_config_stop(tmp_path):
    assert read(tmp_path, GOOD, {"eos_token_id": [7, 8, 9]}).eos_token_ids == (7, 8, 9)
    assert read(tmp_path, GOOD, {"temperature": 1.0}).eos_token_ids == (2,)
    assert read(tmp_path, GOOD | {"eos_token_id": [4, 5]}, {}).eos_token_ids == (4, 5)
    assert read(tmp_path, GOOD | {"eos_token_id": None}, {}).eos_token_ids == ()


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": [], "model_type": "qwen3"}, "qwen3"),
        ({"model_type": "mistral"}, "mistral"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"num_experts": 8}, "num_experts"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"type": "longrope"}}, "longrope"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(tmp_path, fields, named):
    with pytest.raises(UserError, match=named) as caught:
        read(tmp_path, GOOD | fields)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                   "num_attention_heads"])  # fmt: skip
def test_a_missing_field_is_named(tmp_path, field):
    with pytest.raises(UserError, match=field):
        read(tmp_path, {k: v for k, v in GOOD.items() if k != field})


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"a": ', "\x00\x01", "not json"])
def test_a_malformed_file_is_named(tmp_path, text):
    with pytest.raises(UserError, match="config.json"):
        read(tmp_path, text)


def test_a_malformed_generation_config_is_named(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match="generation_config.json"):
        read(tmp_path, GOOD)


BAD_VALUES = ["seven", "", -1, 0, 2.5, True, [], [3], {}, {"a": 1}, None, float("nan"), 1e400]


@pytest.mark.parametrize("field", [*GOOD, "head_dim", "rope_theta", "rope_scaling", "rope_parameters"])
def test_any_value_in_any_field_is_read_or_refused_in_one_line(tmp_path, field):
    """Random damage: never anything but a config or a UserError that says where."""
    for value in BAD_VALUES:
        try:
            config = read(tmp_path, GOOD | {field: value})
        except UserError as error:
            assert "config" in str(error) and "\n" not in str(error)
        else:
            assert config.head_dim % 2 == 0 and config.num_attention_heads % config.num_key_value_heads == 0
            assert all(isinstance(i, int) for i in config.eos_token_ids)


def test_numbers_that_do_not_fit_together_are_refused():
    rng = random.Random(0)
    for _ in range(300):
        sizes = [rng.choice([0, 1, 2, 3, 4, 6, 7, 8]) for _ in range(3)]
        try:
            config = ModelConfig(10, 10, 10, 1, *sizes)
        except UserError:
            heads, kv_heads, head_dim = sizes
            assert 0 in sizes or heads % kv_heads or head_dim % 2
        else:
            assert config.num_attention_heads % config.num_key_value_heads == 0 and config.head_dim % 2 == 0
