"""How long does a decode step take on one device, and how much memory? The reference for transformer-tp2.py.

Every step reads all weights once. transformer-tp2.py spreads them over several devices; this is what it is compared
with, logits, tokens and microseconds.

Method: prompts of --input-length tokens, decoded together; with n1,n2 = --output-lengths, a step is (time of n2 tokens
- time of n1 tokens) / (n2 - n1), so that reading the prompt drops out; median, p10 and p90 over --repeats. On a GPU the
steps are CUDA graphs. Output: results/transformer_w3l1.csv (world, batch_size, time_us, tokens_per_s, allreduce_share,
memory_bytes, bytes_read, ...) and .json, which also holds the tokens; transformer_w3l1_logits.safetensors: the logits
of a few rows and positions, for transformer-tp2.py to compare with. With --prompt it answers instead.

    python assignment4/Section2/transformer-w3l1.py
    python assignment4/Section2/transformer-w3l1.py --prompt "What is the capital of France?"
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import cli

NAME = "transformer_w3l1"


def main(args):
    from common import checkpoint
    from common.results import ResultFile
    from common.scripts import text_run
    from common.tensor_parallel import check
    from common.tensor_parallel import experiment as tp_experiment

    out = cli.output_dir(args, __file__)
    loaded = tp_experiment.prepare(args, out, checkpoint.pick_device(args.device))
    exp = loaded.exp
    if (prompts := cli.typed_prompts(args)) is not None:
        return text_run.answer(exp, prompts, max(args.output_lengths), tp_experiment.one_by_one(exp))
    n1, n2 = tp_experiment.n1_n2(exp)
    record = loaded.provenance(prompt_length=args.input_length, n1=n1, n2=n2)
    earlier = check.read_reference(out, record) if args.resume else check.Reference()
    columns, key, tokens, saved = tp_experiment.COLUMNS, ["world", "batch_size"], {}, earlier.saved
    with ResultFile(out, NAME, columns, record, key=key, resume=args.resume) as file:
        with cli.keep_partial(args):
            tp_experiment.measure(loaded, file, tokens, saved.look)
        file.close(output_token_ids=earlier.tokens | tokens)
    if not file.rows:
        raise KeyboardInterrupt
    tp_experiment.dump_tokens(exp, tokens)
    cli.print_table(file.rows, file.columns)
    print(conclusion(loaded, file.rows))
    cli.print_written(file.path, file.json_path)
    if tokens:
        cli.print_written(check.save_logits(out, record, saved))


def conclusion(loaded, rows):
    """The step at the smallest batch against the time that reading its weights and cache would take."""
    from common.memory import human_bytes

    exp, rows = loaded.exp, sorted(rows, key=lambda row: row["batch_size"])  # --resume appends what was missing
    first, last = rows[0], rows[-1]
    context = exp.args.input_length + sum(exp.args.output_lengths) / 2
    floor_us = 1e6 * exp.floor_s(first["batch_size"] * context)
    speeds = [cli.format_value(row["tokens_per_s"]) for row in (first, last)]
    return (
        f"a step of batch {first['batch_size']} took {first['time_us'] / 1e3:.3g} ms ({speeds[0]} tokens/s), "
        f"{floor_us / first['time_us']:.0%} of the memory bandwidth; batch {last['batch_size']} gave "
        f"{speeds[1]} tokens/s. Memory taken: {human_bytes(last['memory_bytes'])}, "
        f"{human_bytes(last['bytes_read'])} read from the checkpoint."
    )


if __name__ == "__main__":
    from common.tensor_parallel.options import SWEEPS

    cli.run(main, cli.build_parser(__doc__, sweeps=SWEEPS, text=True))
