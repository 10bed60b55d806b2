"""The calls put together for libraries that only a GPU runs, received by stand-ins with the libraries' own signatures.

A stand-in computes attention from what it is given, so an argument in the wrong place, layout or meaning gives a wrong
result here and not first on a GPU. Signatures are those of vLLM 0.25.1, flash-attn 2.8, 3 and 4.0, FlashInfer 0.6.13,
torch 2.11 and 2.13.
"""

import importlib
import random
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from common.attention_bench.backends import flash_attn, flashinfer, torch_varlen, vllm_builds
from common.attention_bench.backends.base import DecodeCase, PrefillCase
from common.attention_bench.backends.reference import reference, relative_error
from common.attention_bench.options import Heads

CPU = torch.device("cpu")
HEADS = [Heads(4, 4, 8), Heads(8, 2, 16), Heads(6, 2, 8)]


def random_cases(page_sizes, seed=0):
    draw = random.Random(seed)
    for heads in HEADS:
        lengths = [draw.randint(1, 30) for _ in range(4)]
        priors = [draw.choice([0, draw.randint(1, 40)]) for _ in lengths]
        yield PrefillCase(heads, (17, 17), (17, 17), torch.float32, CPU)
        yield PrefillCase(heads, tuple(lengths), tuple(map(sum, zip(lengths, priors))), torch.float32, CPU)
        for page_size in page_sizes:
            yield DecodeCase(heads, (33, 33), page_size, torch.float32, CPU)
            yield DecodeCase(heads, tuple(draw.randint(1, 70) for _ in range(5)), page_size, torch.float32, CPU)


def check(backend, cases):
    for number, case in enumerate(cases):
        x = case.inputs(number)
        assert relative_error(backend.prepare(case).bind(x)(), reference(case, x)) < 1e-5, case


