"""Running the policies of an experiment: what is said of a run in which kernels were compiled."""

from types import SimpleNamespace

import pytest

from common.batching import experiment
from common.scripts.start_up import KernelTimes


@pytest.mark.parametrize("hits, said", [([True], ""), ([False, True], "chunked: 1 kernels were compiled"), ([], "")])
def test_a_run_that_waited_for_a_compiler_is_named(hits, said, monkeypatch, capsys):
    """In the measured run alone: warming up is there for compiling."""
    kernels = KernelTimes()
    monkeypatch.setattr(KernelTimes, "listen", lambda self: kernels)
    served = []

    def serve(policy, setup, given, args):
        served.append(policy.label)
        for hit in hits if len(served) > 1 else [False] * 5:
            kernels(times=SimpleNamespace(total=2_000_000), cache_hit=hit)
        return SimpleNamespace(summary={"time": 1.0})

    monkeypatch.setattr(experiment, "serve", serve)
    monkeypatch.setattr(experiment, "median_run", lambda runs: runs[0])
    setup = SimpleNamespace(device_type="cuda", world=None, writes=False)
    args = SimpleNamespace(warmup=1, simulate=None, repeats=1)
    files = SimpleNamespace(has=lambda policy: False)
    experiment.serve_all([SimpleNamespace(label="chunked")], setup, [], args, files)
    assert served == ["chunked"] * 2
    out = capsys.readouterr().out
    assert said in out if said else out == ""
    if said:
        assert f"took {2.0 * len(hits):.1f} s of it" in out
