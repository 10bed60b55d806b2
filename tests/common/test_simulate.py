"""The simulator's formulas against counts made another way, its clock, and its router."""

import json
import random
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from assignment4.Section1.chunked_scheduler import Scheduler as ChunkedScheduler
from assignment4.Section1.continous_scheduler import Scheduler
from common import simulate
from common.batching import request_sets
from common.config import SHAPES
from common.errors import UserError
from common.serving import Chunk, InputRequest, Request, Work

ROOT = Path(__file__).resolve().parents[2]
TINY = SHAPES["tiny"]
# Round numbers: 1 GB/s and 1 TFLOP/s, so that bytes and operations can be read off the result.
PLAIN = simulate.Machine("plain", 1.0, 1.0, "float32", 1.0, 0.0)


def linear_shapes(c):
    """(in, out) of every linear of a layer, from the architecture and not from the config's own sums."""
    kv = c.num_key_value_heads * c.head_dim
    q = c.num_attention_heads * c.head_dim
    d, f = c.hidden_size, c.intermediate_size
    return [(d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d)]


@pytest.mark.parametrize("shape", ["tiny", "llama3-8b", "smollm2-135m"])
def test_ceiling_of_a_decode_counts_weights_and_kv_once(shape):
    c = SHAPES[shape]
    slow_memory = replace(PLAIN, memory_gb_per_s=1e-3, tflops=1e9)
    weights = c.num_hidden_layers * sum(i * o for i, o in linear_shapes(c)) + c.hidden_size * c.vocab_size
    kv = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    seconds = simulate.StepModel(slow_memory, c).ceiling_s(Work(0, 3, 3, 500, 0))
    assert seconds == pytest.approx(4 * (weights + kv * (500 + 3)) / 1e6)


def test_ceiling_of_a_prefill_counts_operations_and_the_head_on_sampled_rows_only():
    c = TINY
    slow_compute = replace(PLAIN, memory_gb_per_s=1e9, tflops=1e-6)
    tokens = 37
    layer = c.num_hidden_layers * sum(i * o for i, o in linear_shapes(c))
    pairs = sum(position + 1 for position in range(tokens))
    attention = 4 * pairs * c.num_attention_heads * c.head_dim * c.num_hidden_layers
    request = Request(InputRequest(prompt_token_ids=[1] * tokens))
    work = Work.of([Chunk(request, 0, tokens)])
    assert (work.prefill_tokens, work.sampled_tokens, work.attended_pairs) == (tokens, 1, pairs)
    flops = 2 * tokens * layer + 2 * c.hidden_size * c.vocab_size + attention
    assert simulate.StepModel(slow_compute, c).ceiling_s(work) == pytest.approx(flops / 1e6)


def test_work_of_a_mixed_step_by_hand():
    decoding, whole, piece = (Request(InputRequest(prompt_token_ids=[1] * n)) for n in (5, 3, 9))
    decoding.launched(5)
    piece.launched(4)
    work = Work.of([Chunk(decoding, 5, 1), Chunk(whole, 0, 3), Chunk(piece, 4, 2)])
    # pairs: 1 + 2 + 3 of the whole prompt; positions 4 and 5 of the piece see 5 and 6 tokens
    assert work == Work(prefill_tokens=5, decode_tokens=1, sampled_tokens=2, context_tokens=6, attended_pairs=17)
    assert work.kind == "mixed"


