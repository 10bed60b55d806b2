"""From `--model` to a decoder: what each source means, what is refused, and that fusing and slicing keep every weight.

Catches: a model loaded that the user did not mean, weights downloaded before the config is known to be supported, a
model that does not fit, q, k, v fused in the wrong order, a slice of a rank that is not the slice of the whole.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import checkpoint, embedded, memory
from common.checkpoint import Shard, build, load, pick_device, pick_dtype, resolve
from common.config import SHAPES, ModelConfig
from common.errors import UserError
from common.peers import hf_state_dict
from common.tensor_source import RandomSource, SafetensorsSource, expected_shapes

CPU = torch.device("cpu")
CONFIG = dataclasses.replace(SHAPES["tiny"], vocab_size=300, tie_word_embeddings=True)


@pytest.fixture
def no_default(monkeypatch, tmp_path):
    """A machine without TLAB_MODEL and without the course's folder."""
    monkeypatch.delenv("TLAB_MODEL", raising=False)
    monkeypatch.setattr(checkpoint, "DEFAULT_FOLDER", tmp_path / "no such folder")


def write_folder(folder: Path, config: ModelConfig = CONFIG, **changed) -> dict[str, torch.Tensor]:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in expected_shapes(config).items()}
    (folder / "config.json").write_text(json.dumps(config.to_hf_dict() | changed))
    save_file(tensors, folder / "model.safetensors")
    return tensors


def add_tokenizer(folder: Path, vocab_size: int = 256) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) + [f"extra{i}" for i in range(1000)]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet[:vocab_size])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


# --- what a source means ---------------------------------------------------------------------------------------------
def test_none_is_tlab_model_then_the_course_folder_then_embedded(no_default, monkeypatch, tmp_path, capsys):
    assert resolve(None, CPU, torch.float32).kind == "embedded"
    course = tmp_path / "course"
    write_folder(course)
    monkeypatch.setattr(checkpoint, "DEFAULT_FOLDER", course)
    on_cpu = resolve(None, CPU, torch.float32)
    assert on_cpu.kind == "embedded" and "CPU" in on_cpu.reason
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(checkpoint, "free_bytes", lambda device: 10**9)
    assert resolve(None, gpu, torch.bfloat16).folder == course
    monkeypatch.setattr(checkpoint, "free_bytes", lambda device: 1000)
    small = resolve(None, gpu, torch.bfloat16)
    assert small.kind == "embedded" and "not free" in small.reason
    monkeypatch.setattr(checkpoint, "free_bytes", memory.free_bytes)
    monkeypatch.setenv("TLAB_MODEL", "random:tiny")
    named = resolve(None, CPU, torch.float32)
    assert (named.kind, named.reason) == ("random", "TLAB_MODEL is set")
    load(None, device="cpu")
    assert capsys.readouterr().out.startswith("model: random:tiny (")
    monkeypatch.setenv("TLAB_MODEL", "/no/such/folder")
    with pytest.raises(UserError, match="TLAB_MODEL"):
        resolve(None, CPU, torch.float32)


def test_a_typed_source_wins(no_default, monkeypatch, tmp_path):
    monkeypatch.setenv("TLAB_MODEL", "/no/such/folder")
    write_folder(tmp_path / "m")
    assert resolve(str(tmp_path / "m"), CPU, torch.float32).kind == "folder"
    assert resolve("embedded", CPU, torch.float32).kind == "embedded"
    assert resolve("someone/some-model", CPU, torch.float32).kind == "hub"
    assert resolve("random:llama3-8b:uniform", CPU, torch.float32).distribution == "uniform"


@pytest.mark.parametrize(
    "source, said",
    [
        ("/no/such/folder", "no such folder"),
        ("no-such-folder", "no such folder"),
        ("./a/b", "no such folder"),
        ("a/b/c", "no such folder"),
        ("~no-such-user-at-all/model", "no such folder"),
        ("x" * 5000, "no such folder"),
        ("a\0b", "no such folder"),
        ("random:", "unknown shape"),
        ("random:llama9", "llama3-8b"),
        ("random:tiny:cauchy", "random:SHAPE:uniform"),
        ("random:tiny:normal:x", "random:SHAPE"),
    ],
)
def test_a_source_that_means_nothing_is_refused(source, said):
    with pytest.raises(UserError, match=said) as caught:
        resolve(source, CPU, torch.float32)
    assert len(str(caught.value)) < 300


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="no such folder"):
        resolve(str(tmp_path / "model.gguf"), CPU, torch.float32)


def test_context_is_for_random_models(tmp_path):
    model, _ = load("random:tiny", device="cpu", context=77, quiet=True)
    assert model.config.max_position_embeddings == 77
    same, _ = load("random:tiny", device="cpu", quiet=True)
    assert torch.equal(model.embed_tokens, same.embed_tokens)  # the context changes no weight
    write_folder(tmp_path / "m")
    for source in ("embedded", str(tmp_path / "m")):
        with pytest.raises(UserError, match="--context"):
            resolve(source, CPU, torch.float32, context=77)
    with pytest.raises(UserError, match="--context"):  # float32 positions collapse there
        resolve("random:tiny", CPU, torch.float32, context=2**24 + 1)


