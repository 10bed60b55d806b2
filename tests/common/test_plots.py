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


def shown_labels(ax, axis="x"):
    """(tick, text, box) of the labels that can be seen, in the drawn figure."""
    which, limits = (ax.xaxis, ax.get_xlim()) if axis == "x" else (ax.yaxis, ax.get_ylim())
    ticks = zip(which.get_majorticklocs(), which.get_ticklabels())
    found = [(at, label) for at, label in ticks if label.get_text() and limits[0] <= at <= limits[1]]
    return [(at, label.get_text(), label.get_window_extent()) for at, label in found]


def apart(boxes, axis="x"):
    edges = [(box.x0, box.x1) if axis == "x" else (box.y0, box.y1) for box in boxes]
    return all(one[1] < other[0] for one, other in itertools.pairwise(sorted(edges)))


@pytest.mark.parametrize("panels, ratios", [(2, (1, 2)), (2, (1, 5)), (1, (1,)), (4, (1, 1))])
def test_sizes_from_kilobytes_to_gigabytes_keep_their_labels_apart(tmp_path, panels, ratios):
    """2^10..2^30 in a third of the figure, in less and in more: no two labels touch, the same number of ticks apart."""
    fig, axes = plots.new_figure("t", panels=panels, width_ratios=ratios)
    ax = axes if panels == 1 else axes[0]
    sizes = [2**e for e in range(10, 31)]
    plots.band(ax, sizes, sizes, None, None, "time")
    plots.log2_axis(ax, sizes)
    plots.save(fig, tmp_path / "x.png", "f")
    shown = shown_labels(ax)
    assert len(shown) >= 3 and apart([box for _, _, box in shown]), [text for _, text, _ in shown]
    assert [text for _, text, _ in shown] == [plots.size_label(at) for at, _, _ in shown]
    strides = {math.log2(b[0] / a[0]) for a, b in itertools.pairwise(shown)}
    assert len(strides) == 1, "one stride for all"
    if panels == 1:
        assert len(shown) == len([t for t in ax.get_xticks() if t <= 2**30]), "with room for all none is left out"


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 2**24), min_size=1, max_size=12), st.sampled_from(["x", "y"]))
def test_labels_of_any_sizes_stay_apart(values, axis):
    fig, axes = plots.new_figure("t", panels=4)
    axes[0].plot(values, values)
    plots.log2_axis(axes[0], values, axis)
    fig.canvas.draw()
    shown = shown_labels(axes[0], axis)
    assert shown and apart([box for _, _, box in shown], axis), [text for _, text, _ in shown]


@settings(max_examples=15, deadline=None)
@given(st.floats(-6, 6), st.floats(0.35, 1.0))
def test_a_crowded_log_axis_keeps_the_round_label(start, decades):
    """0.6 0.7 0.8 0.9 _ 2 is no axis: what is left out is not the power of ten."""
    low, high = 10.0**start, 10.0 ** (start + decades)
    fig, axes = plots.new_figure("t", panels=4)
    axes[0].plot([1, 2], [low, high])
    plots.log_axis(axes[0])
    fig.canvas.draw()
    shown = shown_labels(axes[0], "y")
    assert shown and apart([box for _, _, box in shown], "y"), [text for _, text, _ in shown]
    powers = [at for at in axes[0].yaxis.get_majorticklocs() if f"{at:.0e}"[0] == "1"]
    bottom, top = axes[0].get_ylim()
    assert {at for at in powers if bottom <= at <= top} <= {at for at, _, _ in shown}


@pytest.mark.parametrize("values, is_log", [([10, 11, 12, 230], False), ([10, 11, 12, 250], True), ([0, 0, 5], False)])
def test_panels_share_a_log_axis_only_where_the_largest_is_far_above_the_median(values, is_log):
    _, axes = plots.new_figure("t", panels=2)
    for ax, part in zip(axes, (values[:2], values[2:])):
        ax.plot(range(len(part)), part)
        ax.set_ylabel("ms")
    plots.shared_y_axis(axes, values)
    assert {ax.get_yscale() for ax in axes} == {"log" if is_log else "linear"}
    assert {ax.get_ylabel() for ax in axes} == {"ms (log)" if is_log else "ms"}
    (low, high), second = (ax.get_ylim() for ax in axes)
    assert (low, high) == second and low <= min(values) and max(values) < high
    assert is_log or low == 0


@pytest.mark.parametrize(
    "value, text",
    [(9350.0, "9,350"), (12345678.9, "12,345,679"), (999.96, "1,000"), (999.9, "999.9"), (1.6061, "1.606"), (0, "0")],
)
def test_numbers_are_never_in_powers_of_ten(value, text):
    assert plots.number(value) == text


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
    plots.ceiling_line(ax, 4590.4, "read ceiling", "GB/s")
    plots.ceiling_line(ax, 56.78, "no unit")
    assert ax.get_ylim()[1] > 4590.4
    assert ax.get_legend_handles_labels()[1] == ["ours", "read ceiling: 4,590 GB/s", "no unit: 56.78"]
    assert len({str(line.get_linestyle()) for line in ax.lines if line.get_gid() == "ceiling"}) == 2
