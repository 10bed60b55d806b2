"""Peers of the schedulers: Hugging Face for real on a tiny model, vLLM as a stand-in with its interface."""

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.batching import experiment, peers
from common.batching.files import Files, Policy
from common.batching.peers import HuggingFace, serve_hf
from common.batching.setup import Setup
from common.results import read_rows
from common.serving import InputRequest

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[3]

FAKE_VLLM = """
import time
from types import SimpleNamespace

__version__ = "0.0-fake"


class SamplingParams:
    def __init__(self, *, temperature, max_tokens, ignore_eos, detokenize):
        assert temperature == 0.0 and ignore_eos is True
        self.max_tokens = max_tokens


class LLM:
    def __init__(self, *, max_num_batched_tokens=100, disable_log_stats, **options):
        assert not disable_log_stats and options["load_format"] == "dummy"
        self.batched = max_num_batched_tokens

    def generate(self, prompts, params, use_tqdm):
        assert len({tuple(p["prompt_token_ids"]) for p in prompts}) == len(prompts)
        now = time.monotonic()
        return [
            SimpleNamespace(
                outputs=[SimpleNamespace(token_ids=[self.batched + len(p["prompt_token_ids"])] * s.max_tokens)],
                metrics=SimpleNamespace(first_token_ts=now + 1, last_token_ts=now + 3),
            )
            for p, s in zip(prompts, params)
        ]
"""


def test_hugging_face_gives_each_request_its_length_and_its_times(tiny):
    from common.equality import greedy_reference

    model = tiny[0]
    given = [
        InputRequest(prompt_token_ids=list(range(3, 3 + n)), output_len=out) for n, out in ((4, 3), (9, 6), (2, 1))
    ]
    from common.peers import HuggingFacePeer

    served = serve_hf(HuggingFacePeer(model), given, 2, ())
    for request, wanted in zip(served, given):
        with torch.inference_mode():
            assert request.output_token_ids == greedy_reference(model, wanted.prompt_token_ids, wanted.output_len)
        assert request.finish_reason == "length" and len(request.token_times) == wanted.output_len
    assert served[0].token_times == served[1].token_times[:3]  # a batch
    assert served[2].token_times[0] > served[1].token_times[-1]  # and the next one after its longest


def test_vllm_job_in_a_process_of_its_own(tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(FAKE_VLLM)
    job = {"model": "m", "load_format": "dummy", "dtype": "bfloat16", "max_model_len": 64, "ignore_eos": True}
    (tmp_path / "job.json").write_text(json.dumps({**job, "requests": [[[1, 2, 3], 4], [[1], 1]]}))
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "common.batching.vllm_peer",
        str(tmp_path / "job.json"),
        str(tmp_path / "out.json"),
    ]
    for batched, expected in ((None, 100), ("8192", 8192)):
        subprocess.run([*command, *([batched] if batched else [])], cwd=ROOT, env=env, check=True)
        out = json.loads((tmp_path / "out.json").read_text())
        assert out["version"] == "vllm 0.0-fake"
        assert [row["tokens"] for row in out["rows"]] == [[expected + 3] * 4, [expected + 1]]
        for row in out["rows"]:
            assert row["first_s"] == pytest.approx(1, abs=0.2) and row["last_s"] - row["first_s"] == pytest.approx(2)


# --- peers in a script's run -----------------------------------------------------------------------------------------
@pytest.fixture
def opened(tmp_path):
    """(args, setup, requests, files) of a run over a model of its own."""
    from assignment4.Section1.continous_scheduler import Scheduler
    from common.checkpoint import load
    from common.engine import Engine
    from common.simulate import MACHINES, StepModel

    model = load("random:tiny", device="cpu", dtype="float32", quiet=True)[0]
    engine = Engine(model, num_pages=50, max_requests=8)
    ceiling = StepModel(MACHINES["cpu2"], model.config)
    setup = Setup(tmp_path, [engine], model.config, ceiling, {}, list, "float32", "cpu", model=model)
    args = SimpleNamespace(
        compare=("hf", "vllm"), hf_batch_size=2, req_batch_size=4, repeats=2, warmup=0, simulate=None, slo_ttft=None,
        slo_tpot=None, model="random:tiny", context=None, load=None, seed=0,
    )  # fmt: skip
    given = [InputRequest(prompt_token_ids=list(range(3, 3 + n)), output_len=n) for n in (3, 5, 2, 7)]
    files = Files(tmp_path, "t", "", {}, resume=False, compare=True)
    return args, setup, given, files, [Policy("ours", lambda e, **o: Scheduler(e, 4, **o))]