def test_devices_and_dtypes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == CPU
    assert pick_dtype("auto", CPU) == torch.float32 and pick_dtype("float16", CPU) == torch.float16
    for name in ("cuda", "cuda:0", "cuda:7"):
        with pytest.raises(UserError, match=f"--device {name}: .*--device cpu"):
            pick_device(name)
    for name in ("mps", "xla", "nonsense", "cpu:x", ""):
        with pytest.raises(UserError, match="--device"):
            pick_device(name)
    with pytest.raises(UserError, match="--dtype int8"):
        pick_dtype("int8", CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert pick_device("auto").type == "cuda" and pick_device("cuda:1").index == 1
    with pytest.raises(UserError, match="only 2"):
        pick_device("cuda:2")
    turing = torch.device("cuda")
    assert pick_dtype("auto", turing) == torch.float16
    with pytest.raises(UserError, match="--dtype bfloat16: Tesla T4"):
        pick_dtype("bfloat16", turing)


# --- memory ----------------------------------------------------------------------------------------------------------
def test_a_model_that_does_not_fit_is_refused_before_it_is_read(tmp_path, monkeypatch):
    write_folder(tmp_path)
    needed = CONFIG.num_parameters * 4 + CONFIG.vocab_size * CONFIG.hidden_size * 4  # a tied head is packed apart
    monkeypatch.setattr(checkpoint, "free_bytes", lambda device: needed)
    add_tokenizer(tmp_path)
    load(str(tmp_path), device="cpu", quiet=True)
    monkeypatch.setattr(checkpoint, "free_bytes", lambda device: needed - 1)
    monkeypatch.setattr(SafetensorsSource, "read", lambda *a: pytest.fail("read before the refusal"))
    with pytest.raises(UserError, match="needs about .* are free; use a smaller model or dtype"):
        load(str(tmp_path), device="cpu", quiet=True)
    monkeypatch.setattr(checkpoint, "free_bytes", lambda device: 100 * 10**9)
    with pytest.raises(UserError, match=r"random:llama3-70b: needs about 28\d\.\d GB"):
        load("random:llama3-70b", device="cpu", dtype="float32")


def test_free_memory_is_the_smaller_of_machine_and_container(monkeypatch, tmp_path):
    real = Path.read_text
    files = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    8000000 kB\n",
        "/sys/fs/cgroup/memory.max": "5000000000\n",
        "/sys/fs/cgroup/memory.current": "3000000000\n",
        "/sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 1000000000\nactive_file 7\n",
    }
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: files.get(str(self)) or real(self, *a, **k))
    assert memory.free_bytes(CPU) == 3_000_000_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert memory.free_bytes(CPU) == 8_000_000 * 1024
    files["/sys/fs/cgroup/memory.max"] = "1000\n"
    assert memory.free_bytes(CPU) == 0


@pytest.mark.parametrize(
    "count, text", [(0, "0 B"), (999, "999 B"), (1536, "1.5 KB"), (2.5e9, "2.5 GB"), (3e15, "3000.0 TB")]
)
def test_sizes_are_read_by_people(count, text):
    assert memory.human_bytes(count) == text


# --- building --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_weight_arrives_where_it_belongs(tmp_path, tied, dtype):
    """Fused weights split again are the checkpoint's, bit for bit (prepacked ones through their plain copy)."""
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied, head_dim=24)
    tensors = write_folder(tmp_path, config)
    add_tokenizer(tmp_path)
    model, tokenizer = load(str(tmp_path), device="cpu", dtype=dtype, quiet=True)
    state = hf_state_dict(model)
    assert state.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(state[name], tensor.to(getattr(torch, dtype))), name
    head = tensors["model.embed_tokens.weight" if tied else "lm_head.weight"]
    assert torch.equal(model.lm_head.weight, head.to(getattr(torch, dtype)))
    assert tokenizer.decode(tokenizer.encode("Grüße, 世界")) == "Grüße, 世界"
    assert model.config == config and str(tmp_path) in model.origin


def test_the_weights_of_a_process_stand_in_memory_once(tmp_path):
    """float32 weights are prepacked on a CPU; the plain copy must not be kept beside them."""
    model, _ = load("random:tiny", device="cpu", dtype="float32", quiet=True)
    linears = [m for w in model.layers for m in (w.qkv, w.o_proj, w.gate_up, w.down_proj)] + [model.lm_head]
    assert all((m._weight is None) == m.is_prepacked for m in linears)


