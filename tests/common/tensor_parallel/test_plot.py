"""transformer_tp2.png, from rows that are given: what is said, and that no legend lies on a bar."""

import pytest

from common import plots
from common.results import ResultFile
from common.tensor_parallel import plot

COLUMNS = ("world", "batch_size", "time_us", "time_us_p10", "time_us_p90", "allreduce_us", "memory_bytes")
COLUMNS += ("bytes_read", "one_device_us")
CEILINGS = {"device_type": "cuda", "read_gb_per_s": 4675.0, "copy_gb_per_s": 4300.0}


def drawn(folder, monkeypatch, bytes_read, reference=True):
    """The figure of three batch sizes on two GPUs, laid out."""
    figures = []
    save = plots.save
    monkeypatch.setattr(plots, "save", lambda fig, path, footer: figures.append(fig) or save(fig, path, footer))
    record = {"device": "cuda:0", "weight_bytes": 15.01e9, "ceilings": CEILINGS}
    with ResultFile(folder, plot.NAME, COLUMNS, record, key=["batch_size"]) as file:
        for batch_size in (1, 8, 32):
            times = dict.fromkeys(("time_us", "time_us_p10", "time_us_p90"), 2000.0 + 20 * batch_size)
            memory = {"memory_bytes": 10.7e9, "bytes_read": bytes_read // 2}
            one = 3700.0 + 25 * batch_size if reference else None
            file.append(world=2, batch_size=batch_size, allreduce_us=100.0, one_device_us=one, **times, **memory)
    if reference:
        with ResultFile(folder, plot.REFERENCE, ("memory_bytes", "bytes_read"), {}, key=["memory_bytes"]) as file:
            file.append(memory_bytes=18.9e9, bytes_read=bytes_read)
    plot.draw(folder)
    return figures[0]


@pytest.mark.parametrize(
    "bytes_read, groups", [(0, ["memory taken"]), (16e9, ["memory taken", "read from the checkpoint"])]
)
@pytest.mark.parametrize("reference", [True, False])
def test_what_was_not_read_is_not_shown_and_legends_lie_on_nothing(
    tmp_path, monkeypatch, bytes_read, groups, reference
):
    figure = drawn(tmp_path, monkeypatch, bytes_read, reference)
    times, memory = figure.axes
    assert [label.get_text() for label in memory.get_xticklabels()] == groups
    texts = [text.get_text() for text in memory.texts]
    assert len(texts) == len(groups) * (1 + reference) and "0 B" not in texts
    assert "weights at the read speed of 2 GPUs: 1.61 ms" in times.get_legend_handles_labels()[1]
    for ax in figure.axes:
        legend = ax.get_legend().get_window_extent()
        assert legend.y1 < ax.get_window_extent().y0, "below the panel"
        assert legend.y0 >= 0 and not legend.overlaps(figure._supxlabel.get_window_extent())
        assert all(not legend.overlaps(label.get_window_extent()) for label in ax.get_xticklabels())
