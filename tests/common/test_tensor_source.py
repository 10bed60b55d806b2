"""Where tensors come from: safetensors shards and the random generator.

Catches: a tensor left out, taken twice or of another shape without a word, an index that leads out of its folder, a
slice that is not the slice of the whole, random weights that change with the rank, the dtype or the order of reading.
"""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
import torch
from safetensors.torch import save_file

from common.config import SHAPES
from common.errors import UserError
from common.tensor_source import WHOLE, RandomSource, SafetensorsSource, expected_shapes

CONFIG = dataclasses.replace(SHAPES["tiny"], vocab_size=300, tie_word_embeddings=False)
CPU = torch.device("cpu")


def tensors_of(config=CONFIG, dtype=torch.float32, seed=0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in expected_shapes(config).items()}


def write_shards(folder, tensors, count, seed=0):
    """Tensors dealt at random into `count` files, with their index."""
    rng, parts = random.Random(seed), [{} for _ in range(count)]
    for name, tensor in tensors.items():
        parts[rng.randrange(count)][name] = tensor
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file, part in zip(names, parts):
        save_file(part, folder / file)
    weight_map = {name: file for file, part in zip(names, parts) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return names


def test_expected_shapes_are_transformers(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    for tied in (True, False):
        config = dataclasses.replace(CONFIG, head_dim=20, tie_word_embeddings=tied)
        LlamaForCausalLM(LlamaConfig.from_dict(config.to_hf_dict())).save_pretrained(tmp_path / str(tied))
        source = SafetensorsSource(tmp_path / str(tied), config)
        assert {name: source.shape(name) for name in source.names()} == expected_shapes(config)


@pytest.mark.parametrize("shards", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reads_what_was_written_whole_and_in_slices(tmp_path, shards, dtype):
    tensors = tensors_of(dtype=dtype)
    if shards == 1:
        save_file(tensors, tmp_path / "model.safetensors")
    else:
        write_shards(tmp_path, tensors, shards)
    source, rng = SafetensorsSource(tmp_path, CONFIG), random.Random(shards)
    read_bytes = 0
    for name, tensor in tensors.items():
        assert torch.equal(source.read(name, WHOLE, WHOLE), tensor)
        rows, columns = (sorted(rng.sample(range(n + 1), 2)) for n in (tensor.shape[0], tensor.shape[-1]))
        part = source.read(name, slice(*rows), slice(*columns))
        assert torch.equal(part, tensor[slice(*rows)] if tensor.ndim == 1 else tensor[slice(*rows), slice(*columns)])
        read_bytes += tensor.nbytes + part.nbytes
    assert source.bytes_read == read_bytes


@pytest.mark.parametrize("sharded", [False, True])
def test_every_tensor_is_accounted_for(tmp_path, sharded):
    for i, name in enumerate(expected_shapes(CONFIG)):
        folder = tmp_path / str(i)
        folder.mkdir()
        tensors = tensors_of()
        del tensors[name]
        if sharded:
            write_shards(folder, tensors, 3)
        else:
            save_file(tensors, folder / "model.safetensors")
        with pytest.raises(UserError, match=f"{name.replace('.', '[.]')} is missing"):
            SafetensorsSource(folder, CONFIG)


@pytest.mark.parametrize(
    "extra", ["model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight", "lora.weight"]
)
def test_an_unexpected_tensor_is_named(tmp_path, extra):
    save_file(tensors_of() | {extra: torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"unexpected tensor {extra}"):
        SafetensorsSource(tmp_path, CONFIG)


def test_tables_and_the_head_of_a_tied_model_are_let_pass(tmp_path):
    tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8), "lm_head.weight": torch.zeros(300, 64)}
    save_file(tensors_of(tied) | extra, tmp_path / "model.safetensors")
    SafetensorsSource(tmp_path, tied)
    with pytest.raises(UserError, match=r"lm_head.weight is missing"):
        save_file(tensors_of(tied), tmp_path / "model.safetensors")
        SafetensorsSource(tmp_path, CONFIG)


@pytest.mark.parametrize("wrong", [(65, 64), (64, 63), (64,), (64, 64, 1)])
def test_a_wrong_shape_is_named_with_both_shapes(tmp_path, wrong):
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file(tensors_of() | {name: torch.zeros(wrong)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"{name}.*{wrong[0]}.*config.json asks for .64, 64."):
        SafetensorsSource(tmp_path, CONFIG)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_found_where_they_are_read(tmp_path, value):
    tensors, name = tensors_of(dtype=torch.bfloat16), "model.layers.0.mlp.gate_proj.weight"
    tensors[name][17, 5] = value
    save_file(tensors, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path, CONFIG)
    source.read(name, slice(0, 17), WHOLE)
    with pytest.raises(UserError, match=f"{name} contains NaN or infinity"):
        source.read(name, slice(10, 20), WHOLE)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int64])
def test_quantised_weights_are_refused_and_not_taken_for_weights(tmp_path, dtype):
    tensors, name = tensors_of(), "model.layers.0.mlp.up_proj.weight"
    tensors[name] = torch.ones(tensors[name].shape).to(dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"{name} .*not supported"):
        SafetensorsSource(tmp_path, CONFIG)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_file_cut_or_damaged_anywhere_in_its_header_is_named(tmp_path, sharded):
    tensors = tensors_of()
    names = write_shards(tmp_path, tensors, 2) if sharded else ["model.safetensors"]
    if not sharded:
        save_file(tensors, tmp_path / names[0])
    whole, rng = (tmp_path / names[0]).read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    damaged = [whole[:n] for n in (0, 1, 7, 8, 100, header, len(whole) // 2, len(whole) - 1)]
    damaged += [
        b"\xff" * 16 + whole[16:],
        whole[:8] + b"[" + whole[9:],
        b"version https://git-lfs.github.com/spec/v1\n",
    ]
    damaged += [whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :] for i in rng.sample(range(header), 30)]
    for data in damaged:
        (tmp_path / names[0]).write_bytes(data)
        with pytest.raises(UserError, match="truncated or corrupt|unexpected tensor|is missing|has shape") as caught:
            SafetensorsSource(tmp_path, CONFIG)
        assert "\n" not in str(caught.value)


def test_a_missing_shard_is_named(tmp_path):
    names = write_shards(tmp_path, tensors_of(), 3)
    (tmp_path / names[1]).unlink()
    with pytest.raises(UserError, match=f"shard {names[1]} .*missing"):
        SafetensorsSource(tmp_path, CONFIG)


@pytest.mark.parametrize(
    "evil", ["../secret.safetensors", "/etc/hostname", "sub/x.safetensors", "..", "", 5, None, ["a"]]
)
def test_an_index_does_not_lead_out_of_its_folder(tmp_path, evil):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path / "secret.safetensors", folder / "sub" / "x.safetensors"):
        save_file(tensors_of(), place)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": evil}}))
    with pytest.raises(UserError, match="index"):
        SafetensorsSource(folder, CONFIG)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "\x00"])
