"""Peers on the same requests: Hugging Face's `generate` in static batches, vLLM's offline `LLM.generate`.

Both get the token ids and the lengths that our schedulers got. `generate` has no scheduler: the requests go in batches
of `req_batch_size` in order of arrival, padded, each to its longest; a request's times are those of its own tokens.
vLLM runs in a process of its own, since it takes the whole GPU and its settings must not touch ours.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common.batching.files import SUMMARY_COLUMNS, Files, Policy, Run
from common.batching.metrics import summarise
from common.errors import UserError
from common.serving import InputRequest, Request

VLLM_TIMEOUT_S = 1800


def compare(args: argparse.Namespace, setup, given: Sequence[InputRequest], files: Files) -> None:
    """Peers on the same requests, where they can run; otherwise a line that says why not."""
    for name in args.compare:
        missing = _missing(name, setup)
        if missing:
            print(f"--compare {name}: left out, {missing}")
            continue
        if name == "hf":
            served = [("hf, static batches", serve_hf(setup.model, given, args.req_batch_size, setup.eos_token_ids))]
        else:
            served = serve_vllm(args, setup.model, setup.dtype, given)
        for label, requests in served:
            run = Run(Policy(label, None), requests, [])
            run.summary = _peer_summary(run, args)
            if not files.has(run.policy):
                files.write(run, engine=name)


def _missing(name: str, setup) -> str:
    if setup.model is None:
        return "a simulated machine has no weights"
    if name == "hf":
        return "" if importlib.util.find_spec("transformers") else "transformers is not installed"
    if importlib.util.find_spec("vllm") is None:
        return "it is not installed (pip install vllm)"
    return "" if setup.device_type == "cuda" else "it needs a CUDA device here"


def _peer_summary(run: Run, args: argparse.Namespace) -> dict:
    """What can be known of a peer: its requests, not its steps."""
    slo = {"slo_ttft": args.slo_ttft or math.inf, "slo_tpot": args.slo_tpot or math.inf}
    summary = {"policy": run.policy.name, "token_budget": None, **summarise(run.requests, **slo)}
    unknown = dict.fromkeys(column for column in SUMMARY_COLUMNS if column not in summary)
    return {**summary, **unknown, "time_min": summary["time"], "time_max": summary["time"], "repeats": 1}


def serve_hf(model, given: Sequence[InputRequest], batch_size: int, eos_token_ids: Sequence[int]) -> list[Request]:
    """The requests with tokens and times, in seconds from the start. With EOS ignored each gets its exact length."""
    from common.generation import StepTimes
    from common.peers import HuggingFacePeer

    peer = HuggingFacePeer(model)
    peer.generate([given[0].prompt_token_ids], 2)  # its first call sets things up
    requests = [Request(r, i, eos_token_ids=eos_token_ids) for i, r in enumerate(given)]
    stop_ids = () if given[0].ignore_eos else eos_token_ids
    queue = sorted(requests, key=lambda r: r.arrival_time)
    start = time.perf_counter()
    while queue:
        time.sleep(max(0.0, queue[0].arrival_time - (time.perf_counter() - start)))
        now = time.perf_counter() - start
        batch = [r for r in queue[:batch_size] if r.arrival_time <= now]
        del queue[: len(batch)]
        times = StepTimes(model.device)
        prompts = [r.prompt_token_ids for r in batch]
        rows = peer.generate(prompts, max(r.output_len for r in batch), eos_token_ids=stop_ids, times=times)
        for request, row in zip(batch, rows):
            for token, stamp in zip(row, times.stamps[1:]):
                request.read(token, stamp - start)
                if request.finish_reason:
                    break
    return requests


# --- vLLM ------------------------------------------------------------------------------------------------------------
def serve_vllm(
    args: argparse.Namespace, model, dtype: str, given: Sequence[InputRequest]
) -> list[tuple[str, list[Request]]]:
    """[(settings, requests with tokens and times)] for vLLM's defaults and for 8,192 and 16,384 batched tokens.

    vLLM tells a request's first and last token only, so the tokens between have no times of their own: they are set
    evenly, and the gaps between tokens mean nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = {
            **_vllm_model(args, model, Path(folder)),
            "dtype": dtype,
            "max_model_len": model.config.max_position_embeddings,
            "ignore_eos": given[0].ignore_eos,
            "requests": [[list(r.prompt_token_ids), r.output_len] for r in given],
        }
        (Path(folder) / "job.json").write_text(json.dumps(job))
        found = []
        for batched_tokens in (None, 8192, 16384):
            command = [sys.executable, "-m", "common.batching.vllm_peer", f"{folder}/job.json", f"{folder}/out.json"]
            command += [str(batched_tokens)] if batched_tokens else []
            root = Path(__file__).resolve().parents[2]
            done = subprocess.run(
                command, cwd=root, capture_output=True, text=True, timeout=VLLM_TIMEOUT_S, check=False
            )
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise UserError(f"--compare vllm: its process ended with {done.returncode}: {last}")
            out = json.loads((Path(folder) / "out.json").read_text())
            settings = f"{out['version']}, {batched_tokens or 'default'} batched tokens"
            found.append((settings, [_vllm_request(r, i, row) for i, (r, row) in enumerate(zip(given, out["rows"]))]))
    return found


def _vllm_model(args: argparse.Namespace, model, folder: Path) -> dict:
    """What vLLM loads: the same checkpoint, or, for random weights, dummy weights of the same shape."""
    from common import checkpoint, embedded

    source = checkpoint.resolve(args.model, model.device, model.dtype, args.context)
    if source.kind == "random":
        (folder / "config.json").write_text(json.dumps(model.config.to_hf_dict()))
        return {"model": str(folder), "load_format": "dummy"}
    if source.kind == "embedded":
        return {"model": str(embedded.model_folder()), "load_format": "auto"}
    return {"model": str(source.folder or source.name), "load_format": "auto"}


def _vllm_request(given: InputRequest, request_id: int, row: dict) -> Request:
    request = Request(dataclasses.replace(given, ignore_eos=True, output_len=len(row["tokens"])), request_id)
    first, last, steps = row["first_s"], row["last_s"], max(1, len(row["tokens"]) - 1)
    for n, token in enumerate(row["tokens"]):
        request.read(token, first + (last - first) * n / steps)
    return request