def test_a_rank_holds_the_slices_of_the_same_tensors():
    shape = dataclasses.replace(SHAPES["tiny"], num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=False)
    whole = hf_state_dict(
        build(shape, RandomSource(shape, CPU, 0, "normal", torch.float32), Shard.whole(shape), CPU, torch.float32)
    )
    part = Shard(range(2, 6), range(1, 3), range(50, 176), range(100, 512))  # two KV groups of three
    model = build(shape, RandomSource(shape, CPU, 0, "normal", torch.float32), part, CPU, torch.float32)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (4, 2)
    d = shape.head_dim
    for i, w in enumerate(model.layers):
        p = f"model.layers.{i}."
        q, k, v = w.qkv.weight.split([4 * d, 2 * d, 2 * d])
        assert torch.equal(q, whole[p + "self_attn.q_proj.weight"][2 * d : 6 * d])
        assert torch.equal(k, whole[p + "self_attn.k_proj.weight"][d : 3 * d])
        assert torch.equal(v, whole[p + "self_attn.v_proj.weight"][d : 3 * d])
        assert torch.equal(w.o_proj.weight, whole[p + "self_attn.o_proj.weight"][:, 2 * d : 6 * d])
        gate, up = w.gate_up.weight.chunk(2)
        assert torch.equal(gate, whole[p + "mlp.gate_proj.weight"][50:])
        assert torch.equal(up, whole[p + "mlp.up_proj.weight"][50:])
        assert torch.equal(w.down_proj.weight, whole[p + "mlp.down_proj.weight"][:, 50:])
    assert torch.equal(model.lm_head.weight, whole["lm_head.weight"][100:])
    assert torch.equal(model.embed_tokens, whole["model.embed_tokens.weight"])


def test_greedy_text_of_random_weights_depends_on_all_of_its_context(tiny):
    """Or every token-equality test on random weights would pass whatever a cache did: with narrow weights the text was
    the last token over and over.
    """
    from common.equality import greedy_reference

    prompts = [[(37 * i + 101 * j) % 512 for j in range(8)] for i in range(8)]
    texts = [greedy_reference(tiny[0], prompt, 8) for prompt in prompts]
    others = [greedy_reference(tiny[0], [(prompt[0] + 1) % 512, *prompt[1:]], 8) for prompt in prompts]
    assert sum(a != b for a, b in zip(texts, others)) >= 6
    assert sorted(len(set(text)) for text in texts)[4] >= 4


def test_the_seed_of_a_random_model_counts_and_is_recorded():
    first, again, other = (load("random:tiny", device="cpu", seed=s, quiet=True)[0] for s in (0, 0, 1))
    assert torch.equal(first.layers[0].qkv.weight, again.layers[0].qkv.weight)
    assert not torch.equal(first.layers[0].qkv.weight, other.layers[0].qkv.weight)
    assert first.origin == again.origin != other.origin  # single_batch compares tokens only where it is the same


# --- folders and the hub ---------------------------------------------------------------------------------------------
def test_bad_folders_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: not found"):
        load(str(tmp_path), device="cpu")
    write_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer cannot be read"):
        load(str(tmp_path), device="cpu")
    add_tokenizer(tmp_path, vocab_size=301)
    with pytest.raises(UserError, match="301 ids, config.json's vocab_size is 300"):
        load(str(tmp_path), device="cpu")


def test_no_code_of_a_checkpoint_runs(tmp_path):
    write_folder(tmp_path)
    witness = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(witness)!r}, 'w')\nclass T: pass\n")
    config = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="tokenizer"):
        load(str(tmp_path), device="cpu")
    assert not witness.exists()


def test_an_unsupported_hub_model_is_refused_before_its_weights_are_fetched(tmp_path, monkeypatch):
    import huggingface_hub

    revision = tmp_path / "snapshots" / "0123abc"
    asked: list[list[str]] = []

    def snapshot_download(repo_id, *, allow_patterns, **kw):
        asked.append(list(allow_patterns))
        return str(revision)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    write_folder(revision, attention_bias=True)
    with pytest.raises(UserError, match="attention_bias"):
        load("someone/biased", device="cpu")
    assert asked and not any("safetensors" in pattern and "index" not in pattern for p in asked for pattern in p)
    write_folder(revision)
    add_tokenizer(revision)
    model, _ = load("someone/plain", device="cpu", quiet=True)
    assert "someone/plain" in model.origin and "0123abc" in model.origin  # the revision is recorded


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    import huggingface_hub

    def unreachable(*a, **kw):
        raise OSError("cannot connect\nand a page of explanations")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match="someone/model: no such folder, and the hub did not give it: cannot connect$"):
        load("someone/model", device="cpu")


def test_embedded_is_loaded_from_its_folder(tmp_path, monkeypatch, capsys):
    tensors = write_folder(tmp_path)
    add_tokenizer(tmp_path)
    monkeypatch.setattr(embedded, "model_folder", lambda: tmp_path)
    model, _ = load("embedded", device="cpu")
    assert torch.equal(model.embed_tokens, load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"])
    assert torch.equal(model.embed_tokens, tensors["model.embed_tokens.weight"])
    line = capsys.readouterr().out
    assert line.startswith("model: SmolLM2-135M-Instruct (") and ", from " in line and ", because --model" in line
