"""`generate_batched` against Hugging Face, and the script as a user runs it."""

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from assignment3.section3 import flashinfer_pipeline as pipeline
from assignment3.section3 import helper
from common import cli
from common.checkpoint import Shard, build
from common.equality import require_equal
from common.errors import UserError
from common.kernels import runtime
from common.pages import DistKVCache, pages_for
from common.peers import HuggingFacePeer, hf_state_dict
from common.results import read_rows
from common.sampling import SamplingParams
from common.serving import InputRequest, Request

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "assignment3" / "section3" / "flashinfer_pipeline.py"
OUTPUT_LEN = 10
LENGTHS = [1, 700, 2, 3, 16, 17, 64, 5, 129, 31, 333, 48, 90, 7, 256, 33]
LONGEST = max(LENGTHS) + OUTPUT_LEN - 1


@pytest.fixture(scope="module")
def reference(lively):
    """(model, tokenizer, prompts, Hugging Face's greedy tokens of each)."""
    model, tokenizer = lively
    draw = random.Random(7)
    prompts = [[draw.randrange(model.config.vocab_size) for _ in range(n)] for n in LENGTHS]
    peer = HuggingFacePeer(model)
    return model, tokenizer, prompts, [peer.generate([prompt], OUTPUT_LEN)[0] for prompt in prompts]


def make_engine(model, tokenizer=None, **options):
    """Memory is NaN before it is written and after it is given back."""
    engine = pipeline.Engine(model, tokenizer, **options)
    release = engine.steps.release

    def poisoned(request):
        pages = list(request.pages.indices) if request.pages else []
        release(request)
        for layer in engine.pool.layers:
            layer[pages] = torch.nan

    engine.steps.release = poisoned
    for layer in engine.pool.layers:
        layer.fill_(torch.nan)
    return engine


def given(prompts, **more):
    return [InputRequest(prompt_token_ids=p, output_len=OUTPUT_LEN, **more) for p in prompts]


def check(reference, requests, rows):
    model, _, prompts, expected = reference
    got = [r.output_token_ids for r in requests]
    require_equal(model, [prompts[i] for i in rows], [expected[i] for i in rows], got, "pipeline against Hugging Face")
    assert all(len(tokens) == OUTPUT_LEN for tokens in got)


@pytest.mark.parametrize("page_size", [1, 2, 3, 16, 64])
@pytest.mark.parametrize("room", [0, 400])
def test_hugging_face_s_tokens_in_any_order_in_a_pool_that_just_fits(reference, page_size, room):
    model, _, prompts, _ = reference
    num_pages = pages_for(LONGEST + room, page_size)
    engine = make_engine(model, page_size=page_size, num_pages=num_pages, max_step_tokens=300)
    rows = list(range(len(prompts)))
    random.Random(page_size + room).shuffle(rows)
    requests = engine.generate_batched(given([prompts[i] for i in rows]))
    check(reference, requests, rows)
    assert engine.num_free_pages == engine.pool.capacity
    assert 0 < engine.peak_pages <= engine.pool.capacity
    assert max(work.prefill_tokens for work in engine.works) <= 300


@pytest.mark.skipif(not (runtime.HAS_TRITON and runtime.INTERPRETED), reason="needs Triton's interpreter")
def test_triton(reference):
    model, _, prompts, _ = reference
    rows = [i for i, n in enumerate(LENGTHS) if n in (1, 3, 17, 31)]
    engine = make_engine(model, backend="triton", page_size=16, num_pages=8)
    check(reference, engine.generate_batched(given([prompts[i] for i in rows])), rows)


