"""The kernels and sizes of `python -m common.kernels.bench`, at Llama-3-8B's shapes, and the peers beside them.

A peer that is not installed is left out. Each generator makes one case at a time, so that the last one's inputs are
gone before the next one's are made.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common.kernels import paged_decode, paged_prefill, rms_norm, silu_mul, streaming
from common.kernels.hopper_gemm import Plan, clusters_at_once, hopper_gemm, plans_of, runs_hopper_gemm
from common.kernels.linear import Linear, linear_add, linear_float32, norm_gate_up_silu, norm_linear
from common.kernels.rms_norm import Norm

HIDDEN, FFN, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 4096, 14336, 128256, 32, 8, 128
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
PAGE_SIZE = 16
ELEMENTWISE_ROWS = (8192, 1024)
ROWS = (1, 8, 32, 64, 96, 128, 192, 256)
PLANNED_ROWS = (32, 64, 96, 128, 192, 256)
DECODES = ((1, 4096), (16, 4096), (64, 2048), (256, 1024), (1, 32768), (1, 272), (32, 272), (128, 272))
RAGGED_DECODES = (32, 64, 128, 192, 256)  # sequences, their contexts drawn evenly from these bounds with a fixed seed
RAGGED_CONTEXTS = (100, 1500)
PREFILLS = ((16, 1024), (4, 4096), (2, 8192), (1, 16384))


@dataclass
class Case:
    """One kernel at one size. `engines`: name -> a function of i that runs on the i-th of `copies` inputs; what it
    returns for input 0 is compared with `want()`, unless it is None (the copy)."""

    kernel: str
    shape: str
    ceiling: str  # "copy", "read" or "product"
    amount: float  # bytes a call; operations for "product"
    copies: int
    want: Callable[[], torch.Tensor]
    engines: dict[str, Callable[[int], object]]


def _installed(name: str):
    """A peer's module, or None: absent, or broken on this machine."""
    try:
        return importlib.import_module(name)
    except Exception:  # a peer that cannot be imported is not there, whatever it raises
        return None


def _each(fn: Callable, *inputs: Sequence) -> Callable[[int], object]:
    """fn over the i-th of each input."""
    return lambda i: fn(*(values[i] for values in inputs))