def serve_both(args, setup, given, files, policies):
    peer = peers.hugging_face(args, setup)
    runs = experiment.serve_all(policies, setup, given, args, files, peer)
    return peer, runs


def test_hugging_face_runs_in_turn_with_ours(opened, monkeypatch, capsys):
    args, setup, given, files, policies = opened
    order = []
    for owner, name in ((HuggingFace, "serve"), (experiment, "serve")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, f=original, who=owner: (order.append(who), f(*a))[1])
    peer, runs = serve_both(args, setup, given, files, policies)
    assert order == [experiment, HuggingFace] * 2
    assert [(r["policy"], r["engine"], r["repeats"]) for r in files.summary.rows] == [
        ("ours", "ours", 2),
        ("hf, batches of 2", "hf", 2),
    ]
    assert [run.policy.name for run in runs] == ["ours"]
    assert experiment.compare_tokens(setup, runs, peer) == []
    assert "against hf, batches of 2: the same tokens" in capsys.readouterr().out
    ours, theirs = (row["tokens_per_s"] for row in files.summary.rows)
    assert f"ours gave {ours / theirs:.2f} times the tokens/s of hf" in peers.in_words(files.summary.rows, "ours")
    peer.requests[2].tokens[-1] += 1  # a peer that decodes something else
    assert len(experiment.compare_tokens(setup, runs, peer)) == 1


def test_vllm_comes_last_with_the_memory_given_back(opened, tmp_path, monkeypatch):
    args, setup, given, files, policies = opened
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(FAKE_VLLM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(peers, "_missing", lambda name, setup: "")
    peer, runs = serve_both(args, setup, given, files, policies)
    alive = weakref.ref(setup.model), weakref.ref(setup.engines[0])
    assert peers.compare_vllm(args, setup, given, files, peer, runs) == []
    gc.collect()
    assert [what() for what in alive] == [None, None]
    files.close()
    rows = [row for row in read_rows(tmp_path / "t_summary.csv", ()) if row["engine"] == "vllm"]
    assert [row["policy"] for row in rows] == [
        f"vllm 0.0-fake, {budget} batched tokens" for budget in ("default", 8192, 16384)
    ]
    for row in rows:
        assert row["output_tokens"] == 17 and row["ttft_p50_s"] == pytest.approx(1, abs=0.2)
        assert row["itl_p99_s"] is None and row["max_itl_s"] is None  # it does not tell them
    requests = [row for row in read_rows(tmp_path / "t_requests.csv", ()) if row["engine"] == "vllm"]
    assert {row["max_itl_s"] for row in requests} == {None} and None not in {row["ttft_s"] for row in requests}


def test_a_vllm_without_times_has_a_throughput_and_nothing_made_up(opened, tmp_path, monkeypatch):
    args, setup, given, files, policies = opened
    (tmp_path / "vllm").mkdir()
    untimed = FAKE_VLLM.replace("metrics=SimpleNamespace(", "metrics=None, other=SimpleNamespace(")
    (tmp_path / "vllm" / "__init__.py").write_text(untimed)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(peers, "_missing", lambda name, setup: "")
    assert peers.compare_vllm(args, setup, given, files, None, []) == []
    row = files.summary.rows[0]
    assert row["tokens_per_s"] > 0 and row["ttft_p50_s"] is row["latency_p99_s"] is row["goodput"] is None
    assert {r["ttft_s"] for r in files.requests.rows} == {None}


def test_a_vllm_that_fails_is_told_by_its_own_error(opened, tmp_path, monkeypatch):
    args, setup, given, files, policies = opened
    (tmp_path / "vllm").mkdir()
    lines = ["import sys", "sys.stderr.write('ValueError: Free memory on device is too small\\nsomething after\\n')"]
    (tmp_path / "vllm" / "__init__.py").write_text("\n".join([*lines, "sys.exit(3)"]))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(peers, "_missing", lambda name, setup: "")
    (error,) = peers.compare_vllm(args, setup, given, files, None, [])
    assert "ended with 3: ValueError: Free memory" in str(error)
