"""How much faster are many prompts together, when all have the same length?

Reading the weights is most of the cost of a decode step, and a step for many rows reads them once. So a batch is almost
free until the arithmetic catches up. Here all prompts are equally long, and the batch is a rectangle;
different_prefill.py has prompts of unequal lengths, and graph2.py draws both.

Method: batch sizes 1, 2, 4, ...; prompts of --input-length tokens, --output-lengths tokens out, greedy, end-of-text
ignored. First a small batch is checked row by row against each prompt alone. --padded also measures the padded form of
the loop (for equal lengths it should cost nothing), --compare hf Hugging Face's generate, in turn. Output:
results/uniform_prefill.csv (batch_size, time, ..., tokens_per_s), .json, and prefill_comparison.png.

    python assignment2/uniform_prefill.py
    python assignment2/uniform_prefill.py --batch-sizes 1,8 --compare hf
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli

NAME = "uniform_prefill"
PRESETS = {
    "quick": {"input_length": 16, "output_lengths": [4], "batch_sizes": [1, 2, 4], "repeats": 1},
    "laptop": {"input_length": 64, "output_lengths": [16], "batch_sizes": [1, 2, 4, 8, 16], "repeats": 3},
    "course": {"input_length": 512, "output_lengths": [128], "batch_sizes": [2**i for i in range(7)], "repeats": 5},
}


def generate(model, prompts, stop, times):
    """Greedy tokens after each of `prompts`, B rows of S ids: one pass over all B * S tokens, then B tokens a step."""
    import torch

    from common.attention import Decode, Prefill
    from common.kv_cache import ContiguousKVCache

    ids = torch.tensor(prompts, device=model.device)  # [B, S]
    batch_size, length = ids.shape
    cache = ContiguousKVCache(
        model.config, batch_size, length + stop.output_len, dtype=model.dtype, device=model.device
    )
    outputs, active = [[] for _ in prompts], list(range(batch_size))
    times.start()
    last = torch.arange(1, batch_size + 1, device=model.device) * length - 1  # the last token of each row
    hidden = model.forward(ids.flatten(), Prefill(model, [length] * batch_size, cache), rows=last)
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


def main(args):
    from graph2 import draw

    from common.padded import generate_padded
    from common.scripts import batch_sweep, experiment, text_run

    typed_prompts = cli.typed_prompts(args)
    exp = experiment.prepare(args, __file__, PRESETS)
    if typed_prompts is not None:
        return text_run.answer(exp, typed_prompts, batch_sweep.output_length(exp), each_length_together(exp.model))

    sizes = batch_sweep.batches_that_fit(exp, args.input_length)
    batches = {n: [exp.tokenizer.prompt_of_length(args.input_length, 97 * row) for row in range(n)] for n in sizes}
    print(batch_sweep.check_rows_alone(exp, generate, batches[max(sizes)][:4]))
    variants = {"padded": generate_padded} if args.padded else {}
    sweep = batch_sweep.measure_batches(exp, NAME, batches, generate, variants)
    cli.print_table(sweep.file.rows, sweep.file.columns)
    print(batch_sweep.conclusion(sweep))
    cli.print_written(sweep.file.path, sweep.file.json_path)
    if not args.no_plot:
        cli.print_written(draw(exp.out))


def each_length_together(model):
    """Typed prompts are seldom equally long: those that are go as one batch, the others in batches of their own."""

    def run(prompts, stop, times):
        outputs = {}
        for length in sorted({len(prompt) for prompt in prompts}):
            rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
            outputs |= dict(zip(rows, generate(model, [prompts[i] for i in rows], stop, times)))
        return [outputs[i] for i in range(len(prompts))]

    return run


if __name__ == "__main__":
    parser = cli.build_parser(
        __doc__,
        sweeps={
            "--batch-sizes": "prompts in one batch",
            "--input-length": "tokens of each prompt",
            "--output-lengths": "tokens to generate for each (one length)",
        },
        text=True,
        compare=("hf",),
    )
    parser.add_argument("--padded", action="store_true", help="also measure the padded form")
    cli.run(main, parser)
