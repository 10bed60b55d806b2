"""How fast is prefill attention, and how far from what the machine's matrix products allow?

One layer's causal attention at the head counts of LLaMA2-7B, LLaMA3-8B and LLaMA3-70B, in every implementation that is
installed: torch's, flash-attn's, FlashInfer's and our own Triton kernel. Prefill does S²/2 dot products of length d for
every head, forward and for the values again: 4 · B · S² · Hq · d / 2 operations. The more of them there are for each
byte read, the closer it should come to the speed of a large matrix product.

Method: each output is compared with a float64 or float32 reference before it is timed; the implementations are timed in
turn (in CUDA graphs over distinct inputs on a GPU), median with p10 and p90; a figure above 105 % of the measured
product is measured again with the product, and marked if it stays.
Output: results/attention_performance_{seq,batch}.{csv,json,png}; attention_roofline.png, with decode's points if
flashattention_decode.py has run.

    python assignment3/section2/flashattention_single_layer.py
    python assignment3/section2/flashattention_single_layer.py --config llama3-8b --seq-lens 2^7..2^13
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import cli
from common.attention_bench import options as attention_options

COLUMNS = ("config", "backend", "seq_len", "batch", "time_us", "tflops", "percent_of_peak")
POWERS = [2**e for e in range(15)]
PRESETS = {
    # seq_len and batch_size are what the other sweep holds fixed
    "quick": {"seq_lens": [32, 64], "batch_size": 1, "batch_sizes": [1, 2], "seq_len": 32, "repeats": 2},
    "laptop": {"seq_lens": POWERS[6:10], "batch_size": 1, "batch_sizes": POWERS[:3], "seq_len": 128, "repeats": 3},
    "course": {"seq_lens": POWERS[7:15], "batch_size": 1, "batch_sizes": POWERS[:7], "seq_len": 1024, "repeats": 10},
}


def main(args):
    from common.attention_bench import measure as attention_bench
    from common.attention_bench import sweep as attention_sweep
    from common.attention_bench.backends.base import PrefillCase

    bench = attention_bench.prepare(args, __file__, PRESETS, "prefill")

    def make_case(heads, point):
        lengths = (point["seq_len"],) * point["batch"]
        return PrefillCase(heads, lengths, lengths, bench.dtype, bench.device)

    by_length = attention_sweep.Sweep(
        "attention_performance_seq",
        "seq_len",
        [{"seq_len": seq_len, "batch": args.batch_size} for seq_len in args.seq_lens],
        "--seq-lens",
        f"How fast is prefill attention as the prompt grows? (batch {args.batch_size})",
        "tokens of the prompt",
    )
    by_batch = attention_sweep.Sweep(
        "attention_performance_batch",
        "batch",
        [{"seq_len": args.seq_len, "batch": batch} for batch in args.batch_sizes],
        "--batch-sizes",
        f"How fast is prefill attention as more prompts come together? ({args.seq_len} tokens each)",
        "prompts in the batch",
    )
    attention_sweep.run(bench, [by_length, by_batch], COLUMNS, make_case, "tflops")


if __name__ == "__main__":
    parser = cli.build_parser(
        __doc__,
        model=False,
        sweeps={
            "--seq-lens": "prompt lengths of the first sweep",
            "--batch-sizes": "batches of the second sweep",
            "--seq-len": "prompt length of the second sweep",
            "--batch-size": "batch of the first sweep",
        },
    )
    attention_options.add_options(parser, "prefill")
    cli.run(main, parser)
