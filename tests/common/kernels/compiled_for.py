"""Compile our kernels as a device of one compute capability would, without the device: a line of JSON a compilation.

Triton compiles for a target that is only named. The public launchers run on CPU tensors with every launch replaced by a
compilation for that target, so the tiles are those that the launchers choose for it. Run without Triton's interpreter:

    TRITON_INTERPRET=0 python tests/common/kernels/compiled_for.py 86 float16 SMS
"""

import json
import sys
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from common.kernels import (
    argmax,
    balanced_decode,
    matvec,
    paged_decode,
    paged_prefill,
    rms_norm,
    rope_append,
    runtime,
    silu_mul,
    small_gemm,
)
from common.tensor_parallel import push_all_reduce

MODULES = (
    argmax, balanced_decode, matvec, paged_decode, paged_prefill, rms_norm, rope_append, silu_mul, small_gemm,
    push_all_reduce,
)  # fmt: skip
KERNELS = {
    argmax: ["_argmax_kernel"], matvec: ["_matvec_kernel"], paged_decode: ["_paged_decode_kernel", "_merge_kernel"],
    balanced_decode: ["_balanced_decode_kernel", "_merge_shares_kernel"],
    paged_prefill: ["_paged_prefill_kernel"], rms_norm: ["_rms_norm_kernel"], rope_append: ["_rope_append_kernel"],
    silu_mul: ["_silu_mul_kernel"], small_gemm: ["_small_gemm_kernel"],
    push_all_reduce: ["_low_latency_kernel", "_push_kernel"],
}  # fmt: skip
HEADS = ((32, 8, 128), (9, 3, 64), (16, 2, 256), (32, 32, 96))  # query heads, KV heads, head_dim


class Target:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Compiled:
    """Stands for a kernel: a launch becomes a compilation and a line of output, once for each kind of launch."""

    seen = set()

    def __init__(self, kernel, name):
        self.kernel, self.name = kernel, name

    def __getitem__(self, grid):
        def launch(*args, **options):
            found = self.kernel.warmup(*args, grid=grid, **options)
            tiles = {k: v for k, v in options.items() if isinstance(v, int)}
            line = {"kernel": self.name, "shared": found.metadata.shared, "num_warps": found.metadata.num_warps} | tiles
            if (text := json.dumps(line)) not in self.seen:
                self.seen.add(text)
                print(text, flush=True)

        return launch


def products(dtype):
    """Every kind of product of a decode step, at the widths of Llama-3-8B, of the 70B shape and of the small model."""
    for hidden, ffn, qkv in ((4096, 14336, 6144), (8192, 28672, 10240), (576, 1536, 960)):
        shapes = {
            (qkv, hidden): {}, (hidden, hidden): {"residual": True}, (2 * ffn, hidden): {"silu": True},
            (hidden, ffn): {"residual": True}, (4 * hidden, hidden): {"out_dtype": torch.float32},
        }  # fmt: skip
        for (outputs, features), options in shapes.items():
            weight = torch.empty(outputs, features, dtype=dtype)
            for rows in (1, 2, 16, 32, 64, 128, 256):
                given = dict(options)
                if given.pop("residual", False):
                    given["residual"] = torch.empty(rows, outputs, dtype=dtype)
                x = torch.empty(rows, features, dtype=dtype)
                if rows == 1:
                    norm = {"norm_weight": x[0], "eps": 1e-5} if "residual" not in given else {}
                    matvec.matvec(x, weight, **norm, **given)
                elif rows <= 16 or hidden == 4096:
                    small_gemm.small_gemm(x, weight, **given)


def elementwise(dtype):
    for rows, width in ((1, 4096), (1024, 4096), (3, 576), (5, 8192)):
        x = torch.empty(rows, width, dtype=dtype)
        rms_norm.rms_norm_triton(x, rms_norm.Norm(x[0], 1e-5))
        rms_norm.add_rms_norm_triton(x, x, rms_norm.Norm(x[0], 1e-5))
        silu_mul.silu_mul_triton(x)
    for rows in (1, 32, 256):
        argmax.argmax_triton(torch.empty(rows, 128256, dtype=dtype))


def attention(dtype):
    for num_heads, num_kv_heads, head_dim in HEADS:
        pages = torch.empty(64, 2, 16, num_kv_heads, head_dim, dtype=dtype)
        cos = torch.empty(1 << 15, head_dim // 2)
        for max_len in (2048, 32768):
            for batch in (1, 16, 32, 64, 128, 256):
                qkv = torch.empty(batch, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
                table, lens = torch.zeros(batch, max_len // 16, dtype=torch.int32), torch.ones(batch, dtype=torch.int32)
                paged_decode.rope_append_decode_triton(qkv, pages, table, lens, cos, cos, num_heads, early=True)
            q = torch.empty(batch, num_heads, head_dim, dtype=dtype)
            paged_decode.paged_decode_triton(q, pages, table, lens)
        for tokens in (17, 9000):
            qkv = torch.empty(tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
            slots = torch.zeros(tokens, dtype=torch.int32)
            q, k, v = rope_append.rope_append_triton(qkv, pages, table, slots, slots, cos, cos, num_heads)
            for context in (False, True):
                indptr = torch.tensor([0, tokens], dtype=torch.int32)
                paged_prefill.paged_prefill_triton(q, k, v, pages, table[:1], indptr, lens[:1], context=context)


def all_reduces(dtype):
    for world_size in (1, 2, 8):
        buffer = torch.empty(push_all_reduce.buffer_bytes(world_size) // 8, dtype=torch.int64)
        ranks = push_all_reduce.PushAllReduce(world_size - 1, [buffer] * world_size)
        x = torch.empty(1, 4096, dtype=dtype)
        for all_reduce in (ranks.low_latency, ranks.push):
            all_reduce(x)
            all_reduce(x, x)


def main(capability, dtype, num_sms):
    driver.set_active(Target(capability))
    for module in (*MODULES, runtime):
        if hasattr(module, "capability"):
            module.capability = lambda device: divmod(capability, 10)
        if hasattr(module, "num_sms"):
            module.num_sms = lambda device: num_sms
    for module, names in KERNELS.items():
        for name in names:
            setattr(module, name, Compiled(getattr(module, name), name))
    for group in (products, elementwise, attention, all_reduces):
        group(dtype)


if __name__ == "__main__":
    main(int(sys.argv[1]), getattr(torch, sys.argv[2]), int(sys.argv[3]))
