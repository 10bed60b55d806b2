"""What does a KV cache buy?

The keys and values of earlier tokens never change, so they are computed once and kept. After the prompt has been read,
each step runs over one token only: its cost is reading the weights (and the cache), not recomputing the text. no_kv.py
is the same generation without the cache; graph1.py draws both.

Method: the same prompt and lengths as no_kv.py, greedy, exactly as many tokens as asked. If no_kv_times.json is there,
the tokens are compared with its tokens. --compare hf measures Hugging Face's generate on the same weights in turn.
Output: results/single_batch_times.csv (no_kv's columns, prefill_time) and .json; time_comparison.png.

    python assignment2/single_batch.py
    python assignment2/single_batch.py --compare hf
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli

NAME = "single_batch_times"
COLUMNS = ("output_length", "time", "time_p10", "time_p90", "tokens_per_s", "prefill_time")
PRESETS = {
    "quick": {"input_length": 16, "output_lengths": [2, 4, 8], "repeats": 1},
    "laptop": {"input_length": 64, "output_lengths": [16, 32, 48, 64], "repeats": 5},
    "course": {"input_length": 1024, "output_lengths": range(128, 2049, 128), "repeats": 5},
}


def generate(model, prompt, stop, times):
    """Greedy tokens after `prompt` (ids): one pass over the prompt, then one token a step."""
    import torch

    from common.attention import Decode, Prefill
    from common.kv_cache import ContiguousKVCache

    cache = ContiguousKVCache(model.config, 1, len(prompt) + stop.output_len, dtype=model.dtype, device=model.device)
    outputs = []
    times.start()
    ids, last = torch.tensor(prompt, device=model.device), torch.tensor([len(prompt) - 1], device=model.device)
    hidden = model.forward(ids, Prefill(model, [len(prompt)], cache), rows=last)  # keeps K and V of the prompt
    while True:
        next_id = model.logits(hidden).argmax(-1)  # [1]
        outputs.append(int(next_id))
        times.step()
        if stop.finish_reason(outputs) is not None:
            return outputs
        hidden = model.forward(next_id, Decode(model, cache))  # one token; its K and V join the cache


def check_against_no_kv(exp, sweep):
    """Compare with the tokens that no_kv.py wrote, where it ran on the same model and prompt. Returns a sentence."""
    from common.equality import require_equal
    from common.results import read_json

    other = read_json(exp.out / "no_kv_times.json") or {}
    ours = sweep.tokens.get("ours", [])
    if not ours or not other.get("output_token_ids"):
        return "no tokens of no_kv.py to compare with; run it first for the check"
    mine = exp.provenance(prompt_token_ids=sweep.prompt)
    for field in ("model", "dtype", "device", "prompt_token_ids"):
        if other.get(field) != mine[field]:
            return f"no_kv.py's tokens are not compared: its {field} was another"
    count = min(len(ours), len(other["output_token_ids"]))  # one of the two may have gone on for longer
    expected, got = other["output_token_ids"][:count], ours[:count]
    return require_equal(exp.model, [sweep.prompt], [expected], [got], f"{count} tokens against no_kv.py")


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
    cli.print_table(sweep.file.rows, sweep.file.columns)
    print(check_against_no_kv(exp, sweep))
    print(conclusion(exp, sweep))
    cli.print_written(sweep.file.path, sweep.file.json_path)
    if not args.no_plot:
        cli.print_written(draw(exp.out))


def conclusion(exp, sweep):
    """What the rows say, in words: decoding speed, the share of the memory bandwidth, and the peer."""
    last = sweep.rows()[-1]
    text = f"with the cache, {last['output_length']} tokens took {last['time']:.2f} s"
    if last["output_length"] > 1:
        speed = cli.format_value(exp.ceilings.memory_gb_per_s())
        step = (last["time"] - last["prefill_time"]) / (last["output_length"] - 1)
        floor = exp.floor_s(exp.args.input_length + last["output_length"] / 2)
        text += (
            f": {step * 1e3:.3g} ms a token after the first. Reading the weights and the cache once at the measured "
            f"{speed} GB/s would take {floor * 1e3:.3g} ms ({floor / step:.0%} of the "
            "bandwidth is used)"
        )
    for peer in sweep.rows("hf"):
        if peer.get("engine") == "hf" and peer["output_length"] == last["output_length"]:
            text += f". Hugging Face took {peer['time']:.2f} s: {peer['time'] / last['time']:.2f} times as long"
    return text + "."


if __name__ == "__main__":
    parser = cli.build_parser(
        __doc__,
        sweeps={"--output-lengths": "tokens to generate", "--input-length": "prompt tokens"},
        text=True,
        compare=("hf",),
    )
    parser.add_argument("--separate", action="store_true", help="time each length with a generation of its own")
    cli.run(main, parser)
