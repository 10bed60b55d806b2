"""How much faster are many prompts together, when their lengths differ?

The usual answer is to pad every prompt to the longest and to compute the padding too. Here the prompts' tokens are
packed one after another with nothing between them, each attends over itself alone, and a decode step runs over one
token a row. No work is done that a single prompt would not need. uniform_prefill.py has equal lengths; graph2.py draws
both.

Method: batch sizes 1, 2, 4, ...; prompt lengths drawn from U[n/2, 3n/2] with n = --input-length and a fixed seed,
--output-lengths tokens out, greedy, end-of-text ignored. First a small batch is checked row by row against each prompt
alone. --padded also measures the padded way, --compare hf Hugging Face's generate (which pads), in turn.
Output: results/different_prefill.csv (batch_size, time, ..., tokens_per_s), .json, and prefill_comparison.png.

    python assignment2/different_prefill.py --padded
    python assignment2/different_prefill.py --prompts FILE
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli

NAME = "different_prefill"
PRESETS = {
    "quick": {"input_length": 16, "output_lengths": [4], "batch_sizes": [1, 2, 4], "repeats": 1},
    "laptop": {"input_length": 64, "output_lengths": [16], "batch_sizes": [1, 2, 4, 8, 16], "repeats": 3},
    "course": {"input_length": 512, "output_lengths": [128], "batch_sizes": [2**i for i in range(7)], "repeats": 5},
}


def generate(model, prompts, stop, times):
    """Greedy tokens after each of `prompts`, of any lengths: one pass over all tokens, then one a row and step."""
    import torch

    from common.attention import Decode, Prefill
    from common.kv_cache import ContiguousKVCache

    lengths = [len(prompt) for prompt in prompts]
    room = max(lengths) + stop.output_len
    cache = ContiguousKVCache(model.config, len(prompts), room, dtype=model.dtype, device=model.device)
    outputs, active = [[] for _ in prompts], list(range(len(prompts)))
    times.start()
    packed = torch.tensor([token for prompt in prompts for token in prompt], device=model.device)  # [sum of lengths]
    last = torch.tensor(lengths, device=model.device).cumsum(0) - 1  # the last token of each row
    hidden = model.forward(packed, Prefill(model, lengths, cache), rows=last)
    while True:
        next_ids = model.logits(hidden).argmax(-1)  # [number of active rows]
        for row, token in zip(active, next_ids.tolist()):
            outputs[row].append(token)
        times.step()
        going_on = [i for i, row in enumerate(active) if stop.finish_reason(outputs[row]) is None]
        if not going_on:
            return outputs
        active = [active[i] for i in going_on]
        hidden = model.forward(next_ids[going_on], Decode(model, cache, active))


def draw_lengths(count, mean, seed):
    """`count` prompt lengths from U[mean / 2, 3 mean / 2], the same for every run of a seed."""
    rng = random.Random(seed)
    return [rng.randint(max(1, mean // 2), max(1, mean + mean // 2)) for _ in range(count)]


def main(args):
    from graph2 import draw

    from common.padded import generate_padded
    from common.scripts import batch_sweep, experiment, text_run

    typed_prompts = cli.typed_prompts(args)
    exp = experiment.prepare(args, __file__, PRESETS)
    if typed_prompts is not None:

        def run(ids, stop, times):
            return generate(exp.model, ids, stop, times)

        return text_run.answer(exp, typed_prompts, batch_sweep.output_length(exp), run)

    lengths = draw_lengths(max(args.batch_sizes), args.input_length, args.seed)
    sizes = batch_sweep.batches_that_fit(exp, max(lengths))
    prompts = [exp.tokenizer.prompt_of_length(n, 97 * row) for row, n in enumerate(lengths)]
    print(batch_sweep.check_rows_alone(exp, generate, prompts[: min(4, max(sizes))]))
    variants = {"padded": generate_padded} if args.padded else {}
    sweep = batch_sweep.measure_batches(exp, NAME, {n: prompts[:n] for n in sizes}, generate, variants)
    cli.print_table(sweep.file.rows, sweep.file.columns)
    print(batch_sweep.conclusion(sweep))
    cli.print_written(sweep.file.path, sweep.file.json_path)
    if not args.no_plot:
        cli.print_written(draw(exp.out))


if __name__ == "__main__":
    parser = cli.build_parser(
        __doc__,
        sweeps={
            "--batch-sizes": "prompts in one batch",
            "--input-length": "mean tokens of a prompt",
            "--output-lengths": "tokens to generate for each (one length)",
        },
        text=True,
        compare=("hf",),
    )
    parser.add_argument("--padded", action="store_true", help="also measure the padded way")
    cli.run(main, parser)
