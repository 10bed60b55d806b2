"""How fast is decode attention over a KV cache, and how far from the speed of reading memory?

One new token a sequence attends to all tokens before it. Every K and V is read once and used for a single dot product a
query head, so decode waits for memory: 2 · B · c · Hkv · d elements must be read, whatever the implementation does.
Grouped query heads (LLaMA3: 4 or 8 of them share one K/V head) make that four or eight times less than Hq would say.

Method: K and V lie in pages in random order, as in a serving engine (torch's implementations know no pages and get each
sequence in one piece: their page_size is empty). Each output is compared with a float64 or float32 reference before it
is timed; the implementations are timed in turn (in CUDA graphs over distinct inputs on a GPU), median with p10 and p90;
a figure above 105 % of the measured read speed is measured again with it, and marked if it stays. --ragged draws each
length between half and one and a half times the context, with a fixed seed; the bytes are those of the real tokens.
Output: results/decode_performance_{seq,batch,pagesize}.{csv,json,png}; attention_roofline.png, with prefill's points if
flashattention_single_layer.py has run.

    python assignment3/section2/flashattention_decode.py
    python assignment3/section2/flashattention_decode.py --config llama3-8b --ragged --kv-lens 2^7..2^12
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import cli
from common.attention_bench import options as attention_options

COLUMNS = ("config", "backend", "kv_len", "batch", "page_size", "time_us", "gb_per_s", "percent_of_peak")
POWERS = [2**e for e in range(16)]
PRESETS = {
    # kv_len, batch_size and page_size are what the other sweeps hold fixed
    "quick": {"kv_lens": [64, 128], "batch_sizes": [1, 2], "page_sizes": [1, 16], "repeats": 2}
    | {"kv_len": 64, "batch_size": 1, "page_size": 16},
    "laptop": {"kv_lens": POWERS[7:12], "batch_sizes": POWERS[:4], "page_sizes": POWERS[:5], "repeats": 3}
    | {"kv_len": 256, "batch_size": 2, "page_size": 16},
    # beyond 16, where flash-attn 2's own package (multiples of 256) has a page size too
    "course": {"kv_lens": POWERS[7:16], "batch_sizes": POWERS[:9], "page_sizes": [*POWERS[:5], 64, 256], "repeats": 10}
    | {"kv_len": 4096, "batch_size": 16, "page_size": 16},
}


def lengths(kv_len, batch, ragged, seed):
    """Tokens of each sequence's cache: all kv_len, or drawn from U[kv_len/2, 3 kv_len/2] with a fixed seed."""
    if not ragged:
        return (kv_len,) * batch
    rng = random.Random(f"{seed} {kv_len} {batch}")
    return tuple(rng.randint(max(1, kv_len // 2), kv_len * 3 // 2) for _ in range(batch))


def main(args):
    from common.attention_bench import measure as attention_bench
    from common.attention_bench import sweep as attention_sweep
    from common.attention_bench.backends.base import DecodeCase

    bench = attention_bench.prepare(args, __file__, PRESETS, "decode")

    def make_case(heads, point):
        kv_lens = lengths(point["kv_len"], point["batch"], args.ragged, args.seed)
        return DecodeCase(heads, kv_lens, point["page_size"], bench.dtype, bench.device)

    fixed = {"kv_len": args.kv_len, "batch": args.batch_size, "page_size": args.page_size}
    context = f"{'about ' if args.ragged else ''}{args.kv_len} tokens each"
    by_length = attention_sweep.Sweep(
        "decode_performance_seq",
        "kv_len",
        [fixed | {"kv_len": kv_len} for kv_len in args.kv_lens],
        "--kv-lens",
        f"How fast is decode attention as the context grows? (batch {args.batch_size}{', ragged' * args.ragged})",
        "tokens in a sequence's cache",
    )
    by_batch = attention_sweep.Sweep(
        "decode_performance_batch",
        "batch",
        [fixed | {"batch": batch} for batch in args.batch_sizes],
        "--batch-sizes",
        f"How fast is decode attention as the batch grows? ({context})",
        "sequences in the batch",
    )
    by_page_size = attention_sweep.Sweep(
        "decode_performance_pagesize",
        "page_size",
        [fixed | {"page_size": page_size} for page_size in args.page_sizes],
        "--page-sizes",
        f"What does the page size do to decode attention? (batch {args.batch_size}, {context})",
        "tokens in a page",
    )
    attention_sweep.run(bench, [by_length, by_batch, by_page_size], COLUMNS, make_case, "gb_per_s")


if __name__ == "__main__":
    parser = cli.build_parser(
        __doc__,
        model=False,
        sweeps={
            "--kv-lens": "contexts of the first sweep",
            "--batch-sizes": "batches of the second sweep",
            "--page-sizes": "page sizes of the third sweep",
            "--kv-len": "context of the second and third sweep",
            "--batch-size": "batch of the first and third sweep",
            "--page-size": "page size of the first and second sweep",
        },
    )
    parser.add_argument("--ragged", action="store_true", help="sequences of unequal length")
    attention_options.add_options(parser, "decode")
    cli.run(main, parser)
