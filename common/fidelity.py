"""Is the fast path in 16 bits as good as plain torch in 16 bits? Held against float32, token by token, on fixed text.

Three models of the same checkpoint read the text that ships with the lab (common/data/prompt_text.txt), teacher-forced:
float32 and 16 bits in torch's own operations, one after the other, each sequence recomputed whole; and 16 bits as the
engine serves it: prompts in pieces over pages, decodes through the page table, in CUDA graphs on a GPU. Asked of it:

- the mean negative log-likelihood (NLL, nats) over at least 2,000 tokens, read as a prompt and again as decodes: within
  0.005 of plain 16 bits, and no further from float32 than 1.2 times plain 16 bits' distance + 0.001;
- over 64 decode steps, at one row and at 32, and over 16 at 128, where other products run: the 99.9th percentile of the
  logits' distance from float32 at most 1.5 times that of plain 16 bits.

Writes fidelity.csv and fidelity.json, prints the table, exits 1 where the fast path fails. On two CPU cores, where 16
bits are slow, it takes minutes with the embedded model; --quick takes a small share of it, with limits as much wider
as a mean over fewer tokens wanders.

    python -m common.fidelity --model embedded
    python -m common.fidelity --model embedded --quick
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from common import cli
from common.errors import CheckFailed, UserError
from common.pages import pages_for

if TYPE_CHECKING:
    import torch

    from common.engine import Engine
    from common.llama import Llama

COLUMNS = (
    "part", "tokens", "nll_float32", "nll_plain", "nll_fast", "delta_logit_plain", "delta_logit_fast",
    "delta_logit_ratio", "problem",
)  # fmt: skip
NLL_FROM_PLAIN, NLL_RATIO, NLL_SLACK = 0.005, 1.2, 0.001
NLL_TOKENS = 2000  # for which those two differences in nats are meant; a mean over fewer wanders more
LOGIT_RATIO, LOGIT_SHARE = 1.5, 0.999
PIECE = 512  # prompt tokens that the fast path computes in one step
ROWS_AT_ONCE = 256  # whose logits are in memory: [256, vocabulary] in float32, three times


@dataclass(frozen=True)
class Sizes:
    """How much text: tokens read as one prompt; rows decoded together, steps, and the contexts they start from."""

    prompt: int = 2048
    context: int = 1024  # of the one row that is decoded alone, for `steps` steps
    steps: int = 64
    rows: int = 32
    many_rows: int = 128
    many_steps: int = 16
    row_context: int = 64  # of each row that is not alone

    @property
    def batches(self) -> tuple[tuple[int, int], ...]:
        """Rows decoded together, and for how many steps."""
        return (self.rows, self.steps), (self.many_rows, self.many_steps)

    @property
    def tokens(self) -> int:
        """Tokens of text that all parts need."""
        together = (rows * steps + self.row_context for rows, steps in self.batches)
        return max(self.prompt, self.context + self.steps, *together) + 1

    @property
    def pages(self) -> int:
        """Pages of 16 tokens that the largest part holds at once."""
        together = (rows * pages_for(self.row_context + steps, 16) for rows, steps in self.batches)
        return max(pages_for(max(self.prompt, self.context + self.steps), 16), *together)


QUICK = Sizes(prompt=192, rows=4, steps=8, context=96, many_rows=12, many_steps=4, row_context=24)


@dataclass(frozen=True)
class Paths:
    """The three ways: float32 and 16 bits in plain operations, and the engine over the 16-bit weights."""

    float32: Llama
    plain: Llama
    fast: Llama
    engine: Engine


@dataclass(frozen=True)
class Finding:
    """What one part gave: mean NLL in nats, and the 99.9th percentile of |logit - float32's|."""

    part: str
    tokens: int
    nll_float32: float
    nll_plain: float
    nll_fast: float
    delta_logit_plain: float
    delta_logit_fast: float

    def problems(self, *, nll: bool, logits: bool) -> list[str]:
        """What is wrong, in words; a figure that is not a number is wrong. nll, logits: what is asked of this part."""
        found = []
        if nll:
            wider = max(1.0, math.sqrt(NLL_TOKENS / self.tokens))
            allowed, slack = NLL_FROM_PLAIN * wider, NLL_SLACK * wider
            apart = abs(self.nll_fast - self.nll_plain)
            fast, plain = abs(self.nll_fast - self.nll_float32), abs(self.nll_plain - self.nll_float32)
            if not apart <= allowed:
                found.append(f"NLL {apart:.4f} nats from plain 16 bits (limit {allowed:.4f})")
            if not fast <= (limit := NLL_RATIO * plain + slack):
                found.append(f"NLL {fast:.4f} nats from float32 (limit {limit:.4f}, plain 16 bits {plain:.4f})")
        if logits and not self.delta_logit_fast <= LOGIT_RATIO * self.delta_logit_plain:
            ratio = self.delta_logit_fast / self.delta_logit_plain if self.delta_logit_plain else math.inf
            found.append(f"logits {ratio:.2f} times as far from float32 as plain 16 bits' (limit {LOGIT_RATIO})")
        return found


