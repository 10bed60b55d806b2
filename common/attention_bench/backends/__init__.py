"""Every way to compute attention that this lab knows, one file a library, each found when a script runs.

    prepared = backend.prepare(case); call = prepared.bind(inputs); out = call()

Their names and families, which the command line needs without torch, are in common/attention_bench/options.py.
"""

from common.attention_bench.backends import (
    flash_attn,
    flashinfer,
    torch_gather,
    torch_sdpa,
    torch_varlen,
    triton_kernels,
    vllm_builds,
)
from common.attention_bench.backends.base import Backend

ALL: tuple[Backend, ...] = (
    *torch_sdpa.BACKENDS,
    *torch_varlen.BACKENDS,
    *torch_gather.BACKENDS,
    *flash_attn.BACKENDS,
    *vllm_builds.BACKENDS,
    *flashinfer.BACKENDS,
    *triton_kernels.BACKENDS,
)
BY_NAME = {backend.name: backend for backend in ALL}
