"""How are many requests of any length served from one pool of KV memory?

Each request owns pages of the pool, as many as its tokens need, in any order; attention finds them through a page
table. So nothing is padded, memory is given back page by page, and one step computes tokens of any mixture of requests.

Method: `Engine.generate_batched` below is the plain loop: prefill all that fit, decode together, release, take more;
the next step is launched before the last one is read. It answers the built-in prompts (or --prompts), then four
sweeps, then where the time of a step goes. --ablation measures instead what each technique buys, one more a bar.
Output: results/pipeline_{decode,prefill,batch,context}.{csv,json,png}, pipeline_breakdown.{csv,json,png};
pipeline_ablation.{csv,json,png}.

    python assignment3/section3/flashinfer_pipeline.py
    python assignment3/section3/flashinfer_pipeline.py --no-sweep --stream --prompt "Why is the sky blue?"
    python assignment3/section3/flashinfer_pipeline.py --ablation
"""

import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

BEGAN = time.perf_counter()
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import cli
from common.errors import UserError
from common.pages import DistKVCache, pages_for
from common.serving import Chunk, InputRequest, Request, Work

if TYPE_CHECKING:  # `__getattr__` below imports these two when they are asked for, so that --help needs no torch
    from common.kv_cache import DistKVPool
    from common.paged.batch import build_kv_metadata

__all__ = ["DistKVCache", "DistKVPool", "Engine", "Request", "build_kv_metadata"]

PROMPTS = (
    "What is the capital of France?",
    "Explain what a KV cache is, in two sentences.",
    "Write a haiku about autumn.",
    "List three uses of a paper clip.",
    "What is 17 plus 25?",
    "Why do leaves change colour in autumn? Answer for a child of six who likes trees, and keep it short.",
)
PRESETS = {
    "quick": {
        "max_new_tokens": 8, "output_lengths": [2, 4, 8], "input_length": 16, "decode_batch": 4,
        "seq_lens": [16, 32, 64], "batch_sizes": [1, 2, 4], "batch_tokens": 8, "kv_lens": [32, 64], "context_tokens": 4,
        "repeats": 1, "warmup": 0,
    },
    "laptop": {
        "max_new_tokens": 40, "output_lengths": [4, 8, 16, 32], "input_length": 32, "decode_batch": 8,
        "seq_lens": [32, 64, 128, 256, 512], "batch_sizes": [1, 2, 4, 8, 16], "batch_tokens": 12,
        "kv_lens": [128, 512, 1024], "context_tokens": 8, "repeats": 2, "warmup": 0,
    },
    "course": {
        "max_new_tokens": 128, "output_lengths": [32, 64, 128, 256, 512, 1024], "input_length": 256,
        "decode_batch": 32, "seq_lens": [1 << e for e in range(8, 15)], "batch_sizes": [1 << e for e in range(9)],
        "batch_tokens": 128, "kv_lens": [1024, 4096, 16384, 32768], "context_tokens": 64, "repeats": 5,
    },
}  # fmt: skip


# What the command line has for the sweeps, and answers alone would ignore.
SWEEPS_ONLY = (
    "compare", "resume", "no_plot", "repeats", "warmup", "output_lengths", "input_length", "seq_lens", "batch_sizes",
    "kv_lens",
)  # fmt: skip


