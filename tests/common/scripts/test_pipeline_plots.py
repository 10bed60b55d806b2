"""What stands in the pictures of the pipeline script, drawn from rows that are given."""

import pytest

from common import plots
from common.results import ResultFile
from common.scripts import breakdown, pipeline_plots
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


PARTS = {"qkv": 1000.0, "attention": 2000.0, "host gaps": 0.0}


def breakdown_csv(folder, wholes, in_graph):
    """Two phases whose parts take 3 ms one by one; wholes: phase -> microseconds of the step, or None for no row."""
    with ResultFile(
        folder, "pipeline_breakdown", breakdown.COLUMNS, {"decode_in_graph": in_graph}, key=("phase", "part")
    ) as file:
        for phase, whole in wholes.items():
            parts = PARTS | {"host gaps": max((whole or 0.0) - 3000.0, 0.0)}
            for name, time_us in parts.items():
                file.append(
                    phase=phase, part=name, time_us=time_us, ceiling_us=0.0 if name == breakdown.GAPS else time_us / 2
                )
            if whole is not None:
                file.append(phase=phase, part=breakdown.WHOLE, time_us=whole, ceiling_us=1500.0)
    return file


def panels_of(tmp_path, monkeypatch, wholes, in_graph=True):
    """(tick labels, texts) of each panel of `draw_breakdown`."""
    figures = []
    monkeypatch.setattr(plots, "save", lambda fig, path, footer: figures.append(fig) or path)
    pipeline_plots.draw_breakdown(breakdown_csv(tmp_path, wholes, in_graph).path)
    axes = figures[0].axes
    assert [text.get_text() for text in axes[-1].get_legend().get_texts()] == ["host gaps", "attention", "qkv"]
    ticks = [[" ".join(label.get_text().split()) for label in ax.get_xticklabels()] for ax in axes]
    return ticks, [[" ".join(text.get_text().split()) for text in ax.texts] for ax in axes]


def test_a_step_in_its_graph_is_shown_with_what_it_saves(tmp_path, monkeypatch):
    """Parts of 3 ms that take 2.4 ms as one: no bar may claim that the step takes 3 ms."""
    ticks, texts = panels_of(tmp_path, monkeypatch, {"prefill 1x8": 3500.0, "decode 2x8": 2400.0})
    assert ticks[0] == ["parts, one by one", "whole step, as it runs", "parts at their ceilings"]
    assert ticks[1] == ["parts, one by one", "whole step, in its CUDA graph", "parts at their ceilings"]
    assert "3.5 ms" in texts[0] and not any("less" in text for text in texts[0])
    assert {"3 ms", "2.4 ms", "1.5 ms"} < set(texts[1])
    assert [text for text in texts[1] if text.startswith("0.6 ms (20%) less: kernels overlap")]


def test_a_breakdown_without_graphs_or_from_before_the_whole_step_is_drawn_too(tmp_path, monkeypatch):
    ticks, texts = panels_of(tmp_path, monkeypatch, {"decode 2x8": 2400.0}, in_graph=False)
    assert "whole step, as it runs" in ticks[0] and "0.6 ms (20%) less" in texts[0]
    ticks, _ = panels_of(tmp_path, monkeypatch, {"decode 2x8": None})
    assert ticks == [["parts, one by one", "parts at their ceilings"]]


def test_the_sentence_names_the_whole_step_and_the_saving(tmp_path):
    rows = breakdown_csv(tmp_path, {"prefill 1x8": 3500.0, "decode 2x8": 2400.0}, True).rows
    assert breakdown.conclusion(rows) == (
        "prefill 1x8: 3.5 ms a step (1.5 ms at the ceilings), the largest part attention with 2 ms. "
        "decode 2x8: 2.4 ms a step (1.5 ms at the ceilings), the largest part attention with 2 ms; one by one its "
        "parts take 3 ms, the step as one saves 0.6 ms (20%)."
    )
