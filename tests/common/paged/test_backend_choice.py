"""Which backend a device gets: what cannot run there is never chosen, and refused in one line where it is asked for."""

from types import SimpleNamespace

import pytest
import torch

from common.errors import UserError
from common.paged import backends


@pytest.fixture
def on(monkeypatch):
    """A model on a CUDA device whose kernels run, or do not; the interpreter is off."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def model(*, runs, has_triton=True):
        monkeypatch.setattr(backends, "runs_triton", lambda x: runs)
        found = object() if has_triton else None
        monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: found)
        return SimpleNamespace(device=torch.device("cuda", 0), embed_tokens=None)

    return model


@pytest.mark.parametrize(
    "facts, name, captures, reason",
    [
        ({"runs": True}, "triton", True, "Triton is installed"),
        ({"runs": False}, "torch", False, "our Triton kernels do not run on this device"),
        ({"runs": False, "has_triton": False}, "torch", False, "Triton is not installed"),
    ],
)
def test_auto(facts, name, captures, reason, on):
    chosen = backends.pick_backend("auto", on(**facts))
    assert (chosen.name, chosen.captures, chosen.reason) == (name, captures, reason)


def test_triton_where_its_kernels_do_not_run(on):
    with pytest.raises(
        UserError, match="--backend triton: our kernels need compute capability 7.5; use --backend torch"
    ):
        backends.pick_backend("triton", on(runs=False))
    assert backends.pick_backend("triton", on(runs=True)).captures
    with pytest.raises(UserError, match="Triton is not installed"):
        backends.pick_backend("triton", on(runs=False, has_triton=False))
