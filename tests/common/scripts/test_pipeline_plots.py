"""What stands in the pictures of the pipeline script, drawn from rows that are given."""

import pytest

from common import plots
from common.results import ResultFile
from common.scripts import pipeline_plots
from common.scripts.pipeline_sweeps import COLUMNS, KEY


def drawn(tmp_path, monkeypatch, name):
    """The axes of `draw_sweep` over two points whose ceiling is 1,000 and whose bound is 800."""
    figures = []
    monkeypatch.setattr(plots, "save", lambda fig, path, footer: figures.append(fig) or path)
    with ResultFile(tmp_path, name, COLUMNS, {}, key=KEY) as file:
        for tokens in (128, 512):
            sizes = {"backend": "torch", "batch_size": 1, "prompt_tokens": tokens, "output_tokens": tokens}
            shares = {"tokens_per_s": 500.0, "mbu": 0.1, "mfu": 0.5, "bound_tokens_per_s": 800.0}
            times = dict.fromkeys(("time", "time_p10", "time_p90", "prefill_time"), 1.0)
            file.append(**sizes, **shares, **times)
    pipeline_plots.draw_sweep(file.path)
    return figures[0].axes


@pytest.mark.parametrize("name, has_bound", [("pipeline_prefill", True), ("pipeline_decode", False)])
def test_the_bound_is_drawn_beside_the_ceiling_of_a_prefill(tmp_path, monkeypatch, name, has_bound):
    left = drawn(tmp_path, monkeypatch, name)[0]
    lines = {line.get_label().split(":")[0]: list(line.get_ydata()) for line in left.lines}
    assert lines["ceiling"] == [1000, 1000] and lines["torch"] == [500, 500]
    assert lines.get("bound") == ([800, 800] if has_bound else None)