def _copies(num_bytes: float, device) -> int:
    """How many distinct inputs make 4x the L2 cache, two at least."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(64, -(-4 * cache // int(num_bytes))))


def _copy_of(num_bytes: int, copies: int, device) -> Callable[[int], object]:
    """An engine that copies as many bytes as a call moves, half of them read and half written."""
    words = max(1, round(num_bytes / 8 / streaming.ALIGN_WORDS)) * streaming.ALIGN_WORDS
    sources = [torch.randint(0, 99, (words,), dtype=torch.int32, device=device) for _ in range(copies)]
    return _each(streaming.copy, sources, [torch.empty_like(source) for source in sources])


def _norm(device, dtype) -> Norm:
    return Norm(torch.rand(HIDDEN, device=device).add(0.5).to(dtype), 1e-5)


def _randn(count: int, *shape: int, device, dtype) -> list[torch.Tensor]:
    return [torch.randn(*shape, device=device, dtype=dtype) for _ in range(count)]


def rms_norm_cases(device, dtype) -> Iterator[Case]:
    norm = _norm(device, dtype)
    weight, eps = norm.weight, norm.eps
    flashinfer, liger = _installed("flashinfer.norm"), _installed("liger_kernel.ops.rms_norm")

    def plain(x):
        return F.rms_norm(x, (HIDDEN,), weight, eps)

    compiled = torch.compile(plain, dynamic=False)
    for rows in ELEMENTWISE_ROWS:
        num_bytes = 2 * rows * HIDDEN * dtype.itemsize
        n = _copies(num_bytes, device)
        xs = _randn(n, rows, HIDDEN, device=device, dtype=dtype)
        engines = {
            "ours": _each(lambda x: rms_norm.rms_norm(x, norm), xs),
            "copy": _copy_of(num_bytes, n, device),
            "torch": _each(plain, xs),
            "torch.compile": _each(compiled, xs),
        }
        if flashinfer:
            engines["flashinfer"] = _each(lambda x: flashinfer.rmsnorm(x, weight, eps), xs)
        if liger:
            engines["liger"] = _each(lambda x: liger.rms_norm_forward(x, weight, eps, 0.0, "llama", None)[0], xs)
        want = _each(lambda x: F.rms_norm(x.double(), (HIDDEN,), weight.double(), eps), xs)
        yield Case("rms_norm", f"{rows}x{HIDDEN}", "copy", num_bytes, n, lambda want=want: want(0), engines)


def add_rms_norm_cases(device, dtype) -> Iterator[Case]:
    norm = _norm(device, dtype)

    def plain(x, residual):
        total = x + residual
        return F.rms_norm(total, (HIDDEN,), norm.weight, norm.eps), total

    compiled = torch.compile(plain, dynamic=False)
    for rows in ELEMENTWISE_ROWS:
        num_bytes = 4 * rows * HIDDEN * dtype.itemsize
        n = _copies(num_bytes, device)
        xs, rs = (_randn(n, rows, HIDDEN, device=device, dtype=dtype) for _ in range(2))
        engines = {
            "ours": _each(lambda x, r: rms_norm.add_rms_norm(x, r, norm)[0], xs, rs),
            "copy": _copy_of(num_bytes, n, device),
            "torch": _each(lambda x, r: plain(x, r)[0], xs, rs),
            "torch.compile": _each(lambda x, r: compiled(x, r)[0], xs, rs),
        }
        want = _each(lambda x, r: F.rms_norm((x + r).double(), (HIDDEN,), norm.weight.double(), norm.eps), xs, rs)
        yield Case("add_rms_norm", f"{rows}x{HIDDEN}", "copy", num_bytes, n, lambda want=want: want(0), engines)


def silu_mul_cases(device, dtype) -> Iterator[Case]:
    flashinfer, liger = _installed("flashinfer.activation"), _installed("liger_kernel.ops.swiglu")
    compiled = torch.compile(silu_mul.silu_mul_reference, dynamic=False)
    for rows in ELEMENTWISE_ROWS:
        num_bytes = 3 * rows * FFN * dtype.itemsize
        n = _copies(num_bytes, device)
        xs = _randn(n, rows, 2 * FFN, device=device, dtype=dtype)
        engines = {
            "ours": _each(silu_mul.silu_mul, xs),
            "copy": _copy_of(num_bytes, n, device),
            "torch": _each(silu_mul.silu_mul_reference, xs),
            "torch.compile": _each(compiled, xs),
        }
        if flashinfer:
            engines["flashinfer"] = _each(flashinfer.silu_and_mul, xs)
        if liger:  # it wants gate and up as tensors of their own
            gates, ups = zip(*([half.contiguous() for half in x.chunk(2, dim=-1)] for x in xs))
            engines["liger"] = _each(lambda gate, up: liger.swiglu_forward(gate, up)[2], gates, ups)
        want = _each(lambda x: silu_mul.silu_mul_reference(x.float()), xs)
        yield Case("silu_mul", f"{rows}x2x{FFN}", "copy", num_bytes, n, lambda want=want: want(0), engines)


def linear_cases(device, dtype) -> Iterator[Case]:
    """The four products of a layer with their neighbours, and the head, at decode's rows; torch has them unfused."""
    norm = _norm(device, dtype)

    def normed(x):
        return F.rms_norm(x, (HIDDEN,), norm.weight.to(x.dtype), norm.eps)

    # name -> ([out, in] of the weight, ours, torch's)
    products = {
        "qkv": ((QKV, HIDDEN), lambda x, w, r: norm_linear(x, norm, w), lambda x, w, r: F.linear(normed(x), w)),
        "o": ((HIDDEN, HIDDEN), linear_add, None),
        "gate_up": (
            (2 * FFN, HIDDEN),
            lambda x, w, r: norm_gate_up_silu(x, norm, w),
            lambda x, w, r: silu_mul.silu_mul_reference(F.linear(normed(x), w)),
        ),
        "down": ((HIDDEN, FFN), linear_add, None),
        "head": ((VOCAB, HIDDEN), lambda x, w, r: linear_float32(x, w), lambda x, w, r: F.linear(x, w)),
    }
    for name, ((out, features), ours, theirs) in products.items():
        theirs = theirs or (lambda x, w, r: torch.addmm(r, x, w.T))
        num_bytes = out * features * dtype.itemsize
        n = max(_copies(num_bytes, device), 2 if name == "head" else 4)
        weights = _randn(n, out, features, device=device, dtype=dtype)
        for weight in weights:
            weight.mul_(0.02)
        linears = [Linear(weight) for weight in weights]
        for rows in ROWS:
            xs = _randn(n, rows, features, device=device, dtype=dtype)
            rs = _randn(n, rows, out, device=device, dtype=dtype) if name in ("o", "down") else xs
            sums = [r.clone() for r in rs]  # linear_add may put its result where the residual was
            engines = {"ours": _each(ours, xs, linears, sums), "torch": _each(theirs, xs, weights, rs)}
            want = _each(lambda x, w, r, f=theirs: f(x.double(), w.double(), r.double()), xs, weights, rs)
            yield Case("linear", f"{name} {rows} rows", "read", num_bytes, n, lambda want=want: want(0), engines)


