"""vLLM's offline `LLM.generate` on a job that another process wrote: the far side of `common.batching.peers`.

python -m common.batching.vllm_peer JOB.json OUT.json [MAX_NUM_BATCHED_TOKENS]
"""

import json
import sys
import time
from pathlib import Path


def main(job_path: str, out_path: str, batched_tokens: str = "") -> None:
    import vllm

    job = json.loads(Path(job_path).read_text())
    options = {"max_num_batched_tokens": int(batched_tokens)} if batched_tokens else {}
    llm = vllm.LLM(
        model=job["model"],
        load_format=job["load_format"],
        dtype=job["dtype"],
        max_model_len=job["max_model_len"],
        skip_tokenizer_init=True,
        disable_log_stats=False,  # without statistics a request has no times
        **options,
    )
    prompts = [{"prompt_token_ids": ids} for ids, _ in job["requests"]]

    def params(output_len: int):
        return vllm.SamplingParams(
            temperature=0.0, max_tokens=output_len, ignore_eos=job["ignore_eos"], detokenize=False
        )

    # Other ids than those that are timed, which its prefix cache would know.
    warmup = [{"prompt_token_ids": ids[::-1]} for ids, _ in job["requests"][:2]]
    llm.generate(warmup, [params(4)] * len(warmup), use_tqdm=False)
    start, start_monotonic = time.time(), time.monotonic()
    outputs = llm.generate(prompts, [params(n) for _, n in job["requests"]], use_tqdm=False)
    end = time.time() - start
    rows = []
    for output in outputs:
        metrics = output.metrics
        # vllm.v1.metrics.stats.RequestStateStats: the engine's stamps are of the monotonic clock. 0.0: never stamped.
        first = getattr(metrics, "first_token_ts", None)
        last = getattr(metrics, "last_token_ts", None)
        rows.append(
            {
                "tokens": list(output.outputs[0].token_ids),
                "first_s": first - start_monotonic if first else None,
                "last_s": last - start_monotonic if last else end,
            }
        )
    Path(out_path).write_text(json.dumps({"version": f"vllm {vllm.__version__}", "time_s": end, "rows": rows}))


if __name__ == "__main__":
    main(*sys.argv[1:])
