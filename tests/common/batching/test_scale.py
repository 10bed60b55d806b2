"""The sweeps over requests in flight and context: their points, their rates, and the simulation beside them."""

from types import SimpleNamespace

import pytest

from assignment4.Section1.chunked_main import CHUNKED, scheduler
from common import results
from common.batching import experiment, scale
from common.batching.files import ITERATION_COLUMNS, Files
from common.batching.setup import Setup, largest
from common.batching.step_loop import Iteration
from common.config import SHAPES
from common.errors import UserError
from common.serving import Work
from common.simulate import MACHINES, SimulatedEngine, StepModel

CONFIG = SHAPES["llama3-8b"]


def make_setup(tmp_path, *, num_pages=4000, overhead_s=300e-6, model=None):
    machine = MACHINES["h200"].__class__(**{**vars(MACHINES["h200"]), "overhead_s": overhead_s})
    steps = StepModel(machine, CONFIG)
    engine = SimulatedEngine(steps, num_pages=num_pages)
    ceiling = StepModel(MACHINES["h200"], CONFIG)
    return Setup(tmp_path, [engine], CONFIG, ceiling, {}, list, "bfloat16", "simulated", model=model)


def make_args(**more):
    args = dict(batch_sizes=[1, 4, 16], kv_lens=[512, 4096], scale_prompt=128, scale_output=64, scale_in_flight=4)
    args |= dict(scale_budget=1024, token_batch_size=256, req_batch_size=4, seed=0, repeats=1, slo_ttft=None)
    return SimpleNamespace(**{**args, "slo_tpot": None, "simulate": None, "load": None, **more})


def measure(args, setup, tmp_path, iterations_csv):
    file = results.ResultFile(tmp_path, "scale", scale.COLUMNS, {}, key=scale.KEY)
    policy = lambda budget, at_once: scheduler(CHUNKED, budget, at_once)  # noqa: E731
    scale.measure(args, setup, scale.points(args, setup), policy, file, iterations_csv)
    file.close()
    return file.rows


def test_points_cover_both_sweeps_and_hold_what_their_names_say(tmp_path):
    rows = measure(make_args(), make_setup(tmp_path), tmp_path, None)
    assert [(r["sweep"], r["in_flight"], r["context"]) for r in rows] == [
        ("in flight", 1, 192), ("in flight", 4, 192), ("in flight", 16, 192), ("context", 4, 512), ("context", 4, 4096),
    ]  # fmt: skip
    assert [r["prompt_tokens"] for r in rows] == [128, 512, 2048, 4 * 448, 4 * 4032]
    assert all(r["output_tokens"] == 64 * r["in_flight"] for r in rows)
    in_flight = [r["decode_tokens_per_s"] for r in rows[:3]]
    assert in_flight[1] > 3.5 * in_flight[0] and in_flight[2] > 3 * in_flight[1]  # bound by the weights' bytes
    assert rows[4]["decode_tokens_per_s"] < rows[3]["decode_tokens_per_s"]  # K and V of 4,096 tokens are read
    assert all(r["simulated_tokens_per_s"] is None for r in rows)


def test_a_simulation_fitted_to_another_run_of_the_same_machine_meets_it(tmp_path):
    """The machine's overhead is not what the model assumes: the fit has to find it, from another set of requests."""
    setup, args = make_setup(tmp_path, overhead_s=2.5e-3), make_args()
    files = Files(tmp_path, "chunked", "", {}, resume=False, compare=False)
    given = scale.alike(5, 300, 30, CONFIG.vocab_size, 1)
    files.write(experiment.serve(scheduler(CHUNKED, 64, 4), setup, given, args))
    for row in measure(args, setup, tmp_path, files.iterations.path):
        for name in scale.RATES:
            assert row[f"simulated_{name}"] == pytest.approx(row[name], rel=1e-3)
    assert set(ITERATION_COLUMNS) <= set(results.read_rows(files.iterations.path, ())[0])


def test_what_the_pool_cannot_hold_is_left_out_or_refused_when_typed(tmp_path, capsys):
    setup = make_setup(tmp_path, num_pages=120)  # 12 pages a short request; 4 of 480 tokens
    rows = measure(make_args(kv_lens=[256, 512]), setup, tmp_path, None)
    assert {(r["sweep"], r["in_flight"]) for r in rows} == {("in flight", 1), ("in flight", 4), ("context", 4)}
    assert "16 left out" in capsys.readouterr().out
    setup.typed = {"batch_sizes"}
    with pytest.raises(UserError, match="16 is above requests that the pool of pages holds: 10"):
        measure(make_args(), setup, tmp_path, None)
    with pytest.raises(UserError, match="--kv-lens: 64 tokens hold no prompt beside 64"):
        measure(make_args(batch_sizes=[1], kv_lens=[64]), make_setup(tmp_path), tmp_path, None)


def test_rates_by_hand():
    def step(time_us, running, **work):
        return Iteration(0.0, time_us, Work(**work), running, 0, 0)

    steps = [
        step(2e6, 2, prefill_tokens=100, sampled_tokens=1),
        step(1e6, 2, prefill_tokens=50, decode_tokens=1),  # mixed: prompt tokens, not a decode step
        step(0.5e6, 2, decode_tokens=2),
        step(1.5e6, 2, decode_tokens=2),
        step(0.1e6, 1, decode_tokens=1),  # not full any more
    ]
    assert scale.step_rates(steps) == {"decode_tokens_per_s": 2.0, "prefill_tokens_per_s": 50.0}
    assert scale.step_rates([]) == {"decode_tokens_per_s": None, "prefill_tokens_per_s": None}


def test_words_compare_the_ends_of_each_sweep():
    rows = [
        {"sweep": "in flight", "in_flight": n, "context": 9, "decode_tokens_per_s": rate}
        for n, rate in ((1, 5.0), (8, 30.0))
    ] + [
        {"sweep": "context", "in_flight": 2, "context": n, "decode_tokens_per_s": r} for n, r in ((10, 8.0), (99, 2.0))
    ]
    text = scale.in_words(rows)
    assert (
        "8 requests in flight decode 30 tokens/s, 6 times as many as 1" in text
        and "25% of what they do with 10" in text
    )
    assert "needed" in scale.in_words(rows[:1])


def test_the_largest_step_counts_every_sweep():
    args = SimpleNamespace(token_batch_size=512, budgets=[32, 4096], scale_budget=None)
    assert largest(args, "token_batch_size", "budgets", "scale_budget", "absent") == 4096
    assert largest(args, "absent") == 0
