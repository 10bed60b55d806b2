"""Peers on the same requests: Hugging Face's `generate` in static batches, vLLM's offline `LLM.generate`.

Both get the token ids and the lengths that our schedulers got. `generate` has no scheduler: the requests go in batches
in order of arrival, padded, each to its longest; a request's times are those of its own tokens. It shares our weights,
so it runs in turn with ours. vLLM runs last and in a process of its own: it takes the whole GPU, and its settings must
not touch ours.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.batching.files import SUMMARY_COLUMNS, Files, Policy, Run
from common.batching.metrics import PERCENTILES, summarise
from common.errors import UserError
from common.serving import InputRequest, Request

VLLM_TIMEOUT_S = 1800
# What vLLM's offline call does not tell; and what is unknown too where it gives no times at all.
GAP_COLUMNS = (*(f"itl_p{p}_s" for p in PERCENTILES), "max_itl_s")
TIME_COLUMNS = (
    *GAP_COLUMNS,
    *(f"{name}_p{p}_s" for name in ("ttft", "tpot", "latency") for p in PERCENTILES),
    *("goodput", "good_requests"),
)


def hugging_face(args: argparse.Namespace, setup) -> HuggingFace | None:
    """The peer of `--compare hf`, for `experiment.serve_all` to run in turn with ours; None, and why, where it
    cannot.
    """
    if "hf" not in args.compare:
        return None
    missing = _missing("hf", setup)
    if missing:
        print(f"--compare hf: left out, {missing}")
        return None
    return HuggingFace(setup, args.hf_batch_size or args.req_batch_size)


def compare_vllm(
    args: argparse.Namespace,
    setup,
    given: Sequence[InputRequest],
    files: Files,
    peer: HuggingFace | None,
    runs: Sequence[Run],
) -> list[UserError]:
    """vLLM on the same requests, where it can run; otherwise a line that says why not. Last of all that is measured: it
    takes the whole device, so the model and its pages are given back. peer, runs: what holds them too. Returns what
    failed, to be raised when all is written.
    """
    if "vllm" not in args.compare or any(row["engine"] == "vllm" for row in files.summary.rows):
        return []
    missing = _missing("vllm", setup)
    if missing:
        print(f"--compare vllm: left out, {missing}")
        return []
    model = _vllm_model(args, setup.model)
    if peer is not None:
        peer.close()
    setup.free_memory(runs)
    try:
        for label, requests, timed in serve_vllm(model, setup.config.max_position_embeddings, setup.dtype, given):
            run = Run(Policy(label, None), requests, [])
            run.summary = _peer_summary(run, args) | dict.fromkeys(GAP_COLUMNS if timed else TIME_COLUMNS)
            files.write(run, engine="vllm")
    except UserError as error:
        return [error]
    return []


def in_words(rows: Sequence[dict], ours: str) -> str:
    """The policy called `ours` beside each peer, of several settings the best; "" without peers."""
    mine = next((row for row in rows if row["policy"] == ours), None)
    texts = []
    for name in dict.fromkeys(row.get("engine", "ours") for row in rows):
        if name != "ours" and mine is not None:
            best = max((row for row in rows if row["engine"] == name), key=lambda row: row["tokens_per_s"])
            texts.append(
                f"{ours} gave {mine['tokens_per_s'] / best['tokens_per_s']:.2f} times the tokens/s of {best['policy']}"
            )
    return "; ".join(texts) + "." if texts else ""


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


class HuggingFace:
    """`generate` of transformers over the same weights: requests in padded batches, in order of arrival.

    `requests`: those of the last run.
    """

    name = "hf"

    def __init__(self, setup, batch_size: int) -> None:
        self.policy = Policy(f"hf, batches of {batch_size}", None)
        self.requests: list[Request] = []
        self._setup, self._batch_size, self._peer = setup, batch_size, None

    def serve(self, given: Sequence[InputRequest], args: argparse.Namespace) -> Run:
        """Serve the set once."""
        if self._peer is None:
            from common.peers import HuggingFacePeer

            self._peer = HuggingFacePeer(self._setup.model)
            self._peer.generate([given[0].prompt_token_ids], 2)  # its first call sets things up
        self.requests = serve_hf(self._peer, given, self._batch_size, self._setup.eos_token_ids)
        run = Run(self.policy, self.requests, [])
        run.summary = _peer_summary(run, args)
        return run

    def close(self) -> None:
        """Let the weights go."""
        self._peer = None


def serve_hf(peer, given: Sequence[InputRequest], batch_size: int, eos_token_ids: Sequence[int]) -> list[Request]:
    """The requests with tokens and times, in seconds from the start. With EOS ignored each gets its exact length.

    peer: a `common.peers.HuggingFacePeer`.
    """
    from common.generation import StepTimes

    requests = [Request(r, i, eos_token_ids=eos_token_ids) for i, r in enumerate(given)]
    stop_ids = () if given[0].ignore_eos else eos_token_ids
    queue = sorted(requests, key=lambda r: r.arrival_time)
    start = time.perf_counter()
    while queue:
        time.sleep(max(0.0, queue[0].arrival_time - (time.perf_counter() - start)))
        now = time.perf_counter() - start
        batch = [r for r in queue[:batch_size] if r.arrival_time <= now]
        del queue[: len(batch)]
        times = StepTimes(peer.model.device)
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
    model: VLLMModel, max_context: int, dtype: str, given: Sequence[InputRequest]
) -> Iterator[tuple[str, list[Request], bool]]:
    """(settings, requests with tokens and times, whether the times are vLLM's) for its defaults and for 8,192 and
    16,384 batched tokens. Raises UserError where it fails.

    vLLM tells a request's first and last token only, so the tokens between have no times of their own: they are set
    evenly, and the gaps between tokens mean nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        job_path, out_path = Path(folder) / "job.json", Path(folder) / "out.json"
        job = {
            "model": model.save(Path(folder)),
            "load_format": model.load_format,
            "dtype": dtype,
            "max_model_len": max_context,
            "ignore_eos": given[0].ignore_eos,
            "requests": [[list(r.prompt_token_ids), r.output_len] for r in given],
        }
        job_path.write_text(json.dumps(job))
        for batched_tokens in (None, 8192, 16384):
            command = [sys.executable, "-m", "common.batching.vllm_peer", str(job_path), str(out_path)]
            command += [str(batched_tokens)] if batched_tokens else []
            root = Path(__file__).resolve().parents[2]
            try:
                done = subprocess.run(
                    command, cwd=root, capture_output=True, text=True, timeout=VLLM_TIMEOUT_S, check=False
                )
            except subprocess.TimeoutExpired:
                raise UserError(f"--compare vllm: it had not ended after {VLLM_TIMEOUT_S} s") from None
            if done.returncode:
                raise UserError(f"--compare vllm: its process ended with {done.returncode}: {last_error(done.stderr)}")
            out = json.loads(out_path.read_text())
            settings = f"{out['version']}, {batched_tokens or 'default'} batched tokens"
            requests = [_vllm_request(r, i, row) for i, (r, row) in enumerate(zip(given, out["rows"]))]
            yield settings, requests, all(row["first_s"] is not None for row in out["rows"])


def last_error(stderr: str) -> str:
    """The line that says what went wrong: vLLM's engine fails in a process of its own, and the last line only says
    so.
    """
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"\b\w*(Error|Exception)\b: ", line)]
    return (named or lines or ["no message"])[0 if named else -1]


