"""What all tests on a GPU share."""

import gc

import pytest
import torch


@pytest.fixture(autouse=True)
def ieee_products():
    """No TF32 on either side of a comparison."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def empty_device():
    """Nothing left of the tests before: their engines hold memory in cycles and torch keeps it in its own pool."""
    gc.collect()
    torch.cuda.empty_cache()
    yield
    gc.collect()
    torch.cuda.empty_cache()
