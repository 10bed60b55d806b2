"""flash-attn 2, 3 and 4, as their own packages: `flash_attn`, `flash_attn_interface`, `flash_attn.cute`.

All three align the causal mask bottom-right. Parameters were renamed between versions (`block_table`, `page_table`), so
only those that the installed version knows are passed.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from common.attention_bench.backends.base import (
    Case,
    CudaBackend,
    DecodeCase,
    PrefillCase,
    Prepared,
    Unsupported,
    first_tensor,
)
from common.errors import first_line


def known_options(function: Callable, options: dict[str, Any]) -> dict[str, Any]:
    """`options` under the names that this version of `function` has; one may be given under several names as "a|b".

    Raises Unsupported where the function has none of an option's names, unless the value is None.
    """
    known, chosen = inspect.signature(function).parameters, {}
    for names, value in options.items():
        name = next((name for name in names.split("|") if name in known), None)
        if name is not None:
            chosen[name] = value
        elif value is not None:
            raise Unsupported(f"this version's {function.__name__} has no {names.replace('|', ' or ')}")
    return chosen


class FlashAttn(CudaBackend):
    def __init__(self, name: str, module: str, install: str, page_multiple: int = 1):
        self.name, self.module_name, self.install, self.page_multiple = name, module, install, page_multiple

    def missing(self, device: torch.device) -> str | None:
        try:
            found = importlib.util.find_spec(self.module_name) is not None
        except Exception:  # the parent package is not there, or breaks while it is imported
            found = False
        if not found:
            return f"not installed: {self.install}"
        reason = super().missing(device)
        if reason:
            return reason
        try:
            if not hasattr(self._module(), "flash_attn_func"):  # flash-attn 4 alone leaves an empty `flash_attn`
                return f"not installed: {self.install}"
        except Exception as error:  # built for another torch, driver or card: whatever it raises, it is not usable
            return f"cannot be imported ({first_line(error)})"
        return None

    def _module(self) -> ModuleType:
        return importlib.import_module(self.module_name)

    def unsupported(self, case: Case) -> str | None:
        if isinstance(case, DecodeCase) and case.page_size % self.page_multiple:
            return f"page size {case.page_size} is not a multiple of {self.page_multiple}"
        return super().unsupported(case)

    def prepare(self, case: Case) -> Prepared:
        module = self._module()
        if isinstance(case, PrefillCase):
            return Prepared(lambda x: self._prefill(module, case, x))
        return Prepared(lambda x: self._decode(module, case, x))

    def _prefill(self, module: ModuleType, case: PrefillCase, x):
        if case.seq_len is not None:
            q, k, v = (t.view(case.batch, case.seq_len, *t.shape[1:]) for t in (x.q, x.k, x.v))
            return lambda: first_tensor(module.flash_attn_func(q, k, v, causal=True))
        bounds = {
            "cu_seqlens_q": case.cu_q,
            "cu_seqlens_k": case.cu_kv,
            "max_seqlen_q": max(case.q_lens),
            "max_seqlen_k": max(case.kv_lens),
        }
        chosen = known_options(module.flash_attn_varlen_func, bounds)
        return lambda: first_tensor(module.flash_attn_varlen_func(x.q, x.k, x.v, **chosen, causal=True))

    def _decode(self, module: ModuleType, case: DecodeCase, x):
        k, v = x.pages[:, 0], x.pages[:, 1]
        if hasattr(module, "flash_attn_with_kvcache"):
            function, q = module.flash_attn_with_kvcache, x.q[:, None]  # [B, 1, Hq, d]
            options = {"cache_seqlens": case.lengths, "block_table|page_table": case.page_table}
        else:  # flash-attn 4 has one function for everything
            function, q = module.flash_attn_varlen_func, x.q
            options = {
                "cu_seqlens_q": case.cu_q,
                "seqused_k": case.lengths,
                "page_table|block_table": case.page_table,
                "max_seqlen_q": 1,
                "max_seqlen_k": max(case.kv_lens),
            }
            optional = ("max_seqlen_q", "max_seqlen_k")
            known = inspect.signature(function).parameters
            options = {name: value for name, value in options.items() if name in known or name not in optional}
        chosen = known_options(function, options)
        return lambda: first_tensor(function(q, k, v, **chosen))


BACKENDS = (
    FlashAttn("flash-attn-2", "flash_attn", "pip install flash-attn --no-build-isolation", page_multiple=256),
    FlashAttn(
        "flash-attn-3", "flash_attn_interface", "build the folder hopper/ of github.com/Dao-AILab/flash-attention"
    ),
    FlashAttn("flash-attn-4", "flash_attn.cute", "pip install flash-attn-4"),
)
