"""Cases counted by hand, the reference against a loop over single queries, and every backend that a CPU runs."""

import random

import pytest
import torch

from common.attention_bench import backends as attention_backends
from common.attention_bench.backends import flash_attn, torch_varlen, triton_kernels, vllm_builds
from common.attention_bench.backends.base import JUNK, DecodeCase, DecodeInputs, PrefillCase, Unsupported
from common.attention_bench.backends.reference import TOLERANCE, reference, relative_error
from common.attention_bench.options import BACKENDS, FAMILIES, Heads, names_of
from common.errors import UserError
from common.kernels import runtime

CPU = torch.device("cpu")


def prefill(heads, q_lens, kv_lens=None, dtype=torch.float32):
    return PrefillCase(heads, tuple(q_lens), tuple(kv_lens or q_lens), dtype, CPU)


def decode(heads, kv_lens, page_size, dtype=torch.float32):
    return DecodeCase(heads, tuple(kv_lens), page_size, dtype, CPU)


# --- formulas --------------------------------------------------------------------------------------------------------
def test_prefill_counts_half_the_square_for_every_query_head():
    case = prefill(Heads(32, 8, 128), [1024] * 2, dtype=torch.bfloat16)
    assert case.flops == 4 * 2 * 1024**2 * 32 * 128 / 2
    # q and out have 32 heads, k and v 8, of 128 elements of 2 bytes, for 2,048 tokens
    assert case.num_bytes == 2048 * (2 * 32 + 2 * 8) * 128 * 2


def test_prefill_behind_a_prior_context_counts_it_whole():
    heads = Heads(2, 1, 4)
    case = prefill(heads, [10], [100])
    assert case.flops == 4 * 2 * 4 * (10 * 90 + 10 * 10 / 2)
    assert case.num_bytes == (2 * 10 * 2 + 2 * 100 * 1) * 4 * 4


def test_decode_counts_kv_heads_and_real_tokens_only():
    even, grouped = decode(Heads(32, 32, 128), [4096] * 16, 16), decode(Heads(32, 8, 128), [4096] * 16, 16)
    q_and_out = 2 * 16 * 32 * 128 * 4
    assert even.num_bytes == 2 * 16 * 4096 * 32 * 128 * 4 + q_and_out
    assert grouped.num_bytes - q_and_out == (even.num_bytes - q_and_out) / 4
    assert even.flops == grouped.flops == 4 * 16 * 4096 * 32 * 128
    ragged = decode(Heads(2, 2, 4), [1, 17], 16)  # 3 pages hold 48 tokens, 18 are real
    assert ragged.num_bytes == (2 * 18 * 2 * 4 + 2 * 2 * 2 * 4) * 4
    assert ragged.input_bytes == (2 * 48 * 2 * 4 + 2 * 2 * 4) * 4


def test_heads_that_do_not_divide_are_refused():
    for numbers in ((32, 5, 128), (4, 8, 128), (0, 1, 128), (4, 4, 0), (4, -4, 8)):
        with pytest.raises(UserError, match="--heads|--kv-heads|--head-dim"):
            Heads(*numbers)