class Percentile:
    """A percentile of very many distances: counted by the leading bits of their float32 patterns, so within 0.05 %."""

    BITS = 20  # sign, exponent and 11 bits of the mantissa; patterns of numbers of 0 and more are in their order

    def __init__(self) -> None:
        self._counts: torch.Tensor | int = 0

    def add(self, distances: torch.Tensor) -> None:
        """Distances of 0 and more, float32, any shape."""
        import torch

        patterns = distances.flatten().view(torch.int32) >> (32 - self.BITS)
        self._counts = self._counts + torch.bincount(patterns, minlength=1 << (self.BITS - 1))

    def value(self, share: float) -> float:
        """What `share` of the distances do not exceed; NaN where one that is not finite is among them."""
        import torch

        counts = self._counts.cumsum(0)
        total = int(counts[-1])
        bin_number = int(torch.searchsorted(counts, math.ceil(share * total)))
        infinity = 0x7F800000 >> (32 - self.BITS)
        if int(counts[infinity - 1]) < total:
            return math.nan
        return torch.tensor(bin_number << (32 - self.BITS), dtype=torch.int32).view(torch.float32).item()


class Comparison:
    """Adds up, over logits of the three paths for the same tokens, what a Finding states."""

    def __init__(self) -> None:
        self._nll = [0.0, 0.0, 0.0]
        self._distances = Percentile(), Percentile()
        self._tokens = 0

    def add(self, logits: Sequence[torch.Tensor], targets: torch.Tensor) -> None:
        """logits: float32's, plain's, fast's, each [R, V] float32; targets [R], the tokens that came next."""
        import torch.nn.functional as F

        for i, found in enumerate(logits):
            self._nll[i] += F.cross_entropy(found, targets, reduction="sum").item()
        for distances, found in zip(self._distances, logits[1:]):
            distances.add((found - logits[0]).abs())
        self._tokens += len(targets)

    def finding(self, part: str) -> Finding:
        means = [total / self._tokens for total in self._nll]
        return Finding(part, self._tokens, *means, *(d.value(LOGIT_SHARE) for d in self._distances))


