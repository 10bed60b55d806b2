"""What Triton would compile in the steps of a server, without compiling: a line of JSON for each kernel.

Triton keeps a compiled kernel under a key: the constexprs and options that a launcher chose, and of every other
argument its type and whether it is 1 or a multiple of 16. Steps of all sizes are launched with their kernels replaced
by stand-ins that note the key. Run without Triton's interpreter:

    TRITON_INTERPRET=0 python tests/common/kernels/compile_keys.py SEED
"""

import json
import random
import sys
from collections import defaultdict

import torch
from compiled_for import KERNELS, MODULES, Target  # the file beside this one
from triton.runtime import driver

from common.kernels import argmax, paged_decode, paged_prefill, rms_norm, rope_append, runtime, small_gemm
from common.tensor_parallel import push_all_reduce

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, VOCAB = 32, 8, 128, 16, 128256
WIDTH, HIDDEN = (HEADS + 2 * KV_HEADS) * HEAD_DIM, HEADS * HEAD_DIM


class Keyed:
    """Stands for a kernel: notes what of a launch's key the launcher chose, and the rest of it."""

    def __init__(self, kernel, keys):
        self.kernel, self.keys = kernel, keys

    def __getitem__(self, grid):
        def launch(*args, **options):
            binder = self.kernel.device_caches[0][-1]
            _, specialization, taken = binder(*args, **options, debug=False)
            chosen = [entry for entry in specialization if entry[0] == "constexpr"]
            rest = [entry for entry in specialization if entry[0] != "constexpr"]
            self.keys[self.kernel.__name__][str((chosen, taken))].add(str(rest))

        return launch


def attention(draw, num_decodes, num_pieces):
    """The attention of one step: decodes first, then pieces, the index arrays cut where the decodes end."""
    lengths = [draw.randint(1, 700) for _ in range(num_pieces)]
    tokens = num_decodes + sum(lengths)
    pages = torch.empty(8, 2, PAGE_SIZE, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    qkv = torch.empty(tokens, WIDTH, dtype=torch.bfloat16)
    rows = num_decodes + num_pieces
    table, lens = torch.zeros(rows, 8192 // PAGE_SIZE, dtype=torch.int32), torch.ones(rows, dtype=torch.int32)
    index, cos = torch.zeros(tokens, dtype=torch.int32), torch.empty(8192, HEAD_DIM // 2)
    n = num_decodes
    if n:
        paged_decode.rope_append_decode_triton(qkv[:n], pages, table[:n], lens[:n], cos, cos, HEADS, early=True)
    if num_pieces:
        q, k, v = rope_append.rope_append_triton(qkv[n:], pages, table, index[n:], index[n:], cos, cos, HEADS)
        indptr = torch.zeros(rows + 1, dtype=torch.int32)[n:]
        context = draw.random() < 0.5
        paged_prefill.paged_prefill_triton(q, k, v, pages, table[n:], indptr, lens[n:], context=context)
    return tokens


def products(rows):
    """The norm and the products of few rows, and the choice of a token for each."""
    x, weight = torch.empty(rows, 512, dtype=torch.bfloat16), torch.empty(1024, 512, dtype=torch.bfloat16)
    rms_norm.rms_norm_triton(x, rms_norm.Norm(x[0], 1e-5))
    if 1 < rows <= 256:
        small_gemm.small_gemm(x, weight)
    argmax.argmax_triton(torch.empty(rows, VOCAB, dtype=torch.bfloat16))


def sums(rows):
    buffer = torch.empty(push_all_reduce.buffer_bytes(2) // 8, dtype=torch.int64)
    ranks, x = push_all_reduce.PushAllReduce(0, [buffer] * 2), torch.empty(rows, 72, dtype=torch.bfloat16)
    for name in ranks.NAMES:
        if ranks.fits(name, x.nbytes):
            getattr(ranks, name)(x, x)


def main(seed):
    driver.set_active(Target(90))
    for module in (*MODULES, runtime):
        if hasattr(module, "capability"):
            module.capability = lambda device: (9, 0)
        if hasattr(module, "num_sms"):
            module.num_sms = lambda device: 132
    keys = defaultdict(lambda: defaultdict(set))
    for module, names in KERNELS.items():
        for name in names:
            setattr(module, name, Keyed(getattr(module, name), keys))
    draw = random.Random(seed)
    sizes = [(1, 0), (0, 1), (0, 16), (16, 16), (0, 32), (6, 1), (7, 16), *((n, 0) for n in range(2, 260, 7))]
    sizes += [(draw.choice([0, draw.randint(1, 256)]), draw.randint(1, 40)) for _ in range(60)]
    for num_decodes, num_pieces in sizes:
        attention(draw, num_decodes, num_pieces)
        products(num_decodes + num_pieces)
        sums(num_decodes + num_pieces)
    for kernel, choices in keys.items():
        many = {choice: sorted(rest) for choice, rest in choices.items() if len(rest) > 1}
        print(json.dumps({"kernel": kernel, "choices": len(choices), "compiled_more_than_once": many}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