def test_a_malformed_index_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="index|missing"):
        SafetensorsSource(tmp_path, CONFIG)


def test_a_folder_without_safetensors_says_what_loads(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="only safetensors"):
        SafetensorsSource(tmp_path, CONFIG)
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(UserError, match=r"model.safetensors"):
        SafetensorsSource(tmp_path, CONFIG)


def random_source(seed=0, dtype=torch.float32, distribution="normal", config=CONFIG):
    return RandomSource(config, CPU, seed, distribution, dtype)


def test_random_weights_depend_on_seed_and_name_alone():
    big = dataclasses.replace(CONFIG, vocab_size=2 * RandomSource.BLOCK_ROWS + 17, hidden_size=8)
    whole = {name: random_source(config=big).read(name, WHOLE, WHOLE) for name in expected_shapes(big)}
    rng = random.Random(4)
    for name, tensor in sorted(whole.items(), key=lambda _: rng.random()):  # in another order
        if tensor.ndim == 1:
            continue
        source = random_source(config=big)
        for _ in range(4):  # slices that cross the blocks and some that do not
            rows, columns = (slice(*sorted(rng.sample(range(n + 1), 2))) for n in tensor.shape)
            assert torch.equal(source.read(name, rows, columns), tensor[rows, columns])
        assert torch.equal(random_source(config=big, dtype=torch.bfloat16).read(name, WHOLE, WHOLE), tensor.bfloat16())
        assert not torch.equal(random_source(seed=1, config=big).read(name, WHOLE, WHOLE), tensor)
    matrices = [t.flatten()[:64] for t in whole.values() if t.ndim == 2]
    assert all(not torch.equal(a, b) for i, a in enumerate(matrices) for b in matrices[:i])


@pytest.mark.parametrize("seed", [0, 2**31, 2**32, 2**33 + 1, 10**18 - 1])
def test_any_seed_of_the_command_line_is_a_seed(seed):
    name = "model.embed_tokens.weight"
    first, other = (random_source(s).read(name, WHOLE, WHOLE) for s in (seed, seed + 1))
    assert torch.isfinite(first).all() and not torch.equal(first, other)
    assert seed == 0 or not torch.equal(first, random_source(0).read(name, WHOLE, WHOLE))


@pytest.mark.parametrize("distribution, deviation, bound", [("normal", 0.125, 0.8), ("uniform", 1e-3 / 3**0.5, 1e-3)])
def test_the_distributions_are_what_they_are_called(distribution, deviation, bound):
    weight = random_source(distribution=distribution).read("lm_head.weight", WHOLE, WHOLE)
    assert abs(float(weight.std()) / deviation - 1) < 0.02
    assert abs(float(weight.mean())) < deviation / 20 and float(weight.abs().max()) <= bound
    assert torch.equal(random_source().read("model.norm.weight", WHOLE, WHOLE), torch.ones(64))