# --- the parts -------------------------------------------------------------------------------------------------------
def prompt_part(paths: Paths, ids: Sequence[int], sizes: Sizes) -> Finding:
    """The text as one prompt; the fast path reads it in pieces, the later ones over the pages of the earlier."""
    hidden = [_plain_hidden(model, [ids[: sizes.prompt]]) for model in (paths.float32, paths.plain)]
    hidden.append(_prompt_in_pieces(paths, ids[: sizes.prompt]))
    targets = _tensor(ids[1 : sizes.prompt + 1], paths.fast)
    comparison = Comparison()
    for first in range(0, sizes.prompt, ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        models = paths.float32, paths.plain, paths.fast
        comparison.add([m.logits(h[rows]) for m, h in zip(models, hidden)], targets[rows])
    return comparison.finding(f"prompt of {sizes.prompt}")


def decode_part(paths: Paths, windows: Sequence[Sequence[int]], context: int) -> Finding:
    """Windows of equal length, one row each: `context` tokens are read, the others decoded together, each step given
    the text's own token; plain paths see each window whole."""
    steps = len(windows[0]) - context - 1
    hidden = [_decoded_rows(_plain_hidden(model, [w[:-1] for w in windows]), len(windows), steps)
              for model in (paths.float32, paths.plain)]  # fmt: skip
    comparison = Comparison()
    for step, fast in enumerate(_decodes(paths, windows, context)):
        targets = _tensor([window[context + step + 1] for window in windows], paths.fast)
        plain = [m.logits(h[step]) for m, h in zip((paths.float32, paths.plain), hidden)]
        comparison.add([*plain, fast], targets)
    return comparison.finding(f"{len(windows)} x {steps} decodes")


def _plain_hidden(model: Llama, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Final hidden states of every token [T, hidden size], each text whole and alone, nothing kept."""
    import torch

    from common.attention import Prefill

    parts = [model.forward(_tensor(text, model), Prefill(model, [len(text)])) for text in texts]
    return torch.cat(parts)


def _decoded_rows(hidden: torch.Tensor, num_rows: int, steps: int) -> torch.Tensor:
    """[rows * length, hidden size] -> the last `steps` positions, [steps, rows, hidden size]."""
    return hidden.unflatten(0, (num_rows, -1))[:, -steps:].transpose(0, 1)


def _prompt_in_pieces(paths: Paths, ids: Sequence[int]) -> torch.Tensor:
    """Hidden states [T, hidden size] as the engine computes a long prompt."""
    import torch

    engine, parts = paths.engine, []
    with _requests(engine, [ids], 1) as requests:
        for start in range(0, len(ids), PIECE):
            packed = engine.pack([_chunk(requests[0], min(PIECE, len(ids) - start))])
            parts.append(paths.fast.forward(packed.tokens, packed.attend))
        return torch.cat(parts)


def _decodes(paths: Paths, windows: Sequence[Sequence[int]], context: int) -> Iterator[torch.Tensor]:
    """Logits [rows, V] of each decode step of the engine, fed with the windows' own tokens."""
    engine, steps = paths.engine, len(windows[0]) - context - 1
    with _requests(engine, [window[:context] for window in windows], steps + 1) as requests:
        for request in requests:
            engine.launch([_chunk(request, context)]).tokens()
        for step in range(steps):
            engine.set_next_tokens(requests, _tensor([window[context + step] for window in windows], paths.fast))
            yield paths.fast.logits(engine.hidden_states([_chunk(request, 1) for request in requests]))


def _chunk(request: Any, length: int) -> Any:
    from common.serving import Chunk

    return Chunk(request, request.num_computed, length)


class _requests:
    """Requests of these prompts; whatever happens inside, they hold no pages afterwards."""

    def __init__(self, engine: Engine, prompts: Sequence[Sequence[int]], output_len: int) -> None:
        from common.serving import InputRequest, Request

        self._engine = engine
        self._requests = [Request(InputRequest("", output_len, prompt), i) for i, prompt in enumerate(prompts)]

    def __enter__(self) -> list[Any]:
        return self._requests

    def __exit__(self, *_: object) -> None:
        from common.timing import synchronize

        synchronize(self._engine.model.device)
        for request in self._requests:
            self._engine.release(request)


def _tensor(ids: Sequence[int], model: Llama) -> torch.Tensor:
    import torch

    return torch.tensor(list(ids), device=model.device)


# --- the command -----------------------------------------------------------------------------------------------------
def load_paths(args: Any, sizes: Sizes) -> tuple[Paths, list[int]]:
    """The three paths over `--model`, and the ids of the text."""
    from common import checkpoint
    from common.engine import Engine
    from common.kernels.runtime import Kernels
    from common.operations import with_kernels

    device = checkpoint.pick_device(args.device)
    auto = "bfloat16" if device.type == "cpu" else "auto"
    dtype = checkpoint.pick_dtype(auto if args.dtype == "auto" else args.dtype, device)
    fast, tokenizer = checkpoint.load(args.model, device=device, dtype=dtype, seed=args.seed)
    context = fast.config.max_position_embeddings
    if sizes.tokens > context:
        raise UserError(
            f"--model: the check reads {sizes.tokens} tokens, the model's context is {context}; use --quick or another"
        )
    float32, _ = checkpoint.load(args.model, device=device, dtype="float32", seed=args.seed, quiet=True)
    most_rows = max(rows for rows, _ in sizes.batches)
    engine = Engine(fast, backend=args.backend, num_pages=sizes.pages, max_requests=most_rows)
    print(f"fast path: {engine.backend.name} attention ({engine.backend.reason}), "
          f"{'decodes in CUDA graphs' if engine.graphs else 'no CUDA graphs here'}")  # fmt: skip
    plain = [with_kernels(model, Kernels.PLAIN, fused_weights=False) for model in (float32, fast)]
    return Paths(*plain, fast, engine), tokenizer.prompt_of_length(sizes.tokens)


def parts_of(paths: Paths, ids: Sequence[int], sizes: Sizes) -> list[tuple[Callable[[], Finding], bool, bool]]:
    """Each part, and whether its NLL and its logits are asked about: 64 tokens are too few for a mean."""
    alone = [ids[: sizes.context + sizes.steps + 1]]
    parts = [
        (lambda: prompt_part(paths, ids, sizes), True, False),
        (lambda: decode_part(paths, alone, sizes.context), False, True),
    ]
    for rows, steps in sizes.batches:
        starts = range(0, rows * steps, steps)
        windows = [ids[start : start + sizes.row_context + steps + 1] for start in starts]
        parts.append((partial(decode_part, paths, windows, sizes.row_context), True, True))
    return parts


def main(args: Any) -> None:
    import torch

    from common import results

    sizes = QUICK if args.quick else Sizes()
    out = cli.output_dir(args, __file__)
    paths, ids = load_paths(args, sizes)
    fast = paths.fast
    facts = {"model": fast.origin, "dtype": fast.dtype, "device": str(fast.device), "sizes": sizes}
    record = results.provenance(args, **facts, backend=paths.engine.backend.name, graphs=bool(paths.engine.graphs))
    failed = []
    with results.ResultFile(out, "fidelity", COLUMNS, record, key=("part",)) as file, torch.inference_mode():
        for measure, nll, logits in parts_of(paths, ids, sizes):
            finding = measure()
            problems = finding.problems(nll=nll, logits=logits)
            plain, ours = finding.delta_logit_plain, finding.delta_logit_fast
            ratio = ours / plain if plain else math.nan
            file.append(**vars(finding), delta_logit_ratio=ratio, problem="; ".join(problems) or "none")
            failed += [f"{finding.part}: {problem}" for problem in problems]
    cli.print_table(file.rows, COLUMNS)
    cli.print_written(file.path, file.json_path)
    if failed:
        raise CheckFailed("; ".join(failed))
    name = str(fast.dtype).removeprefix("torch.")
    print(f"the fast path in {name} is as near to float32 as plain torch in {name}"
          + (", as far as a small share of the text says." if args.quick else "."))  # fmt: skip


def build_parser():
    parser = cli.build_plot_parser(__doc__)
    parser.add_argument(
        "--model", metavar="SOURCE", help="as in the scripts: a folder, a hub id, embedded, random:SHAPE"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16"), default="auto", help="of the fast path")
    parser.add_argument("--backend", default="auto", help="attention: auto, torch, triton or flashinfer")
    parser.add_argument("--seed", type=int, default=0, help="of a random: model's weights (default: 0)")
    parser.add_argument("--quick", action="store_true", help="a small share of the text: seconds instead of minutes")
    return parser


if __name__ == "__main__":
    cli.run(main, build_parser())
