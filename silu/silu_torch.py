"""The reference of the Triton lab: SiLU in plain torch. It accepts any shape, stride and floating dtype.

python silu/silu_torch.py
"""

import torch


def silu_torch(input: torch.Tensor) -> torch.Tensor:
    """input * sigmoid(input), computed in float32 or wider, in the input's dtype and shape."""
    wide = input if input.dtype == torch.float64 else input.float()
    return (wide * torch.sigmoid(wide)).to(input.dtype)


if __name__ == "__main__":
    x = torch.linspace(-4, 4, 9)
    for a, b in zip(x.tolist(), silu_torch(x).tolist()):
        print(f"silu({a:4.1f}) = {b:7.4f}")
