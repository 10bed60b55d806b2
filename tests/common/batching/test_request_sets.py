import hashlib
import json
import math
import statistics

import pytest

from common.batching import request_sets
from common.errors import UserError
from common.serving import InputRequest


def lengths(requests):
    return [len(r.prompt_token_ids) for r in requests], [r.output_len for r in requests]


def test_mix_is_the_set_that_engines_are_compared_on():
    requests = request_sets.mix()
    prompts, outputs = lengths(requests)
    assert (len(requests), sum(prompts), sum(outputs)) == (256, 142_827, 133_966)
    assert min(prompts) >= 100 and max(prompts) <= 1024 and min(outputs) >= 100 and max(outputs) <= 1024
    ids = [i for r in requests for i in r.prompt_token_ids]
    assert min(ids) == 0 and max(ids) == 10_000
    digest = hashlib.sha256(json.dumps([[*r.prompt_token_ids, r.output_len] for r in requests]).encode()).hexdigest()
    assert digest[:16] == "e24f2ad477c85684"


def test_handout_set():
    requests = request_sets.load("handout")
    prompts, outputs = lengths(requests)
    assert len(requests) == 100 and set(prompts) <= set(range(1, 11)) and set(outputs) <= set(range(1, 129))
    assert len(set(prompts)) == 10 and max(outputs) > 110 and min(outputs) < 20
    again = request_sets.load("handout", seed=0)
    other = request_sets.load("handout", seed=1)
    assert again == requests != other


def test_uniform_set():
    prompts, outputs = lengths(request_sets.load("uniform"))
    assert len(prompts) == 32 and min(prompts + outputs) >= 16 and max(prompts + outputs) <= 128
    many = lengths(request_sets.load("uniform", count=3000))
    assert all((min(values), max(values)) == (16, 128) for values in many)
    assert (
        request_sets.load("uniform") == request_sets.load("uniform", count=32) != request_sets.load("uniform", seed=1)
    )


def test_lognormal_lengths_have_the_stated_mean_and_deviation():
    values = request_sets.sample_lognormal_ints(20_000, 6.0, 0.7, seed=5)
    logs = [math.log(v) for v in values]
    assert abs(statistics.fmean(logs) - 6.0) < 0.02 and abs(statistics.stdev(logs) - 0.7) < 0.02
    clipped = request_sets.sample_lognormal_ints(20_000, 6.0, 0.7, low=300, high=900, seed=5)
    assert clipped == [min(max(v, 300), 900) for v in values]
    assert min(request_sets.sample_lognormal_ints(1000, -5.0, 0.1)) == 1


@pytest.mark.parametrize("name", ["handout", "lognormal", "uniform"])
@pytest.mark.parametrize("vocab", [7, 300, 50_000])
def test_ids_are_in_the_vocabulary(name, vocab):
    ids = [i for r in request_sets.load(name, vocab_size=vocab) for i in r.prompt_token_ids]
    assert min(ids) >= 0 and max(ids) < min(vocab, 10_001)


def test_shapes_make_smaller_sets():
    prompts, outputs = lengths(request_sets.load("lognormal", count=2000, mean=3.0, max_output=9))
    assert abs(statistics.median(prompts) - math.e**3) < 1.5 and set(outputs) == set(range(1, 10))
    assert set(lengths(request_sets.load("handout", count=2000, max_output=9))[1]) == set(range(1, 10))


def test_count():
    assert len(request_sets.load("handout", count=7)) == 7
    assert request_sets.load("mix", count=3) == request_sets.mix()[:3]
    with pytest.raises(UserError, match="--num-requests"):
        request_sets.load("handout", count=0)


def test_mix_needs_its_vocabulary():
    with pytest.raises(UserError, match="ids up to 10000, the vocabulary has 258"):
        request_sets.load("mix", vocab_size=258)


def test_poisson_gaps():
    requests = [InputRequest(prompt_token_ids=[1]) for _ in range(20_000)]
    request_sets.poisson_arrivals(requests, 4.0, seed=2)
    times = [r.arrival_time for r in requests]
    gaps = [b - a for a, b in zip([0.0, *times], times)]
    assert min(gaps) >= 0 and abs(statistics.fmean(gaps) - 0.25) < 0.01
    assert abs(statistics.stdev(gaps) - 0.25) < 0.01  # exponential: deviation equals mean
    with pytest.raises(UserError, match="--rate"):
        request_sets.poisson_arrivals(requests, 0.0)