def test_requests_that_can_never_fit_are_refused_by_name_and_the_others_finish(reference):
    model, _, prompts, _ = reference
    engine = make_engine(model, page_size=4, num_pages=pages_for(64 + OUTPUT_LEN - 1, 4))
    context = model.config.max_position_embeddings
    rows = [i for i, n in enumerate(LENGTHS) if n <= 64]
    requests = given([prompts[1], *[prompts[i] for i in rows], [1] * context])
    done = engine.generate_batched(requests)
    assert done[0].finish_reason == "refused"
    assert done[0].refusal == "request 0: 709 tokens take 178 pages, the pool has 19"
    assert f"request {len(rows) + 1}: {context + 9} tokens, the context is {context}" == done[-1].refusal
    check(reference, done[1:-1], rows)
    just = engine.generate_batched([InputRequest(prompt_token_ids=[1] * 66, output_len=11)])  # 76 tokens: all 19 pages
    assert just[0].finish_reason == "length" and engine.peak_pages == 19
    (over,) = engine.generate_batched([InputRequest(prompt_token_ids=[1] * 67, output_len=11)])
    assert over.finish_reason == "refused" and engine.works == []


def test_the_next_step_is_launched_before_the_last_is_read(reference):
    model, _, prompts, _ = reference
    engine = make_engine(model, page_size=16, num_pages=100)
    events, launch = [], engine.steps.launch

    def spied(chunks):
        number = sum(name == "launch" for name, _ in events)
        events.append(("launch", number))
        step = launch(chunks)
        tokens = step.tokens
        step.tokens = lambda: (events.append(("read", number)), tokens())[1]
        return step

    engine.steps.launch = spied
    engine.generate_batched(given(prompts[2:5]))
    steps = OUTPUT_LEN  # one for the prompts, nine decodes
    expected = [("launch", 0)]
    for i in range(1, steps):
        expected += [("launch", i), ("read", i - 1)]
    assert events == [*expected, ("read", steps - 1)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["launch", "token"])
@pytest.mark.parametrize("when", [0, 1, 4, 11])
def test_an_exception_in_the_middle_leaves_no_page_taken(reference, error, where, when):
    model, _, prompts, _ = reference
    rows = [2, 3, 4, 5, 7]
    engine = make_engine(model, page_size=4, num_pages=14)
    count, launch = 0, engine.steps.launch

    def fail(*args):
        nonlocal count
        count += 1
        if count > when:
            raise error

    def failing_launch(chunks):
        fail()
        return launch(chunks)

    if where == "launch":
        engine.steps.launch = failing_launch
    with pytest.raises(error):
        engine.generate_batched(given([prompts[i] for i in rows]), fail if where == "token" else None)
    assert engine.num_free_pages == engine.pool.capacity
    engine.steps.launch = launch
    check(reference, engine.generate_batched(given([prompts[i] for i in rows])), rows)  # and the engine goes on


@pytest.mark.parametrize("which", [0, 1])
def test_each_of_several_eos_ids_ends_a_request(reference, which):
    model, tokenizer, prompts, expected = reference
    third, sixth = expected[6][2], expected[6][5]
    ids = (third, 9999) if which == 0 else (9999, sixth)
    engine = make_engine(replace(model, config=replace(model.config, eos_token_ids=ids)), page_size=4, num_pages=60)
    stop, go_on = engine.generate_batched(
        [*given([prompts[6]], ignore_eos=False), *given([prompts[6]], ignore_eos=True)]
    )
    end = expected[6].index(ids[which]) + 1
    assert stop.output_token_ids == expected[6][:end] and stop.finish_reason == "stop" and end < OUTPUT_LEN
    assert go_on.output_token_ids == expected[6] and go_on.finish_reason == "length"
    assert engine.num_free_pages == engine.pool.capacity


def test_stop_strings(reference):
    model, tokenizer, prompts, expected = reference
    text = tokenizer.decode(expected[4][3:5])  # over the border of two tokens
    engine = make_engine(model, tokenizer, page_size=4, num_pages=60)
    (request,) = engine.generate_batched(given([prompts[4]], stop=["never said", text]))
    assert request.output_token_ids == expected[4][:5] and request.finish_reason == "stop"
    with pytest.raises(UserError, match="request 0 has stop strings, which need a tokenizer"):
        make_engine(model, page_size=4, num_pages=60).generate_batched(given([prompts[4]], stop=["x"]))
    assert engine.num_free_pages == engine.pool.capacity


