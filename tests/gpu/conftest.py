"""What all tests on a GPU share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def ieee_products():
    """No TF32 on either side of a comparison."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