def test_jsonl(tmp_path):
    file = tmp_path / "set.jsonl"
    file.write_text('{"prompt": "Hello, ä", "output_tokens": 7}\n\n{"prompt": "x", "extra": 1}\n', encoding="utf-8")
    requests = request_sets.load(str(file))
    assert [(r.input_str, r.output_len, r.prompt_token_ids) for r in requests] == [
        ("Hello, ä", 7, None),
        ("x", 128, None),
    ]
    assert len(request_sets.load(str(file), count=1)) == 1


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not JSON"),
        ("[" * 100_000, "brackets too deep to read"),
        ("[1]", "prompt"),
        ('{"prompt": 3}', "prompt"),
        ('{"prompt": ""}', "prompt"),
        ('{"output_tokens": 3}', "prompt"),
        ('{"prompt": "x", "output_tokens": 0}', "output_tokens"),
        ('{"prompt": "x", "output_tokens": "9"}', "output_tokens"),
        ('{"prompt": "x", "output_tokens": true}', "output_tokens"),
        ('{"prompt": "x", "output_tokens": 1.5}', "output_tokens"),
    ],
)
def test_malformed_jsonl_is_named_by_its_line(tmp_path, line, message):
    file = tmp_path / "set.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=f"set.jsonl, line 2: .*{message}"):
        request_sets.load(str(file))


def test_azure_trace(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 23:59:59.5000000,374,44\n2023-11-17 00:00:01.2500000,396,109\n"
    )
    requests = request_sets.load(str(file), vocab_size=100)
    assert [(len(r.prompt_token_ids), r.output_len, r.arrival_time) for r in requests] == [
        (374, 44, 0.0),
        (396, 109, 1.75),
    ]
    assert max(requests[0].prompt_token_ids) < 100


def test_azure_trace_of_2024_has_a_zone_and_sometimes_no_fraction(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00+00:00,1,2\n2024-05-10 00:00:00.009930+00:00,3,4\n"
    )
    assert request_sets.load(str(file))[1].arrival_time == pytest.approx(0.00993, abs=1e-6)


@pytest.mark.parametrize(
    "row, message",
    [
        ("2023-11-16 18:15:46,0,4", "ContextTokens must be a whole number from 1, not '0'"),
        ("2023-11-16 18:15:46,4,0", "GeneratedTokens must be a whole number from 1, not '0'"),
        ("2023-11-16 18:15:46,4", "GeneratedTokens must be a whole number from 1, not None"),
        ("yesterday,4,4", "TIMESTAMP must be like 2023-11-16 18:15:46.68, not 'yesterday'"),
        ("2023-11-16 18:15:46,a,4", "ContextTokens must be a whole number from 1, not 'a'"),
        ("2023-11-16 18:15:46,999999999999,4", "ContextTokens 999999999999 is above 10,000,000"),
        ("2023-11-16 18:15:40,4,4", "earlier than the first row"),
    ],
)
def test_malformed_trace_rows(tmp_path, row, message):
    file = tmp_path / "trace.csv"
    file.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:45,5,5\n{row}\n")
    with pytest.raises(UserError, match=f"trace.csv, line 3: {message}"):
        request_sets.load(str(file))


def test_trace_without_the_columns(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("TIMESTAMP,Context\n1,2\n")
    with pytest.raises(UserError, match="no column ContextTokens, GeneratedTokens"):
        request_sets.load(str(file))


@pytest.mark.parametrize(
    "name, text", [("a.jsonl", ""), ("a.jsonl", "\n\n"), ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n")]
)
def test_empty_sets(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="no requests in it"):
        request_sets.load(str(tmp_path / name))


def test_unknown_set_and_binary_file(tmp_path):
    with pytest.raises(UserError, match="neither a file nor one of handout, lognormal, mix"):
        request_sets.load("handouts")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        request_sets.load(str(tmp_path / "b.jsonl"))
