"""Peers of the schedulers: Hugging Face for real on a tiny model, vLLM as a stand-in with its interface."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.batching.peers import serve_hf
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
    served = serve_hf(model, given, 2, ())
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
