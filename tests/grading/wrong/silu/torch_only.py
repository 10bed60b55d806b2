# A mistake on purpose: no kernel at all.
import torch


def silu_triton(input):
    return torch.nn.functional.silu(input)