def hopper_gemm_cases(device, dtype) -> Iterator[Case]:
    """Every plan of hopper_gemm for a layer's products at decode's rows, and its own choice as "ours": is that the
    best?
    """
    # name -> outputs, features, silu
    products = {
        "qkv": (QKV, HIDDEN, False),
        "o": (HIDDEN, HIDDEN, False),
        "gate_up": (FFN, HIDDEN, True),
        "down": (HIDDEN, FFN, False),
    }
    for name, (outputs, features, silu) in products.items():
        weight_rows = 2 * outputs if silu else outputs
        num_bytes = weight_rows * features * dtype.itemsize
        n = max(4, _copies(num_bytes, device))
        weights = [w.mul_(0.02) for w in _randn(n, weight_rows, features, device=device, dtype=dtype)]
        for rows in PLANNED_ROWS:
            xs = _randn(n, rows, features, device=device, dtype=dtype)
            if not runs_hopper_gemm(xs[0], weights[0]):
                print("left out: hopper_gemm does not run here")
                return

            def product(x, w, plan: Plan | None = None, silu=silu):
                return hopper_gemm(x, w, silu=silu, plan=plan)

            engines = {"ours": _each(product, xs, weights)}
            for plan in plans_of(rows, outputs, features, silu, clusters_at_once(device)):
                engines[f"{plan.columns} columns, {plan.sharers} sharers, {plan.parts} parts"] = _each(
                    lambda x, w, plan=plan, run=product: run(x, w, plan), xs, weights
                )
            library = F.linear if not silu else lambda x, w: silu_mul.silu_mul(F.linear(x, w))
            engines["torch"] = _each(library, xs, weights)

            def want(x=xs[0], w=weights[0], silu=silu):
                y = F.linear(x.double(), w.double())
                return silu_mul.silu_mul_reference(y) if silu else y

            yield Case("hopper_gemm", f"{name} {rows} rows", "read", num_bytes, n, want, engines)