class Engine:
    """Many requests over one pool of pages. `steps` computes one step (common/engine.py); which, is decided here.

    tokenizer: needed for requests that are text, end at EOS, or have stop strings. max_step_tokens: prompt tokens that
    one step computes at most; options: those of common.engine.Engine (backend, page_size, num_pages, kv_memory, ...).
    """

    def __init__(self, model, tokenizer=None, *, max_step_tokens=8192, **options):
        from common import engine

        self.steps = engine.Engine(model, max_step_tokens=max_step_tokens, **options)
        self.pool, self.tokenizer, self.max_step_tokens = self.steps.pool, tokenizer, max_step_tokens
        self.works = []  # what each step of the last run computed
        self.peak_pages = 0

    @property
    def num_free_pages(self):
        return self.pool.num_free_pages

    def generate_batched(self, requests, on_token=None):
        """Serve `requests` (InputRequest or Request) to their ends; returns them as Requests, in the order given.

        One that can never fit is refused by name (`finish_reason`, `refusal`) and the others are served. Times are
        seconds since the call. on_token(request) is called for each token that is read. However it ends, no page stays
        taken.
        """
        requests = [self._request(r, i) for i, r in enumerate(requests)]
        start = self.steps.now()
        waiting = deque(r for r in requests if self._can_ever_fit(r))
        running, in_flight = [], None
        self.works, self.peak_pages = [], 0
        try:
            while waiting or running or in_flight:
                self._take_all_that_fit(waiting, running)
                chunks = self._next_chunks(running)
                step = self.steps.launch(chunks) if chunks else None
                if chunks:
                    self.works.append(Work.of(chunks))
                    self.peak_pages = max(self.peak_pages, self.pool.capacity - self.pool.num_free_pages)
                if in_flight:  # the device is busy with the step above while this one's tokens are looked at
                    self._read(in_flight, start, on_token)
                in_flight = step
                for request in [r for r in running if r.finish_reason and not r.num_unread]:
                    self.steps.release(request)
                    running.remove(request)
        finally:
            if in_flight:
                in_flight.tokens()  # nothing is released under a step that still runs
            for request in running:
                self.steps.release(request)
        return requests

    def _take_all_that_fit(self, waiting, running):
        """Let requests enter in order while the pool holds all of their tokens to come, so that none runs dry."""
        promised = sum(self._pages_at_the_end(r) for r in running)
        while waiting and len(running) < self.steps.max_requests:
            promised += self._pages_at_the_end(waiting[0])
            if promised > self.pool.capacity:
                return
            running.append(waiting.popleft())

    def _next_chunks(self, running):
        """Prompts first, in pieces where they are longer than a step may be; once all are read, one token of each."""
        chunks, left = [], self.max_step_tokens
        for request in running:
            if request.is_prefilling and left:
                chunks.append(
                    Chunk(request, request.num_computed, min(left, request.num_prefill - request.num_computed))
                )
                left -= chunks[-1].length
        return chunks or [Chunk(request, request.num_computed, 1) for request in running if request.wants_more]

    def _read(self, step, start, on_token):
        tokens = step.tokens()
        now = self.steps.now() - start
        for request, token in tokens.items():
            ended = request.finish_reason is not None
            request.read(token, now)
            if on_token and not ended:
                on_token(request)

    def _request(self, given, number):
        if isinstance(given, Request):
            return given
        ids, tokenizer = given.prompt_token_ids, self.tokenizer
        if ids is None and tokenizer is not None:
            ids = tokenizer.encode(given.input_str)
        eos = tokenizer.eos_token_ids if tokenizer else self.steps.model.config.eos_token_ids
        decode = tokenizer.decode if tokenizer else None
        return Request(given, number, prompt_token_ids=ids, eos_token_ids=eos, detokenize=decode)

    def _pages_at_the_end(self, request):
        return pages_for(request.max_tokens, self.pool.page_size)

    def _can_ever_fit(self, request):
        tokens, pages = request.max_tokens, self._pages_at_the_end(request)
        if tokens > self.steps.max_context:
            request.refuse(f"request {request.request_id}: {tokens} tokens, the context is {self.steps.max_context}")
        elif pages > self.pool.capacity:
            request.refuse(
                f"request {request.request_id}: {tokens} tokens take {pages} pages, the pool has {self.pool.capacity}"
            )
        return request.finish_reason is None


