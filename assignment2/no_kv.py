"""What does generation cost without a KV cache?

To get one more token, this decoder runs over the whole sequence again: the prompt and everything it has said so far.
The work of a token grows with the length of the text, so the time of n tokens grows with n squared. single_batch.py
does the same with a cache; graph1.py draws both.

Method: one prompt, greedy, exactly as many tokens as asked (end-of-text is ignored). One generation passes through all
the shorter lengths, so each repeat reads its clock at every length; --separate times every length on its own.
Output: results/no_kv_times.csv (output_length, time, time_p10, time_p90, tokens_per_s) and .json, its
provenance; time_comparison.png.

    python assignment2/no_kv.py
    python assignment2/no_kv.py --prompt "What is the capital of France?"
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli

NAME = "no_kv_times"
COLUMNS = ("output_length", "time", "time_p10", "time_p90", "tokens_per_s")
PRESETS = {
    "quick": {"input_length": 16, "output_lengths": [2, 4, 8], "repeats": 1},
    "laptop": {"input_length": 64, "output_lengths": [16, 32, 48, 64], "repeats": 3},
    "course": {"input_length": 1024, "output_lengths": range(128, 2049, 128), "repeats": 3},
}


def generate(model, prompt, stop, times):
    """Greedy tokens after `prompt` (ids), every step a full forward pass over all tokens so far."""
    import torch

    from common.attention import Prefill

    tokens, outputs = list(prompt), []
    times.start()
    while stop.finish_reason(outputs) is None:
        ids = torch.tensor(tokens, device=model.device)  # [T]: one longer at every step
        last = torch.tensor([len(tokens) - 1], device=model.device)
        hidden = model.forward(ids, Prefill(model, [len(tokens)]), rows=last)  # nothing is kept for the next step
        token = int(model.logits(hidden).argmax(-1))
        tokens.append(token)
        outputs.append(token)
        times.step()
    return outputs


def main(args):
    from graph1 import draw

    from common.scripts import experiment, text_run
    from common.scripts.length_sweep import measure_lengths

    prompts = cli.typed_prompts(args)
    exp = experiment.prepare(args, __file__, PRESETS)
    if prompts is not None:

        def one_by_one(ids, stop, times):
            return [generate(exp.model, prompt, stop, times) for prompt in ids]

        return text_run.answer(exp, prompts, max(args.output_lengths), one_by_one)

    sweep = measure_lengths(exp, NAME, COLUMNS, generate)
    rows = sweep.rows()
    cli.print_table(rows, COLUMNS)
    first, last = rows[0], rows[-1]
    print(
        f"without a cache, {last['output_length']} tokens after a prompt of {args.input_length} took "
        f"{last['time']:.2f} s; {last['output_length'] / first['output_length']:.3g} times the tokens of the shortest "
        f"run cost {last['time'] / first['time']:.3g} times its time."
    )
    cli.print_written(sweep.file.path, sweep.file.json_path)
    if not args.no_plot:
        cli.print_written(draw(exp.out))


if __name__ == "__main__":
    parser = cli.build_parser(
        __doc__, sweeps={"--output-lengths": "tokens to generate", "--input-length": "prompt tokens"}, text=True
    )
    parser.add_argument("--separate", action="store_true", help="time each length with a generation of its own")
    cli.run(main, parser)