@dataclasses.dataclass(frozen=True)
class VLLMModel:
    """What vLLM loads: a checkpoint, or dummy weights of the shape in `config`."""

    source: str
    load_format: str
    config: dict | None = None

    def save(self, folder: Path) -> str:
        """Where it is; a shape alone is written into `folder` first."""
        if self.config is None:
            return self.source
        (folder / "config.json").write_text(json.dumps(self.config))
        return str(folder)


def _vllm_model(args: argparse.Namespace, model) -> VLLMModel:
    """The same checkpoint, or, for random weights, dummy weights of the same shape."""
    from common import checkpoint, embedded

    source = checkpoint.resolve(args.model, model.device, model.dtype, args.context)
    if source.kind == "random":
        return VLLMModel("", "dummy", model.config.to_hf_dict())
    if source.kind == "embedded":
        return VLLMModel(str(embedded.model_folder()), "auto")
    return VLLMModel(str(source.folder or source.name), "auto")


def _vllm_request(given: InputRequest, request_id: int, row: dict) -> Request:
    request = Request(dataclasses.replace(given, ignore_eos=True, output_len=len(row["tokens"])), request_id)
    last, steps = row["last_s"], max(1, len(row["tokens"]) - 1)
    first = last if row["first_s"] is None else row["first_s"]
    for n, token in enumerate(row["tokens"]):
        request.read(token, first + (last - first) * n / steps)
    return request