def __getattr__(name):
    if name == "DistKVPool":
        from common.kv_cache import DistKVPool

        return DistKVPool
    if name == "build_kv_metadata":
        from common.paged.batch import build_kv_metadata

        return build_kv_metadata
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# --- the script ------------------------------------------------------------------------------------------------------
def complete(exp, engine, texts, start_up):
    """Answer `texts` together; print the completions, the speeds and the pages. Returns the requests."""
    from common.scripts import text_run
    from common.scripts.text_stream import TextStream

    args, tokenizer = exp.args, exp.tokenizer
    given = []
    for text in texts:
        ids = tokenizer.encode(text) if args.raw else tokenizer.chat(text)
        given.append(InputRequest(text, args.max_new_tokens, ids, ignore_eos=bool(args.ignore_eos)))

    def show(request, text_too=True):
        if request.finish_reason == "refused":
            print(f"\n> {text_run.shown(texts[request.request_id])}\nrefused: {request.refusal}")
            return
        if text_too:
            answer = tokenizer.decode(request.output_token_ids).strip()
            print(f"\n> {text_run.shown(texts[request.request_id])}\n{answer}")
        count = request.num_output_tokens
        speed = count / request.token_times[-1]
        end = "" if text_too else "\n"  # of the text that was streamed
        print(f"{end}[{count} tokens, ended by {request.finish_reason}, {speed:.1f} tokens/s]", flush=True)

    single = len(texts) == 1
    stream = TextStream(tokenizer, len(texts), lambda r: show(r, text_too=not single)) if args.stream else None
    if stream and single:
        print(f"\n> {text_run.shown(texts[0])}")

    def on_token(request):
        start_up.token()
        if stream:
            stream(request)

    start = engine.steps.now()
    requests = engine.generate_batched(given, on_token)
    seconds = engine.steps.now() - start
    if stream:
        stream.finish()
    for request in requests:
        if not stream or not stream.has_text_of(request):
            show(request)
    total = sum(r.num_output_tokens for r in requests)
    print(
        f"\n{len(requests)} requests, {total} tokens in {seconds:.2f} s: {total / seconds:.1f} tokens/s in all, "
        f"reading the prompts included\npages: {engine.peak_pages} of {engine.pool.capacity} at the peak, "
        f"{engine.pool.capacity - engine.num_free_pages} at the end\n{start_up.first_token()}"
    )
    return requests


def check(exp, requests, tokens=3, rows=3):
    """The first tokens of some requests against each prompt alone by full recompute. Raises CheckFailed."""
    from common.equality import greedy_reference, require_equal

    requests = [r for r in requests if r.finish_reason != "refused"][:rows]
    prompts = [r.prompt_token_ids for r in requests]
    expected = [greedy_reference(exp.model, prompt, tokens) for prompt in prompts]
    got = [r.output_token_ids[:tokens] for r in requests]
    if prompts:
        print(require_equal(exp.model, prompts, expected, got, "requests together against each alone"))


def ablate(args):
    from common import roofline
    from common.scripts import ablation, experiment, pipeline_plots

    cli.refuse_unused(args, ablation.UNUSED, "not used by --ablation; leave one of them out")
    exp = experiment.prepare(args, __file__, ablation.PRESETS)
    file = ablation.Ablation(exp, Engine).measure()
    pictures = [] if args.no_plot else [pipeline_plots.draw_ablation(file.path)]
    cli.print_table(file.rows, [c for c in file.columns if c not in ablation.NOT_PRINTED])
    print(ablation.conclusion(file.rows))
    cli.print_written(file.path, file.json_path, *pictures)
    roofline.report_suspects(file.rows, exp.model.device.type)