# --- inputs ----------------------------------------------------------------------------------------------------------
def test_pages_hold_each_sequence_in_the_order_of_its_table_and_junk_after_its_end():
    case = decode(Heads(2, 1, 4), [5, 8, 1], 4)
    x = case.inputs(seed=3)
    assert sorted(case.page_ids) == list(range(5)) and case.page_ids != list(range(5))
    k, v = x.packed
    row = 0
    for b, length in enumerate(case.kv_lens):
        for t in range(length):
            page = int(case.page_table[b, t // 4])
            assert torch.equal(k[row], x.pages[page, 0, t % 4]) and torch.equal(v[row], x.pages[page, 1, t % 4])
            row += 1
    assert row == len(k) and k.abs().max() < JUNK / 2
    assert (x.pages == JUNK).sum() == 2 * 4 * (3 + 0 + 3), "3 empty slots of the first and of the last sequence"
    padded_k, _ = x.padded
    assert torch.equal(padded_k[0, 0, :5], k[:5, 0]) and not padded_k[0, 0, 5:].any() and not padded_k[2, 0, 1:].any()


# --- the reference ---------------------------------------------------------------------------------------------------
def one_query_at_a_time(case, x):
    """Softmax attention of each query and head alone, in float64, with plain indices."""
    heads = case.heads
    if isinstance(x, DecodeInputs):
        (k, v), q_lens = x.packed, (1,) * case.batch
    else:
        k, v, q_lens = x.k, x.v, case.q_lens
    out, row, first = torch.zeros(x.q.shape, dtype=torch.float64), 0, 0
    for n, m in zip(q_lens, case.kv_lens):
        for i in range(n):
            for h in range(heads.num_heads):
                seen = slice(first, first + m - n + i + 1)
                kv_head = h // (heads.num_heads // heads.num_kv_heads)
                scores = (k[seen, kv_head].double() @ x.q[row, h].double()) / heads.head_dim**0.5
                p = (scores - scores.max()).exp()
                out[row, h] = (p / p.sum()) @ v[seen, kv_head].double()
            row += 1
        first += m
    return out


@pytest.mark.parametrize("block", [1 << 26, 40])
def test_reference_is_softmax_attention_aligned_bottom_right(block, monkeypatch):
    from common.attention_bench.backends import reference as module

    monkeypatch.setattr(module, "BLOCK_SCORES", block)  # 40: one or two query rows at a time
    heads = Heads(4, 2, 8)
    for case in (prefill(heads, [3, 7, 1], [3, 12, 9]), decode(heads, [1, 6, 13], 4)):
        x = case.inputs(1)
        assert relative_error(reference(case, x), one_query_at_a_time(case, x)) < 1e-12


def test_large_cases_are_referenced_in_float32(monkeypatch):
    from common.attention_bench.backends import reference as module

    case = prefill(Heads(2, 1, 8), [16])
    assert reference(case, case.inputs()).dtype == torch.float64
    monkeypatch.setattr(module, "CPU_FLOAT64_FLOPS", case.flops - 1)
    x = case.inputs()
    out = reference(case, x)
    assert out.dtype == torch.float32 and relative_error(out, one_query_at_a_time(case, x)) < 1e-6


def test_tolerance_tells_rounding_from_a_lost_key():
    case = decode(Heads(4, 4, 64), [2048], 16)
    x = case.inputs()
    expected = reference(case, x)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert relative_error(expected.to(dtype), expected) < TOLERANCE[dtype] / 2
    short = decode(Heads(4, 4, 64), [2047], 16)
    lost = DecodeInputs(short, x.q, x.pages)
    short.__dict__["page_ids"] = case.page_ids
    assert relative_error(reference(short, lost), expected) > TOLERANCE[torch.bfloat16]
    assert relative_error(torch.full_like(expected, torch.nan), expected) == torch.inf


# --- backends --------------------------------------------------------------------------------------------------------
RUNS_HERE = [b for b in attention_backends.ALL if b.missing(CPU) is None]


def random_heads(rng):
    kv_heads = rng.choice([1, 2, 3])
    return Heads(kv_heads * rng.choice([1, 2, 4, 5]), kv_heads, rng.choice([8, 16, 24, 64, 80]))


def random_prefill(seed):
    rng = random.Random(seed)
    q_lens = [rng.randint(1, 40) for _ in range(rng.randint(1, 4))]
    if rng.random() < 0.3:
        q_lens = q_lens[:1] * len(q_lens)
        return prefill(random_heads(rng), q_lens)
    return prefill(random_heads(rng), q_lens, [n + rng.choice([0, 0, rng.randint(1, 50)]) for n in q_lens])


def random_decode(seed):
    rng = random.Random(seed)
    kv_lens = [rng.choice([1, rng.randint(1, 100)]) for _ in range(rng.randint(1, 5))]
    if rng.random() < 0.3:
        kv_lens = kv_lens[:1] * len(kv_lens)
    return decode(random_heads(rng), kv_lens, rng.choice([1, 2, 3, 8, 16, 64]))


@pytest.mark.parametrize("backend, phase", [(b, phase) for b in RUNS_HERE for phase in b.phases], ids=str)
def test_backends_agree_with_the_reference_on_random_shapes(backend, phase):
    for seed in range(30):
        case = random_prefill(seed) if phase == "prefill" else random_decode(seed)
        assert backend.unsupported(case) is None
        x = case.inputs(seed)
        out = backend.prepare(case).bind(x)()
        assert out.dtype == case.dtype
        assert relative_error(out, reference(case, x)) < 2e-5, case


def test_torch_backends_run_on_a_cpu_and_are_among_those_tested():
    assert {"torch-flash", "torch-math", "torch-gather"} <= {b.name for b in RUNS_HERE}


@pytest.mark.skipif(not (runtime.HAS_TRITON and runtime.INTERPRETED), reason="needs Triton's interpreter")
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_triton_agrees_with_the_reference_in_its_interpreter(phase):
    for backend in triton_kernels.BACKENDS:
        for seed in range(4 if phase in backend.phases else 0):
            case = random_prefill(seed) if phase == "prefill" else random_decode(seed)
            x = case.inputs(seed)
            assert relative_error(backend.prepare(case).bind(x)(), reference(case, x)) < 2e-5, case
    error, tolerance = triton_kernels.check_interpreted(phase, Heads(8, 2, 32))
    assert error < tolerance


def test_the_names_on_the_command_line_are_the_backends():
    assert tuple(b.name for b in attention_backends.ALL) == BACKENDS
    for phase in ("prefill", "decode"):
        assert names_of(phase) == [b.name for b in attention_backends.ALL if phase in b.phases]
    assert all(any(name.startswith(family) for family in FAMILIES) for name in BACKENDS)


def test_missing_packages_are_named_with_their_install_line():
    for backend in attention_backends.ALL:
        reason = backend.missing(CPU)
        assert reason is None or "CUDA" in reason or "pip install" in reason or "build" in reason or "CPU" in reason


# --- calls put together for the version that is installed ------------------------------------------------------------
def test_varlen_options_follow_the_signature():
    def of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None): ...

    def of_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False): ...

    assert torch_varlen.options(of_2_10, causal=True, grouped=True) == {"is_causal": True}
    assert torch_varlen.options(of_2_13, causal=True, grouped=True) == {"window_size": (-1, 0), "enable_gqa": True}
    assert torch_varlen.options(of_2_13, causal=False, grouped=False) == {}