def test_requests_are_sampled_each_in_its_own_way(reference):
    model, _, prompts, expected = reference
    engine = make_engine(model, page_size=4, num_pages=200)
    ways = [SamplingParams(4.0, seed=1), SamplingParams(), SamplingParams(4.0, seed=2), SamplingParams(4.0, seed=1)]
    together = engine.generate_batched([given([prompts[4]], sampling=way)[0] for way in ways])
    alone = [engine.generate_batched(given([prompts[4]], sampling=way))[0] for way in ways]
    tokens = [r.output_token_ids for r in together]
    assert tokens == [r.output_token_ids for r in alone]
    assert tokens[1] == expected[4] and tokens[0] == tokens[3] and len({*map(tuple, tokens)}) == 3


def test_text_needs_the_tokenizer_and_requests_can_be_given_ready(reference):
    model, tokenizer, _, _ = reference
    engine = make_engine(model, tokenizer, page_size=4, num_pages=60)
    ready = Request(InputRequest(prompt_token_ids=tokenizer.encode("hello"), output_len=3), 5)
    got = engine.generate_batched([InputRequest("hello", output_len=3), ready])
    assert got[1] is ready and got[0].output_token_ids == ready.output_token_ids
    with pytest.raises(UserError, match="request 0 has no prompt tokens"):
        make_engine(model, page_size=4, num_pages=60).generate_batched([InputRequest("hello")])


def test_names_that_the_handout_promises():
    pool = pipeline.DistKVPool(1, 1, 4, 6, 4, torch.float32, "cpu")
    cache = pipeline.DistKVCache(pool)
    cache.allocate_tokens(5)
    assert isinstance(cache, DistKVCache) and (cache.seqlen, cache.last_page_offset) == (5, 1)
    request = pipeline.Request(InputRequest(prompt_token_ids=[1] * 5))
    request.pages = cache
    assert pipeline.build_kv_metadata([request])["kv_indices"].tolist() == cache.indices
    with pytest.raises(AttributeError, match="no attribute 'DistKVCashe'"):
        _ = pipeline.DistKVCashe


# --- helper.py -------------------------------------------------------------------------------------------------------
def test_weights_by_name_rebuild_the_model():
    manager = helper.WeightManager("random:tiny", device="cpu", dtype="float32")
    layers = manager.config.num_hidden_layers
    weights = helper.extract_model_weights(manager.weight_map, layers)
    assert all(len(weights[name]) == layers for name in helper.LAYER_WEIGHTS)
    assert torch.equal(weights["lm_head"], manager.model.lm_head.weight)

    class Source:
        bytes_read = 0
        shape = staticmethod(lambda name: tuple(manager.weight_map[name].shape))
        read = staticmethod(lambda name, rows=slice(None), columns=None: manager.weight_map[name][rows])

    again = build(manager.config, Source, Shard.whole(manager.config), torch.device("cpu"), torch.float32)
    mine, theirs = hf_state_dict(again), hf_state_dict(manager.model)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    with pytest.raises(UserError, match=r"model\.layers\.2\..* is not there"):
        helper.extract_model_weights(manager.weight_map, layers + 1)


def test_apply_rope_turns_pairs_of_halves_by_position(tiny):
    config = tiny[0].config
    x = torch.randn(3, 2, config.head_dim, dtype=torch.float32)
    positions = torch.tensor([0, 5, 2000])
    got = helper.apply_rope(x, positions, config).double()
    half = config.head_dim // 2
    for t, position in enumerate(positions.tolist()):
        for j in range(half):
            angle = torch.tensor(position * config.rope_theta ** (-j / half), dtype=torch.float64)
            a, b = x[t, :, j].double(), x[t, :, j + half].double()
            want = torch.stack((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))
            assert torch.allclose(torch.stack((got[t, :, j], got[t, :, j + half])), want, atol=1e-3)