def main(args):
    from common.paged.backends import pick_backend
    from common.scripts import breakdown, experiment, pipeline_plots, pipeline_sweeps, start_up, text_run

    if args.ablation:
        return ablate(args)
    start, texts = start_up.StartUp(BEGAN), cli.typed_prompts(args)
    answers_only = args.no_sweep or texts is not None
    if answers_only:
        alone = "--no-sweep" if args.no_sweep else "a typed prompt"
        cli.refuse_unused(args, SWEEPS_ONLY, f"belongs to the sweeps, which {alone} leaves out; leave one of them out")
    with start.part("weights"):
        exp = experiment.prepare(args, __file__, PRESETS)
        pick_backend(args.backend, exp.model)  # refused now rather than after the ceilings
    if not answers_only:
        with start.part("ceilings"):
            exp.ceilings  # noqa: B018 (measured here, before the pool takes the free memory)
    with start.part("KV pool"):
        engine = Engine(
            exp.model,
            exp.tokenizer,
            backend=args.backend,
            page_size=args.page_size,
            num_pages=args.kv_pages,
            kv_memory=args.kv_memory,
        )
    sweeps = None if answers_only else pipeline_sweeps.Sweeps(exp, engine)
    with start.part("graphs"):
        engine.steps.warm_up(min(len(texts or PROMPTS), 32))  # larger graphs when they are needed
    print(f"{engine.steps.describe_pool()}\n{start.ready()}", flush=True)
    requests = complete(exp, engine, texts or PROMPTS, start)
    if answers_only and all(r.finish_reason == "refused" for r in requests):
        raise UserError("no prompt can be served: shorten them or --max-new-tokens, or raise --kv-pages")
    if args.dump_tokens:
        text_run.dump_requests(args.dump_tokens, requests)
    check(exp, requests)
    if sweeps is None:
        return
    sweeps = sweeps.measure()
    parts = breakdown.measure(exp, engine) if not args.interrupted else None
    pictures = [] if args.no_plot else pipeline_plots.draw_all(sweeps, parts)
    for file in [*sweeps, *([parts] if parts else [])]:
        print(f"\n{file.path.stem}")
        cli.print_table(file.rows, [c for c in file.columns if c not in pipeline_sweeps.NOT_PRINTED])
    print(pipeline_sweeps.conclusion(exp, sweeps))
    if parts:
        print(breakdown.conclusion(parts.rows))
    for file in [*sweeps, *([parts] if parts else [])]:
        cli.print_written(file.path, file.json_path)
    cli.print_written(*pictures)
    pipeline_sweeps.report_suspects(exp, sweeps)


def number(kind, low, high, what):
    """An argparse type: a number of `kind` above `low` and at most `high`."""
    import argparse

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low < value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


if __name__ == "__main__":
    parser = cli.build_parser(
        __doc__,
        sweeps={
            "--output-lengths": "tokens to decode, in one batch",
            "--input-length": "prompt tokens of that batch",
            "--seq-lens": "prompt lengths to prefill, one at a time",
            "--batch-sizes": "requests at once",
            "--kv-lens": "contexts at which to decode one request",
        },
        text=True,
        compare=("hf",),
    )
    count, share = number(int, 0, 10**9, "a whole number of 1 or more"), number(float, 0, 1, "a share of 0 to 1")
    parser.set_defaults(interrupted=False)
    parser.add_argument("--max-new-tokens", type=count, metavar="N", help="tokens of an answer at most")
    parser.add_argument("--page-size", type=count, default=16, metavar="N", help="tokens a KV page (default: 16)")
    parser.add_argument("--kv-pages", type=count, metavar="N", help="KV pages (default: --kv-memory)")
    parser.add_argument(
        "--kv-memory", type=share, metavar="SHARE", help="share of the free memory for KV pages (0.96, 0.25 on a CPU)"
    )
    parser.add_argument("--backend", default="auto", help="attention: auto, torch, triton or flashinfer")
    parser.add_argument("--ablation", action="store_true", help="measure what each technique buys, one more a bar")
    parser.add_argument("--no-sweep", action="store_true", help="answer the prompts only")
    parser.add_argument("--stream", action="store_true", help="show the answers as they come")
    cli.run(main, parser)