def test_renamed_options_find_their_name_and_a_lost_one_is_unsupported():
    def paged(q, k, v, page_table=None): ...

    assert flash_attn.known_options(paged, {"block_table|page_table": 7}) == {"page_table": 7}
    assert flash_attn.known_options(paged, {"num_splits": None}) == {}
    with pytest.raises(Unsupported, match="paged has no seqused_k"):
        flash_attn.known_options(paged, {"seqused_k": 1})


def test_operator_arguments_follow_the_schema():
    library = torch.library.Library("tlab_attention_test", "DEF")
    schema = "Tensor q, Tensor k, Tensor? k_new, Tensor? page_table, int? max_seqlen_q, float softmax_scale, "
    library.define(f"fwd({schema}bool is_causal, int window_size_left, bool? pack_gqa, int num_splits=3) -> Tensor[]")
    library.define("odd(Tensor q, Tensor metadata) -> Tensor")
    op = torch.ops.tlab_attention_test.fwd.default
    values = {"q": "Q", "k": "K", "page_table|block_table": "T", "softmax_scale": 0.5, "is_causal": True}
    assert vllm_builds.bind_operator(op, values) == ["Q", "K", None, "T", None, 0.5, True, -1, None, 3]
    with pytest.raises(Unsupported, match="no argument seqused_k"):
        vllm_builds.bind_operator(op, values | {"seqused_k": 1})
    with pytest.raises(Unsupported, match="demands metadata"):
        vllm_builds.bind_operator(torch.ops.tlab_attention_test.odd.default, {"q": "Q"})


def test_vllm_library_is_found_without_importing_vllm(tmp_path, monkeypatch):
    package = tmp_path / "vllm"
    (package / "vllm_flash_attn").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    file = package / "vllm_flash_attn" / "_vllm_fa3_C.abi3.so"
    file.write_bytes(b"")
    monkeypatch.syspath_prepend(str(tmp_path))
    vllm_builds.find_library.cache_clear()
    try:
        assert vllm_builds.find_library("_vllm_fa3_C") == file
        assert vllm_builds.find_library("_vllm_fa2_C") is None
        assert vllm_builds.VllmFlashAttn3().missing(CPU) == "needs a CUDA device"
    finally:
        vllm_builds.find_library.cache_clear()
