"""What others offer for the labs' functions, on float32 tensors: torch, torch.compile, Liger, FlashInfer.

A peer that is not installed, or that computes something else, is left out by name, with the reason.
"""

import importlib
from collections.abc import Callable


def peers(torch, lab: str, shape: tuple[int, int], epsilon: float) -> tuple[dict[str, Callable], dict[str, str]]:
    """(name -> function of x [count] and w, name -> why it is left out)."""
    return _silu(torch) if lab.startswith("silu") else _rms_norm(torch, shape, epsilon)


def _silu(torch) -> tuple[dict[str, Callable], dict[str, str]]:
    silu = torch.nn.functional.silu
    compiled = torch.compile(silu)
    found = {"torch": lambda x, w: silu(x), "torch.compile": lambda x, w: compiled(x)}
    return found, {
        "Liger": "has SiLU only fused with a product (LigerSiLUMulFunction), which moves other bytes",
        "FlashInfer": "has SiLU only fused with a product (silu_and_mul), which moves other bytes",
    }


def _rms_norm(torch, shape: tuple[int, int], epsilon: float) -> tuple[dict[str, Callable], dict[str, str]]:
    def norm(x, w):
        return torch.nn.functional.rms_norm(x.view(shape), (shape[1],), w, epsilon)

    compiled = torch.compile(norm)
    found: dict[str, Callable] = {"torch": norm, "torch.compile": compiled}
    left_out = {}
    try:
        liger = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
        found["Liger"] = lambda x, w: liger.apply(x.view(shape), w, epsilon, 0.0, "llama", False)
    except Exception as error:  # absent, or broken on this machine
        left_out["Liger"] = _reason(error, "liger-kernel")
    try:
        rmsnorm = importlib.import_module("flashinfer.norm").rmsnorm
        # Its kernels may be for 16-bit types only; then the call raises, and the caller leaves it out by name.
        found["FlashInfer"] = lambda x, w: rmsnorm(x.view(shape), w, epsilon)
    except Exception as error:
        left_out["FlashInfer"] = _reason(error, "flashinfer-python")
    return found, left_out


def _reason(error: Exception, package: str) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"not installed (pip install {package})"
    return f"{type(error).__name__}: {error}".splitlines()[0]