def _pages(batch: int, length: int, copies: int, device, dtype):
    """One pool of shuffled pages, and a page table for each of `copies` batches of sequences of up to `length`."""
    per_row = -(-length // PAGE_SIZE)
    total = copies * batch * per_row
    pages = torch.randn(total, 2, PAGE_SIZE, KV_HEADS, HEAD_DIM, device=device, dtype=dtype)
    return pages, torch.randperm(total, device=device).int().view(copies, batch, per_row)


def decode_cases(device, dtype) -> Iterator[Case]:
    """What a step would choose, and both that it chooses from: a program a sequence and KV head, and equal shares."""
    cases = [(f"batch {batch} context {length}", [length] * batch) for batch, length in DECODES]
    for batch in RAGGED_DECODES:
        draw = random.Random(batch)
        shape = f"batch {batch} contexts {RAGGED_CONTEXTS[0]} to {RAGGED_CONTEXTS[1]}"
        cases.append((shape, [draw.randint(*RAGGED_CONTEXTS) for _ in range(batch)]))
    for shape, lengths in cases:
        batch, most = len(lengths), max(lengths)
        num_bytes = 2 * sum(lengths) * KV_HEADS * HEAD_DIM * dtype.itemsize
        n = min(20, _copies(num_bytes, device))
        pages, tables = _pages(batch, most, n, device, dtype)
        lens = torch.tensor(lengths, dtype=torch.int32, device=device)
        qs = torch.randn(n, batch, HEADS, HEAD_DIM, device=device, dtype=dtype)

        def ours(q, table, balanced, pages=pages, lens=lens):
            return paged_decode.paged_decode_triton(q, pages, table, lens, early=True, balanced=balanced)

        engines = {
            name: _each(lambda q, t, balanced=balanced, run=ours: run(q, t, balanced), qs, tables)
            for name, balanced in (("ours", None), ("ours, a program a head", False), ("ours, balanced", True))
        }
        if _installed("flashinfer") and len(set(lengths)) == 1:
            engines["flashinfer"] = _flashinfer_decode(_installed("flashinfer"), pages, tables, qs, most)
        want = _each(lambda q, t, p=pages, s=lens: paged_decode.reference(q, p, t, s), qs, tables)
        yield Case("paged_decode", shape, "read", num_bytes, n, lambda want=want: want(0), engines)


def _flashinfer_decode(flashinfer, pages, tables, qs, length):
    """One wrapper a batch of pages, planned outside the timing."""
    batch, per_row = tables.shape[1:]
    indptr = torch.arange(0, batch * per_row + 1, per_row, dtype=torch.int32)
    last = torch.full((batch,), (length - 1) % PAGE_SIZE + 1, dtype=torch.int32)
    wrappers = []
    for table in tables:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            torch.empty(128 << 20, dtype=torch.uint8, device=qs.device),
            "NHD",
            use_tensor_cores=True,
            use_cuda_graph=True,
            paged_kv_indptr_buffer=indptr.to(qs.device),
            paged_kv_indices_buffer=table.flatten().contiguous(),
            paged_kv_last_page_len_buffer=last.to(qs.device),
        )
        heads = (HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE)
        wrapper.plan(indptr, table.flatten(), last, *heads, q_data_type=qs.dtype, kv_data_type=qs.dtype)
        wrappers.append(wrapper)
    return _each(lambda wrapper, q: wrapper.run(q, pages), wrappers, qs)


def prefill_cases(device, dtype) -> Iterator[Case]:
    """Causal, packed sequences of one length, nothing cached before; torch's SDPA on a dense batch beside it."""

    def sdpa(q, k, v):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    for batch, length in PREFILLS:
        tokens = batch * length
        qkvs = _randn(2, tokens, HEADS + 2 * KV_HEADS, HEAD_DIM, device=device, dtype=dtype)
        packed = [list(part) for part in zip(*(x.split((HEADS, KV_HEADS, KV_HEADS), dim=1) for x in qkvs))]
        dense = [[t.unflatten(0, (batch, length)).transpose(1, 2).contiguous() for t in part] for part in packed]
        indptr = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=device)
        lens = torch.full((batch,), length, dtype=torch.int32, device=device)
        pages, tables = _pages(1, PAGE_SIZE, 1, device, dtype)
        rest = (pages, tables[0].expand(batch, -1), indptr, lens)
        engines = {
            "ours": _each(lambda q, k, v, r=rest: paged_prefill.paged_prefill(q, k, v, *r, context=False), *packed),
            "torch SDPA": _each(sdpa, *dense),
        }

        def want(first=[part[0] for part in dense]):  # noqa: B006 - float32, one sequence at a time
            return torch.cat([sdpa(*(t[b : b + 1].float() for t in first)) for b in range(len(first[0]))])

        operations = 2 * batch * length * length * HEADS * HEAD_DIM
        yield Case("paged_prefill", f"{batch}x{length}", "product", operations, 2, want, engines)


CASES = {
    "rms_norm": rms_norm_cases,
    "add_rms_norm": add_rms_norm_cases,
    "silu_mul": silu_mul_cases,
    "linear": linear_cases,
    "hopper_gemm": hopper_gemm_cases,
    "paged_decode": decode_cases,
    "paged_prefill": prefill_cases,
}