def attend(q, k, v, causal, scale=None):
    """q [n, Hq, d] over k, v [m, Hkv, d], the mask aligned bottom-right."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("nhd,mhd->hnm", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(k.shape[0] - q.shape[0])
        scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v)


def attend_packed(q, k, v, cu_q, cu_k, causal, scale=None):
    assert cu_q.dtype == cu_k.dtype == torch.int32
    bounds = [*zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:])]
    return torch.cat([attend(q[a:b], k[c:d], v[c:d], causal, scale) for a, b, c, d in bounds])


def attend_paged(q, k, v, lengths, table, scale=None):
    """q [B, Hq, d]; k, v [pages, page_size, Hkv, d]; lengths [B]; table [B, pages]."""
    assert lengths.dtype == table.dtype == torch.int32 and k.stride(-1) == v.stride(-1) == 1
    rows = []
    for row, length in enumerate(lengths.tolist()):
        used = table[row].long()
        keys, values = k[used].flatten(0, 1)[:length], v[used].flatten(0, 1)[:length]
        rows.append(attend(q[row : row + 1], keys, values, False, scale))
    return torch.cat(rows)


# --- the builds inside vLLM's wheel ----------------------------------------------------------------------------------
VLLM_2 = (
    "varlen_fwd(Tensor q, Tensor k, Tensor v, Tensor? out, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seqused_k,"
    " Tensor? leftpad_k, Tensor? block_table, Tensor? alibi_slopes, int max_seqlen_q, int max_seqlen_k, float p_dropout"
    ", float softmax_scale, bool zero_tensors, bool is_causal, int window_size_left, int window_size_right, float "
    "softcap, bool return_softmax, int num_splits, Generator? gen) -> Tensor[]",
    "fwd_kvcache(Tensor q, Tensor kcache, Tensor vcache, Tensor? k, Tensor? v, Tensor? seqlens_k, Tensor? rotary_cos, "
    "Tensor? rotary_sin, Tensor? cache_batch_idx, Tensor? leftpad_k, Tensor? block_table, Tensor? alibi_slopes, Tensor?"
    " out, float softmax_scale, bool is_causal, int window_size_left, int window_size_right, float softcap, bool "
    "is_rotary_interleaved, int num_splits) -> Tensor[]",
)
VLLM_3 = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor? out, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k, int? max_seqlen_q, int? "
    "max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos, Tensor? rotary_sin,"
    " Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, float softmax_scale, bool "
    "is_causal, int window_size_left, int window_size_right, float softcap, bool is_rotary_interleaved, Tensor? "
    "scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin, Tensor? s_aux, int cp_world_size, int cp_rank, "
    "Tensor? cp_tot_seqused_k) -> Tensor[]"
)


def named(schema, used):
    """A CPU implementation of an operator: `used` gets all arguments by name; what we never set must be neutral."""
    names = [part.split()[-1] for part in schema[schema.index("(") + 1 : schema.index(")")].split(",")]

    def run(*arguments):
        a = SimpleNamespace(**dict(zip(names, arguments)))
        assert (a.window_size_left, a.window_size_right, a.softcap, a.num_splits) == (-1, -1, 0, 0)
        assert getattr(a, "p_dropout", 0) == 0 and getattr(a, "cp_world_size", 1) == 1
        return [used(a)]

    return run


def varlen_fwd(a):
    assert a.max_seqlen_q >= a.cu_seqlens_q.diff().max() and a.max_seqlen_k >= a.cu_seqlens_k.diff().max()
    return attend_packed(a.q, a.k, a.v, a.cu_seqlens_q, a.cu_seqlens_k, a.is_causal, a.softmax_scale)


def fwd_kvcache(a):
    assert a.q.shape[1] == 1 and a.kcache.shape[1] % 16 == 0
    return attend_paged(a.q[:, 0], a.kcache, a.vcache, a.seqlens_k, a.block_table, a.softmax_scale)[:, None]


def fwd(a):
    if a.page_table is not None:
        assert a.q.shape[1] == 1 and a.max_seqlen_k >= a.seqused_k.max() and a.cu_seqlens_q is None
        return attend_paged(a.q[:, 0], a.k, a.v, a.seqused_k, a.page_table, a.softmax_scale)[:, None]
    if a.cu_seqlens_q is None:
        return torch.stack([attend(q, k, v, a.is_causal, a.softmax_scale) for q, k, v in zip(a.q, a.k, a.v)])
    return varlen_fwd(a)


@pytest.fixture(scope="module")
def vllm_operators():
    libraries = {}
    parts = {"tlab_vllm_2": zip(VLLM_2, (varlen_fwd, fwd_kvcache)), "tlab_vllm_3": [(VLLM_3, fwd)]}
    for name, operators in parts.items():
        libraries[name] = torch.library.Library(name, "DEF")
        for schema, used in operators:
            libraries[name].define(schema)
            libraries[name].impl(schema.split("(")[0], named(schema, used), "CPU")
    return libraries


def test_vllm_s_builds_are_given_what_they_ask_for(vllm_operators, monkeypatch):
    two, three = vllm_builds.BACKENDS
    monkeypatch.setattr(two, "_operators", lambda: torch.ops.tlab_vllm_2, raising=False)
    monkeypatch.setattr(three, "_operators", lambda: torch.ops.tlab_vllm_3, raising=False)
    check(two, random_cases([16, 48]))
    check(three, random_cases([1, 3, 16]))


def test_vllm_s_builds_say_which_cards_they_need(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_builds, "find_library", lambda stem: tmp_path / f"{stem}.so")
    two, three = vllm_builds.BACKENDS
    cuda = torch.device("cuda")
    for capability, reasons in (((7, 5), (True, True)), ((8, 9), (False, True)), ((9, 0), (False, False))):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        found = [backend.missing(cuda) for backend in (two, three)]
        assert tuple("needs compute capability" in reason for reason in found) == reasons, found
    assert three.missing(cuda).startswith("_vllm_fa3_C.so cannot be loaded")


# --- flash-attn's own packages ---------------------------------------------------------------------------------------
def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, **others):
    return torch.stack([attend(*row, causal) for row in zip(q, k, v)])


def package_2():
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, block_table=None,
    ):  # fmt: skip
        return attend_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, causal)

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, block_table=None, causal=False
    ):
        return attend_paged(q[:, 0], k_cache, v_cache, cache_seqlens, block_table)[:, None]

    return locals()


def package_3():
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, causal=False
    ):
        return attend_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, causal), None

    def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, page_table=None, causal=False):
        return attend_paged(q[:, 0], k_cache, v_cache, cache_seqlens, page_table)[:, None], None

    return locals()


def package_4():
    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, seqused_k=None,
        page_table=None, causal=False,
    ):  # fmt: skip
        if page_table is None:
            return attend_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, causal), None
        assert cu_seqlens_k is None and cu_seqlens_q.tolist() == list(range(len(q) + 1)) and max_seqlen_q == 1
        return attend_paged(q, k, v, seqused_k, page_table), None

    return locals()


FLASH_ATTN = [pytest.param(b, p, id=b.name) for b, p in zip(flash_attn.BACKENDS, (package_2, package_3, package_4))]


@pytest.mark.parametrize("backend, package", FLASH_ATTN)
def test_flash_attn_s_packages_are_given_what_they_ask_for(backend, package, monkeypatch):
    module = SimpleNamespace(flash_attn_func=flash_attn_func, **package())
    monkeypatch.setattr(backend, "_module", lambda: module, raising=False)
    check(backend, random_cases([backend.page_multiple]))


def test_flash_attn_4_alone_is_not_taken_for_flash_attn_2(tmp_path, monkeypatch):
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("def flash_attn_func(): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    two, _, four = flash_attn.BACKENDS
    try:
        assert two.missing(torch.device("cuda")) == "not installed: pip install flash-attn --no-build-isolation"
        assert four.missing(torch.device("cuda")) is None
    finally:
        for name in ("flash_attn.cute", "flash_attn"):
            sys.modules.pop(name, None)


# --- FlashInfer ------------------------------------------------------------------------------------------------------
class RaggedPrefill:
    def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, backend="auto"):
        assert kv_layout == "NHD" and backend in ("fa2", "fa3") and not use_cuda_graph

    def plan(
        self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo=None, custom_mask=None,
        packed_custom_mask=None, causal=False, q_data_type="float16", kv_data_type=None,
    ):  # fmt: skip
        assert custom_mask is None and q_data_type == kv_data_type == torch.float32
        self.shape, self.causal = (num_qo_heads, num_kv_heads, head_dim_qk), causal
        self.bounds = qo_indptr, kv_indptr

    def run(self, q, k, v):
        assert (q.shape[1], k.shape[1], q.shape[2]) == self.shape and q.is_contiguous()
        return attend_packed(q, k, v, *self.bounds, self.causal)


class PagedDecode:
    def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False):
        assert kv_layout == "NHD" and not use_cuda_graph and not float_workspace_buffer.any()

    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, pos_encoding_mode="NONE",
        window_left=-1, logits_soft_cap=None, q_data_type="float16", kv_data_type=None,
    ):  # fmt: skip
        assert {x.dtype for x in (indptr, indices, last_page_len)} == {torch.int32}
        assert pos_encoding_mode == "NONE" and q_data_type == kv_data_type == torch.float32
        self.arrays = indptr.tolist(), indices, last_page_len.tolist()
        self.shape = page_size, num_kv_heads, head_dim

    def run(self, q, paged_kv_cache):
        indptr, indices, last = self.arrays
        assert paged_kv_cache.shape[2:] == self.shape and paged_kv_cache.shape[1] == 2
        rows = []
        for row, (begin, end) in enumerate(zip(indptr, indptr[1:])):
            kv = paged_kv_cache[indices[begin:end].long()].transpose(0, 1).flatten(1, 2)
            length = (end - begin - 1) * self.shape[0] + last[row]
            rows.append(attend(q[row : row + 1], kv[0, :length], kv[1, :length], False))
        return torch.cat(rows)


@pytest.mark.parametrize("backend", flashinfer.BACKENDS, ids=str)
def test_flashinfer_is_planned_as_it_asks(backend, monkeypatch):
    module = ModuleType("flashinfer")
    module.BatchPrefillWithRaggedKVCacheWrapper = RaggedPrefill
    module.BatchDecodeWithPagedKVCacheWrapper = PagedDecode
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(flashinfer, "WORKSPACE_BYTES", 64)
    flashinfer._workspace.cache_clear()
    check(backend, [case for case in random_cases([1, 3, 16]) if case.phase in backend.phases])
    flashinfer._workspace.cache_clear()


# --- torch's varlen_attn ---------------------------------------------------------------------------------------------
def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    assert window_size in ((-1, -1), (-1, 0)) and max_q >= cu_seq_q.diff().max() and max_k >= cu_seq_k.diff().max()
    return attend_packed(query, key, value, cu_seq_q, cu_seq_k, window_size == (-1, 0))


def of_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size)


@pytest.mark.parametrize("function", [of_2_11, of_2_13])
def test_varlen_attn_is_told_what_its_version_needs(function, monkeypatch):
    monkeypatch.setattr(torch_varlen, "_find", lambda: function)
    check(torch_varlen.TorchVarlen(), random_cases([4]))


def test_the_signatures_above_are_those_of_the_installed_torch():
    import inspect

    varlen = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    ours = of_2_13 if "enable_gqa" in inspect.signature(varlen).parameters else of_2_11
    assert list(inspect.signature(varlen).parameters) == list(inspect.signature(ours).parameters)