# --- the script ------------------------------------------------------------------------------------------------------
def run_script(*arguments, cwd):
    command = [sys.executable, str(SCRIPT), "--model", "random:tiny", "--device", "cpu", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)


def test_help_imports_no_torch(tmp_path):
    code = (
        "import sys, runpy; sys.argv = ['p', '--help']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--kv-memory" in done.stdout and "pipeline_breakdown" in done.stdout


def test_the_whole_script(tmp_path):
    """Quick, with the peer: every file, every column, figures that hold together."""
    dump = tmp_path / "tokens.jsonl"
    out = tmp_path / "out"
    done = run_script("--preset", "quick", "--compare", "hf", "--out", out, "--dump-tokens", dump, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ready = re.search(r"ready in ([0-9.]+) s: imports [0-9.]+ s", done.stdout)  # other parts only from 0.05 s on
    first = re.search(r"first token ([0-9.]+) s after the command$", done.stdout, re.MULTILINE)
    assert 0 < float(ready[1]) <= float(first[1]) < 120
    assert "0 at the end" in done.stdout and "requests together against each alone: the same tokens" in done.stdout
    for name in ("decode", "prefill", "batch", "context", "breakdown"):
        for suffix in ("csv", "json", "png"):
            assert (out / f"pipeline_{name}.{suffix}").stat().st_size > 100
    promised = ["backend", "batch_size", "prompt_tokens", "output_tokens", "time", "tokens_per_s", "mbu", "mfu"]
    for name, count in (("decode", 3), ("prefill", 3), ("batch", 3), ("context", 2)):
        header = (out / f"pipeline_{name}.csv").read_text().splitlines()[0].split(",")
        assert header[: len(promised)] == promised and header[-1] == "engine"
        rows = read_rows(out / f"pipeline_{name}.csv", promised)
        assert [r["engine"] for r in rows].count("ours") == [r["engine"] for r in rows].count("hf") == count
        assert all(r["time"] > 0 and r["tokens_per_s"] > 0 and r["mbu"] > 0 and r["mfu"] > 0 for r in rows)
        assert {r["backend"] for r in rows if r["engine"] == "ours"} == {"torch"}
        # Part after part is slower than everything at once: the bound lies under the ceiling.
        assert all(0 < r["bound_tokens_per_s"] < r["tokens_per_s"] / max(r["mbu"], r["mfu"]) for r in rows)
    assert "against hf: the same tokens" in done.stdout and "times what Hugging Face gave" in done.stdout
    assert "an MFU of " in done.stdout and "its parts at their ceilings, one after the other, allow" in done.stdout
    batch = [r for r in read_rows(out / "pipeline_batch.csv", promised) if r["engine"] == "ours"]
    assert [r["batch_size"] for r in batch] == [1, 2, 4]
    assert all(r["prompt_tokens"] == r["output_tokens"] == 8 * r["batch_size"] for r in batch)
    assert all(r["tokens_per_s"] == pytest.approx(r["output_tokens"] / r["time"]) for r in batch)
    context = [r for r in read_rows(out / "pipeline_context.csv", promised) if r["engine"] == "ours"]
    assert [(r["prompt_tokens"] + r["output_tokens"], r["output_tokens"]) for r in context] == [(32, 4), (64, 4)]
    parts = read_rows(out / "pipeline_breakdown.csv", ("phase", "part", "time_us", "ceiling_us"))
    names = ["qkv", "rope+append", "attention", "o_proj", "gate_up", "down", "norms", "head", "sampling"]
    names += ["host gaps", "whole step"]
    assert [r["part"] for r in parts] == names * 2
    for phase in {r["phase"] for r in parts}:
        *apart, gaps, whole = (r for r in parts if r["phase"] == phase)
        assert gaps["time_us"] == pytest.approx(max(whole["time_us"] - sum(r["time_us"] for r in apart), 0), abs=0.01)
        assert whole["ceiling_us"] == pytest.approx(sum(r["ceiling_us"] for r in apart))
        assert f"{phase}: {cli.format_value(whole['time_us'] / 1e3)} ms a step" in done.stdout
    lines = [json.loads(line) for line in dump.read_text().splitlines()]
    assert [line["request"] for line in lines] == list(range(len(pipeline.PROMPTS)))
    assert all(len(line["output_token_ids"]) <= 8 and line["finish_reason"] in ("stop", "length") for line in lines)
    record = json.loads((out / "pipeline_decode.json").read_text())
    assert record["backend"] == "torch" and record["page_size"] == 16 and record["kv_pages"] > 0

    again = run_script("--preset", "quick", "--compare", "hf", "--out", out, "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert [r["time"] for r in read_rows(out / "pipeline_batch.csv", promised) if r["engine"] == "ours"] == [
        r["time"] for r in batch
    ]


def test_prompts_from_a_file_streamed_from_a_pool_that_one_does_not_fit(tmp_path):
    (tmp_path / "prompts.txt").write_text("hello\n" + "a long one " * 20 + "\nbye\n")
    options = ("--preset", "quick", "--prompts", "prompts.txt", "--stream", "--max-new-tokens", 6, "--ignore-eos")
    done = run_script(*options, "--page-size", 4, "--kv-pages", 10, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "refused: request 1: 225 tokens take 57 pages, the pool has 10" in done.stdout
    assert done.stdout.count("[6 tokens, ended by length") == 2
    assert "KV pool: 10 pages of 4 tokens = 40 tokens" in done.stdout
    assert not (tmp_path / "out").exists()  # nothing is measured


def test_one_streamed_answer_ends_its_line(tmp_path):
    options = ("--preset", "quick", "--prompt", "hello", "--stream", "--max-new-tokens", 6, "--ignore-eos")
    done = run_script(*options, cwd=tmp_path)
    assert re.search(r"^\[6 tokens, ended by length", done.stdout, re.MULTILINE), done.stdout + done.stderr


@pytest.mark.parametrize(
    "options, code, message",
    [
        (["--backend", "flashinfer"], 2, "--backend flashinfer: it is not installed"),
        (["--backend", "vllm"], 2, "--backend vllm: unknown"),
        (["--kv-pages", "0"], 2, "'0' is not a whole number of 1 or more"),
        (["--kv-memory", "1.5"], 2, "'1.5' is not a share of 0 to 1"),
        (["--kv-lens", "4", "--no-plot"], 2, "--kv-lens: 4 leaves no prompt before the 4 tokens that are decoded"),
        (["--kv-lens", "4096", "--no-plot"], 2, "--kv-lens: 2^12 is above what context and pool hold: 2048"),
        (["--batch-sizes", "10000"], 2, "--batch-sizes: 10000 is above what the pool of pages holds"),
        (["--seq-lens", "32,9000"], 2, "--seq-lens: 9000 is above what context and pool hold"),
        (
            ["--input-length", "9000"],
            2,
            "--input-length: 9000 leaves no room for 2 output tokens",
        ),
        (["--output-lengths", "1"], 2, "--output-lengths: decoding begins at the second token"),
        (["--no-sweep", "--compare", "hf"], 2, "--compare: belongs to the sweeps, which --no-sweep leaves out"),
        (["--prompt", "hi", "--kv-lens", "64"], 2, "--kv-lens: belongs to the sweeps, which a typed prompt leaves out"),
        (["--no-sweep", "--max-new-tokens", "9000"], 2, "no prompt can be served"),
    ],
)
def test_mistakes_are_one_line(options, code, message, tmp_path):
    import importlib.util

    if options[1] == "flashinfer" and importlib.util.find_spec("flashinfer"):
        pytest.skip("flashinfer is installed here")
    done = run_script("--preset", "quick", *options, "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == code and message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*"))  # nothing was measured
