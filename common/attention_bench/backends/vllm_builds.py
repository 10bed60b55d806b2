"""The builds of flash-attn 2 and 3 inside an installed vLLM, used without importing vLLM.

vLLM's wheel carries them as libraries of torch operators. Importing vLLM takes long and changes settings, so the file
is found beside the package and loaded alone; its operators' argument lists differ between releases, so each call is put
together from the schema that the library itself declares.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.attention_bench.backends.base import Case, CudaBackend, DecodeCase, Prepared, Unsupported, first_tensor
from common.errors import first_line

# Values of arguments that we do not care about, where "nothing" is not what their type's zero says.
NEUTRAL = {"window_size_left": -1, "window_size_right": -1, "cp_world_size": 1}


@functools.lru_cache
def find_library(stem: str) -> Path | None:
    """The file `stem`*.so of an installed vLLM, or None. find_spec reads where a package lies without running it."""
    try:
        spec = importlib.util.find_spec("vllm")
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).rglob(f"{stem}*.so")):
            return path
    return None


def bind_operator(op: Any, values: dict[str, Any]) -> list[Any]:
    """Positional arguments for a torch operator from values by name, the rest filled by default, NEUTRAL or type.

    op: an overload (`torch.ops.lib.name.default`). A value may have several names as "a|b". Raises Unsupported where
    the operator has none of a value's names, or demands a tensor that we do not give.
    """
    names = {name: key for key in values for name in key.split("|")}
    arguments, used = [], set()
    for argument in op._schema.arguments:
        kind = argument.type.kind()
        if argument.name in names:
            used.add(names[argument.name])
            arguments.append(values[names[argument.name]])
        elif argument.name in NEUTRAL:
            arguments.append(NEUTRAL[argument.name])
        elif argument.has_default_value():
            arguments.append(argument.default_value)
        elif kind == "OptionalType":
            arguments.append(None)
        elif kind in ("IntType", "FloatType", "BoolType"):
            arguments.append({"IntType": 0, "FloatType": 0.0, "BoolType": False}[kind])
        else:
            raise Unsupported(f"{op} demands {argument.name}, which this lab does not know")
    unused = [name for name in values if name not in used and values[name] is not None]
    if unused:
        raise Unsupported(f"{op} has no argument {unused[0]}")
    return arguments


class VllmFlashAttn(CudaBackend):
    def __init__(self, version: int, page_multiple: int, majors: Sequence[int]):
        self.name, self.stem, self.page_multiple = f"vllm-flash-attn-{version}", f"_vllm_fa{version}_C", page_multiple
        self.majors = majors  # of the compute capability

    def missing(self, device: torch.device) -> str | None:
        path = find_library(self.stem)
        if path is None:
            return "not installed: pip install vllm"
        reason = super().missing(device)
        if reason is None and torch.cuda.get_device_capability(device)[0] not in self.majors:
            reason = f"needs compute capability {' or '.join(f'{major}.x' for major in self.majors)}"
        if reason:
            return reason
        try:
            self._operators()
        except (OSError, RuntimeError) as error:  # built for another torch
            return f"{path.name} cannot be loaded ({first_line(error)})"
        return None

    def _operators(self) -> Any:
        torch.ops.load_library(str(find_library(self.stem)))
        return getattr(torch.ops, self.stem)

    def unsupported(self, case: Case) -> str | None:
        if isinstance(case, DecodeCase) and case.page_size % self.page_multiple:
            return f"page size {case.page_size} is not a multiple of {self.page_multiple}"
        return super().unsupported(case)


class VllmFlashAttn2(VllmFlashAttn):
    def __init__(self) -> None:
        super().__init__(2, page_multiple=16, majors=(8, 9, 10, 11, 12))

    def prepare(self, case: Case) -> Prepared:
        operators, common = self._operators(), {"softmax_scale": case.heads.head_dim**-0.5}
        if isinstance(case, DecodeCase):
            # varlen_fwd splits the context over programs for grouped heads only, fwd_kvcache always.
            op = operators.fwd_kvcache.default

            def bind(x):
                arguments = bind_operator(
                    op,
                    common
                    | {"q": x.q[:, None], "kcache": x.pages[:, 0], "vcache": x.pages[:, 1], "is_causal": False}
                    | {"seqlens_k": case.lengths, "block_table": case.page_table},
                )
                return lambda: first_tensor(op(*arguments))

        else:
            op = operators.varlen_fwd.default

            def bind(x):
                arguments = bind_operator(
                    op,
                    common
                    | {"q": x.q, "k": x.k, "v": x.v, "cu_seqlens_q": case.cu_q, "cu_seqlens_k": case.cu_kv}
                    | {"max_seqlen_q": max(case.q_lens), "max_seqlen_k": max(case.kv_lens), "is_causal": True},
                )
                return lambda: first_tensor(op(*arguments))

        return Prepared(bind)


class VllmFlashAttn3(VllmFlashAttn):
    def __init__(self) -> None:
        super().__init__(3, page_multiple=1, majors=(9,))

    def prepare(self, case: Case) -> Prepared:
        op, scale = self._operators().fwd.default, {"softmax_scale": case.heads.head_dim**-0.5}
        longest = {"max_seqlen_k": max(case.kv_lens)}

        def bind(x):
            if isinstance(case, DecodeCase):
                values = {"q": x.q[:, None], "k": x.pages[:, 0], "v": x.pages[:, 1], "is_causal": False}
                values |= {"seqused_k": case.lengths, "page_table|block_table": case.page_table} | longest
            else:  # packed, though all are as long: vLLM's build has no other kernels
                values = {"q": x.q, "k": x.k, "v": x.v, "is_causal": True, "max_seqlen_q": max(case.q_lens)}
                values |= {"cu_seqlens_q": case.cu_q, "cu_seqlens_k": case.cu_kv} | longest
            arguments = bind_operator(op, scale | values)
            return lambda: first_tensor(op(*arguments))

        return Prepared(bind)


BACKENDS = (VllmFlashAttn2(), VllmFlashAttn3())