def test_time_is_never_below_the_ceiling_and_grows_with_the_work():
    for name, machine in simulate.MACHINES.items():
        model = simulate.StepModel(machine, SHAPES[simulate.DEFAULT_SHAPE[name]])
        before = 0.0
        for n in (1, 4, 16, 64, 256, 1024, 4096):
            decode, prefill = Work(0, n, n, 300 * n, 0), Work(n, 0, 1, 0, n * (n + 1) // 2)
            for work in (decode, prefill):
                assert model.time_s(work) > model.ceiling_s(work)
            assert model.time_s(decode) > before
            before = model.time_s(decode)


@pytest.mark.parametrize(
    "rows, measured_us", [(1, 122), (32, 123), (64, 128), (96, 130), (128, 138), (192, 170), (256, 206)]
)
def test_linears_of_a_layer_on_an_h200(rows, measured_us):
    """The figures that the corner was chosen by; a change of the formula must still meet them."""
    c, m = SHAPES["llama3-8b"], simulate.MACHINES["h200"]
    weights = sum(i * o for i, o in linear_shapes(c))
    bytes_s = weights * 2 / (m.memory_gb_per_s * 1e9 * simulate.MEMORY_EFFICIENCY)
    assert simulate.corner(bytes_s, 2 * rows * weights / (m.tflops * 1e12)) * 1e6 == pytest.approx(
        measured_us, rel=0.14
    )


def test_clock_adds_up_the_steps():
    model = simulate.StepModel(simulate.MACHINES["cpu2"], TINY)
    engine = simulate.SimulatedEngine(model, num_pages=50)
    loop = Scheduler(engine, 4)
    for i in range(9):
        loop.add_req(InputRequest(prompt_token_ids=[i] * (i + 1), output_len=3 * i + 1))
    loop.run()
    assert engine.now() == pytest.approx(sum(model.time_s(it.work) for it in loop.iterations))
    for it in loop.iterations:
        assert it.time_us == pytest.approx(1e6 * model.time_s(it.work))


def test_replicas_share_the_load_and_each_request_is_served_once():
    model = simulate.StepModel(simulate.MACHINES["h200"], SHAPES["llama3-8b"])
    times = {}
    for replicas in (1, 4):
        loops = [Scheduler(simulate.SimulatedEngine(model), 8) for _ in range(replicas)]
        requests = [
            Request(InputRequest(prompt_token_ids=[1] * 20, output_len=50, arrival_time=i / 200), i) for i in range(200)
        ]
        simulate.serve_replicas(loops, requests)
        served = [r.request_id for loop in loops for r in loop.completed]
        assert sorted(served) == list(range(200))
        assert all(r.token_times[0] >= r.arrival_time for r in requests)
        counts = [len(loop.completed) for loop in loops]
        assert max(counts) - min(counts) <= 8
        times[replicas] = max(r.token_times[-1] for r in requests)
    assert 3 < times[1] / times[4] < 4.5


def test_router_avoids_a_replica_that_is_busy_with_long_requests():
    model = simulate.StepModel(simulate.MACHINES["h200"], SHAPES["llama3-8b"])
    loops = [Scheduler(simulate.SimulatedEngine(model), 8) for _ in range(2)]
    lens = [4000, 4000, 4000, 1] + [1] * 40  # the first three long ones: two on replica 0, one on replica 1
    requests = [
        Request(InputRequest(prompt_token_ids=[1], output_len=n, arrival_time=0.0 if i < 3 else i * 0.1), i)
        for i, n in enumerate(lens)
    ]
    simulate.serve_replicas(loops, requests)
    assert {r.request_id for r in loops[1].completed} >= set(range(3, 44))


# --- the check against a measured run --------------------------------------------------------------------------------
def measured_by(model, works):
    return [simulate.Measured("chunked", work.kind, work, model.time_s(work)) for work in works]


def test_fit_finds_both_overheads_and_check_its_errors():
    true = simulate.StepModel(replace(simulate.MACHINES["cpu2"], overhead_s=7e-3, request_overhead_s=2e-4), TINY)
    works = [Work(5 * (n % 3), n, n + (n % 3 > 0), 100 * n, 10 * (n % 3)) for n in range(1, 40)]
    measured = measured_by(true, works)
    fitted = simulate.fit_overhead(simulate.StepModel(simulate.MACHINES["cpu2"], TINY), measured)
    assert fitted.machine.overhead_s == pytest.approx(7e-3)
    assert fitted.machine.request_overhead_s == pytest.approx(2e-4)
    assert simulate.errors(fitted, measured) == pytest.approx((0, 0), abs=1e-9)
    slower = [it._replace(time_s=2 * it.time_s) for it in measured]
    assert simulate.errors(fitted, slower) == pytest.approx((0.5, -0.5))
    all_alike = simulate.fit_overhead(true, measured[11:12] * 5)  # here a step's and a request's cannot be told apart
    assert simulate.errors(all_alike, measured[11:12]) == pytest.approx((0, 0), abs=1e-9)


def test_a_machine_faster_than_its_model_has_no_overhead_below_zero():
    model = simulate.StepModel(replace(simulate.MACHINES["cpu2"], overhead_s=0.0), TINY)
    works = [Work(0, n, n, 100 * n, 0) for n in range(1, 40)]
    faster = [it._replace(time_s=0.7 * it.time_s) for it in measured_by(model, works)]
    machine = simulate.fit_overhead(model, faster).machine
    assert (machine.overhead_s, machine.request_overhead_s) == (0, 0)


def test_one_step_during_which_the_machine_stood_still_does_not_spoil_the_fit():
    true = simulate.StepModel(simulate.MACHINES["h200"], SHAPES["llama3-8b"])
    works = [Work(0, n % 32 + 1, n % 32 + 1, 400 * (n % 32 + 1), 0) for n in range(2000)]
    measured = measured_by(true, works)
    measured[1000] = measured[1000]._replace(time_s=0.05)
    fitted = simulate.fit_overhead(true, measured)
    assert simulate.errors(fitted, measured_by(true, works))[0] < 0.01


def test_steps_that_are_read_late_do_not_spoil_the_fit():
    """At a low load a mixed step's launch holds the host, so the step before it looks long and it looks short: squares
    would take a millisecond of that for an overhead of every step."""
    true = simulate.StepModel(replace(simulate.MACHINES["h200"], overhead_s=2e-4), SHAPES["llama3-8b"])
    works = [Work(0, 40, 40, 16_000, 0), Work(700, 40, 41, 16_000, 250_000)] + [Work(0, 40, 40, 16_000, 0)] * 14
    measured = measured_by(true, works * 50)
    for first in range(0, len(measured), 16):
        moved = 0.9 * measured[first + 1].time_s
        measured[first] = measured[first]._replace(time_s=measured[first].time_s + moved)
        measured[first + 1] = measured[first + 1]._replace(time_s=measured[first + 1].time_s - moved)
    assert simulate.fit_overhead(true, measured).machine.overhead_s == pytest.approx(2e-4, abs=2e-5)


def write_iterations(path, machine, *, noise=0.0, seed=0):
    """What a run of the chunked scheduler on `machine` would have measured, its step times spread by `noise`."""
    draw = random.Random(seed)
    engine = simulate.SimulatedEngine(simulate.StepModel(machine, SHAPES["llama3-8b"]))
    loop = ChunkedScheduler(engine, 512, 32)
    for request in request_sets.lognormal(60, seed=1):
        loop.add_req(request)
    loop.run()
    columns = ["policy", "iteration", "time_us", "kind", *simulate.WORK_COLUMNS]
    lines = [
        ["chunked", i, it.time_us * draw.uniform(1 - noise, 1 + noise), it.work.kind, *asdict(it.work).values()]
        for i, it in enumerate(loop.iterations)
    ]
    path.write_text("".join(",".join(map(str, line)) + "\n" for line in [columns, *lines]))


def check(path, *options):
    command = [sys.executable, "-m", "common.simulate", "--simulate", "h200:llama3-8b", "--check", str(path), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_machine_that_cannot_be_saved_is_refused_at_once(tmp_path):
    done = check(tmp_path / "absent.csv", "--save", str(tmp_path / "absent" / "machine.json"))
    assert done.returncode == 2 and not done.stdout
    assert "--save" in done.stderr and "cannot write into" in done.stderr and len(done.stderr.splitlines()) == 1


def test_check_accepts_a_run_like_the_model(tmp_path):
    """Another overhead, which is what may be fitted, a little less bandwidth, and noise."""
    h200 = simulate.MACHINES["h200"]
    machine = replace(h200, overhead_s=9e-4, request_overhead_s=3e-5, memory_gb_per_s=0.95 * h200.memory_gb_per_s)
    write_iterations(tmp_path / "i.csv", machine, noise=0.1)
    done = check(tmp_path / "i.csv", "--save", str(tmp_path / "machine.json"))
    assert done.returncode == 0, done.stderr
    assert "at most 15 % is allowed" in done.stdout and "(at most 10 %)" in done.stdout
    assert {line.split()[1] for line in done.stdout.splitlines() if line.startswith("chunked")} == {
        "decode", "mixed", "prefill",
    }  # fmt: skip
    saved, shape = simulate.parse(f"{tmp_path}/machine.json:llama3-8b")
    assert shape == "llama3-8b" and saved.memory_gb_per_s == h200.memory_gb_per_s
    assert saved.overhead_s + 16 * saved.request_overhead_s == pytest.approx(9e-4 + 16 * 3e-5, rel=0.4)


@pytest.mark.parametrize(
    "change",
    [
        {"tflops": 680.0 / 2.5},  # long steps are wrong, the short ones can be fitted: the total time tells
        {"memory_gb_per_s": 4590.0 * 2.5},  # faster than the model: no overhead makes up for that
    ],
)
def test_check_fails_for_a_machine_that_the_model_is_wrong_about(change, tmp_path):
    write_iterations(tmp_path / "i.csv", replace(simulate.MACHINES["h200"], **change))
    done = check(tmp_path / "i.csv")
    assert done.returncode == 1, done.stdout
    assert "check failed: a step's time is wrong by" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "i.csv"),
        ("policy,kind,time_us\nchunked,decode,5\n", "no column prefill_tokens"),
        ("policy,kind,time_us," + ",".join(simulate.WORK_COLUMNS) + "\n", "no iterations"),
        ("policy,kind,time_us," + ",".join(simulate.WORK_COLUMNS) + "\na,decode,x,1,1,1,1,1\n", "time_us is 'x'"),
        ("policy,kind,time_us," + ",".join(simulate.WORK_COLUMNS) + "\na,decode,0,1,1,1,1,1\n", "not above 0"),
    ],
)
def test_check_of_a_file_without_iterations(text, message, tmp_path):
    if text is not None:
        (tmp_path / "i.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        simulate.read_measured(tmp_path / "i.csv")


# --- machines --------------------------------------------------------------------------------------------------------
def test_machines_by_name_and_from_a_file(tmp_path):
    assert simulate.parse("h200:llama3-70b")[1] == "llama3-70b"
    assert simulate.parse("cpu2") == (simulate.MACHINES["cpu2"], "smollm2-135m")
    ceilings = {
        "device_name": "Some GPU",
        "device_type": "cuda",
        "copy_gb_per_s": 900.0,
        "read_gb_per_s": 1000.0,
        "cache_bytes": 1,
        "tflops": {"float32": {"burst": 50, "sustained": 40}, "bfloat16": {"burst": 400, "sustained": 300}},
    }
    (tmp_path / "roofline.json").write_text(json.dumps({"command": "python", "ceilings": ceilings}))
    machine, shape = simulate.parse(f"{tmp_path}/roofline.json:tiny")
    assert shape == "tiny" and machine.name == "Some GPU"
    assert (machine.memory_gb_per_s, machine.tflops, machine.dtype) == (1000, 300, "bfloat16")
    (tmp_path / "flat.json").write_text(
        json.dumps(ceilings | {"device_type": "cpu", "tflops": {"float32": {"burst": 2, "sustained": 1}}})
    )
    machine, shape = simulate.parse(f"{tmp_path}/flat.json")
    assert (machine.dtype, machine.tflops, shape) == ("float32", 2, "smollm2-135m")


@pytest.mark.parametrize("text", ["h300", "h200:gpt2", "", ":tiny"])
def test_unknown_machines(text):
    with pytest.raises(UserError, match="--simulate"):
        simulate.parse(text)


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"ceilings": {"device_type": "cpu"}}', '{"device_name": 1, "device_type": "cpu"}']
)
def test_files_without_ceilings(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match="no measured ceilings"):
        simulate.parse(str(tmp_path / "x.json"))


def test_a_shape_that_does_not_fit():
    with pytest.raises(UserError, match="do not fit"):
        simulate.StepModel(simulate.MACHINES["cpu2"], SHAPES["llama3-8b"]).num_pages(16)
