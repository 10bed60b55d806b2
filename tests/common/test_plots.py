"""Figures: drawn from the CSV alone, every value in the pixels, nothing outside or on top of something else."""

import io
import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common import plots
from common.results import ResultFile, read_rows

COLUMNS = ("n", "time", "p10", "p90", "suspect")


def csv_in(folder, values, suspect=()):
    record = {"device_name": "Some CPU", "model": "tiny", "dtype": "float32", "utc_time": "2030-01-02T03:04:05Z"}
    with ResultFile(folder, "speeds", COLUMNS, record, key=["n"]) as file:
        for index, value in enumerate(values):
            file.append(n=2**index, time=value, p10=value * 0.9, p90=value * 1.2, suspect=index in suspect)
    return file.path


def draw(csv_path):
    rows = read_rows(csv_path, COLUMNS)
    xs = [row["n"] for row in rows]
    fig, ax = plots.new_figure("How long?")
    columns = ([row[name] for row in rows] for name in ("time", "p10", "p90"))
    plots.band(ax, xs, *columns, "ours", suspect=[row["suspect"] for row in rows])
    plots.ceiling_line(ax, 5.0, "memory ceiling")
    plots.log2_axis(ax, xs)
    ax.set(xlabel="batch", ylabel="seconds")
    return plots.save(fig, csv_path.with_suffix(".png"), plots.footer(csv_path))


def pixels(path):
    with Image.open(path) as image:
        return image.size, image.convert("RGB").tobytes()


def test_a_changed_value_changes_the_picture_and_the_same_values_do_not(tmp_path):
    drawings = {}
    for name, values, suspect in [
        ("one", [1, 2, 3], ()),
        ("same", [1, 2, 3], ()),
        ("value", [1, 2.1, 3], ()),
        ("hollow", [1, 2, 3], (1,)),
    ]:
        (tmp_path / name).mkdir()
        drawings[name] = pixels(draw(csv_in(tmp_path / name, values, suspect)))
    assert drawings["one"] == drawings["same"]
    assert len(set(drawings.values())) == 3
    assert drawings["one"][0] == (1200, 696)


def test_redrawing_needs_only_the_csv_and_replaces_the_picture_whole(tmp_path, monkeypatch):
    path = csv_in(tmp_path, [1, 2, 3])
    before = draw(path).read_bytes()
    path.with_suffix(".json").unlink()
    assert "speeds.csv, without provenance" in plots.footer(path)
    assert draw(path).read_bytes() != before, "the footer is in the picture"
    broken = draw(path).read_bytes()
    monkeypatch.setattr(plots.Figure, "savefig", lambda *a, **k: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        draw(path)
    assert path.with_suffix(".png").read_bytes() == broken
    assert sorted(p.name for p in tmp_path.iterdir()) == ["speeds.csv", "speeds.png"]


def test_footer_names_machine_model_dtype_and_date_of_each_file_once(tmp_path):
    path = csv_in(tmp_path, [1])
    assert plots.footer(path) == "Some CPU · tiny · float32 · 2030-01-02"
    (tmp_path / "b.json").write_text(json.dumps({"device_name": "Other", "preset": "quick"}))
    assert plots.footer(path, path, tmp_path / "b.csv") == "Some CPU · tiny · float32 · 2030-01-02  |  Other · quick"


@pytest.mark.parametrize(
    ("value", "label"),
    [(1, "1"), (128, "128"), (1000, "1000"), (1024, "1k"), (1536, "1.5k"), (1920, "1920"), (16384, "16k")]
    + [(2**20, "1M"), (5 * 2**30, "5G"), (0.25, "0.25")],
)
def test_size_labels(value, label):
    assert plots.size_label(value) == label


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 2**20), min_size=1, max_size=40))
def test_log2_axis_shows_every_point_with_at_most_twelve_exact_ticks(values):
    fig, ax = plots.new_figure("t")
    ax.plot(values, values)
    plots.log2_axis(ax, values)
    fig.canvas.draw()
    low, high = ax.get_xlim()
    assert low < min(values) and max(values) < high
    ticks = [tick for tick in ax.get_xticks() if low <= tick <= high]
    assert 1 <= len(ticks) <= plots.MAX_TICKS
    if len(set(values)) <= plots.MAX_TICKS:
        assert ticks == sorted(set(values))
    else:
        assert all(math.log2(tick) == int(math.log2(tick)) for tick in ticks)
    labels = [ax.xaxis.get_major_formatter()(tick, 0) for tick in ticks]
    assert labels == [plots.size_label(tick) for tick in ticks]


def drawn_figure(panels: int, series: int):
    fig, axes = plots.new_figure("A long question " * 12, panels=panels)
    axes = [axes] if panels == 1 else axes
    for ax in axes:
        for index in range(series):
            xs = [1, 2, 4, 8]
            plots.band(ax, xs, [index + x for x in xs], None, None, f"a series with a long name {index}")
        plots.ceiling_line(ax, 20.0, "ceiling")
        plots.log2_axis(ax, xs)
        ax.set(xlabel="batch size", ylabel="tokens per second", title="a panel")
    return fig, axes


@pytest.mark.parametrize(("panels", "series"), [(1, 1), (1, 9), (2, 3), (2, 9), (3, 2), (4, 2)])
def test_nothing_overlaps_or_is_cut_off(tmp_path, panels, series):
    fig, axes = drawn_figure(panels, series)
    plots.save(fig, tmp_path / "x.png", "a footer " * 30)
    renderer = fig.canvas.get_renderer()
    whole = fig.bbox
    boxes = [ax.get_tightbbox(renderer) for ax in axes]
    boxes += [fig._suptitle.get_window_extent(renderer), fig._supxlabel.get_window_extent(renderer)]
    for box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= whole.x1 + 1 and box.y1 <= whole.y1 + 1, "cut off"
    for one, other in itertools.combinations(boxes, 2):
        apart = one.x1 <= other.x0 + 1 or other.x1 <= one.x0 + 1 or one.y1 <= other.y0 + 1 or other.y1 <= one.y0 + 1
        assert apart, (one, other)
    for ax in axes:
        assert all(handle is not None for handle in ax.get_legend_handles_labels()[0])
        assert len(ax.get_legend().get_texts()) == series + 1
        assert ax.get_position().width * whole.width > 250, "the legend leaves the panel its room"


def test_series_look_different_and_gaps_are_gaps():
    fig, ax = plots.new_figure("t")
    for index in range(14):
        plots.band(ax, [1, 2, 4], [1.0, None, 3.0], [1.0, None, 2.0], [2.0, None, 4.0], str(index))
    lines = [line for line in ax.lines if line.get_gid() == "series"]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(looks) == 14 and len({look[0] for look in looks}) == len({look[1] for look in looks}) == 7
    assert math.isnan(lines[0].get_ydata()[1])
    fig.savefig(io.BytesIO(), format="png")


def test_the_ceiling_is_inside_the_picture_and_named_with_its_value():
    _, ax = plots.new_figure("t")
    plots.band(ax, [1, 2], [1.0, 2.0], None, None, "ours")
    plots.ceiling_line(ax, 4590.4, "read ceiling (GB/s)")
    plots.ceiling_line(ax, 56.78, "copy ceiling (GB/s)")
    assert ax.get_ylim()[1] > 4590.4
    assert ax.get_legend_handles_labels()[1] == ["ours", "read ceiling (GB/s): 4,590", "copy ceiling (GB/s): 56.78"]
    assert len({str(line.get_linestyle()) for line in ax.lines if line.get_gid() == "ceiling"}) == 2
