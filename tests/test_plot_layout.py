"""Every figure, over sparse and crowded results: no text on other text, none outside the page, bytes reproducible."""

import matplotlib as mpl
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from plot_fixtures.synthetic import BACKENDS, DATASETS, METHODS, write_older, write_set

from experiments import (
    plot_ablation_results,
    plot_comprehensive_results,
    plot_decode_loop_comparison,
    plot_fixed_eval_results,
    plot_stream_curves,
)
from experiments.plotting import style
from experiments.plotting.output import FORMATS, render
from experiments.plotting.reading import read_results
from experiments.plotting.script import draw_styled

SCRIPTS = (
    plot_fixed_eval_results,
    plot_comprehensive_results,
    plot_decode_loop_comparison,
    plot_ablation_results,
    plot_stream_curves,
)

CASES = {
    "one method, one data set": lambda root: write_set(root, DATASETS[:1], ["streaming"], ["math"], repeats=1),
    "default": write_set,
    "crowded": lambda root: write_set(
        root, DATASETS, METHODS, BACKENDS, skip=[(d, "kvpress", "cudnn") for d in DATASETS[2:]]
    ),
    "milliseconds": lambda root: write_set(root, DATASETS[:3], METHODS, BACKENDS[:2], time_scale=1e-3),
    "hours": lambda root: write_set(root, DATASETS[:1], METHODS, ["flash"], time_scale=1e4),
    "random weights": lambda root: write_set(root, DATASETS[:1], METHODS, BACKENDS[:2], weights="random"),
    "older": write_older,
    "older and new": lambda root: write_older(write_set(root, DATASETS[:2]) / "fixed_eval").parent,
}


def all_drawings(root):
    results = read_results(root)
    assert not results.problems
    return [d for script in SCRIPTS for d in draw_styled(script.draw, results) if d.figure is not None]


def text_boxes(figure):
    """Visible texts with their boxes in pixels, shrunk by a pixel: touching is not overlapping."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    with mpl.rc_context(style.RC):
        figure.draw(renderer)
    unseen = {label for ax in figure.axes for label in labels_out_of_view(ax)}
    boxes = []
    for text in figure.findobj(lambda a: isinstance(a, Text) and a.get_visible() and a.get_text().strip()):
        box = text.get_window_extent(renderer)
        if text not in unseen and box.width > 2 and box.height > 2:
            boxes.append((text.get_text(), box.padded(-1.0)))
    return boxes


def labels_out_of_view(ax):
    """Labels of ticks beyond an axis's ends: matplotlib makes them and draws none."""
    for axis in (ax.xaxis, ax.yaxis):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            if not low <= tick.get_loc() <= high:
                yield tick.label1
                yield tick.label2


@pytest.mark.parametrize("case", CASES)
def test_no_text_overlaps_or_leaves_the_page(case, tmp_path):
    drawings = all_drawings(CASES[case](tmp_path / "results"))
    assert drawings
    for drawing in drawings:
        page = drawing.figure.bbox
        boxes = text_boxes(drawing.figure)
        outside = [t for t, b in boxes if b.x0 < 0 or b.y0 < 0 or b.x1 > page.width or b.y1 > page.height]
        assert not outside, (drawing.name, outside)
        clashes = [(t, u) for i, (t, b) in enumerate(boxes) for u, c in boxes[:i] if b.overlaps(c)]
        assert not clashes, (drawing.name, clashes)


def test_width_is_half_a_page_or_a_page(tmp_path):
    for drawing in all_drawings(CASES["crowded"](tmp_path)):
        width, height = drawing.figure.get_size_inches()
        assert width <= 2 * style.WIDTH_IN
        assert height <= 11.7 or width == style.WIDTH_IN


@pytest.mark.parametrize("suffix", FORMATS)
def test_same_bytes_each_time(suffix, tmp_path):
    root = write_set(tmp_path / "results", DATASETS[:1], METHODS[:2])
    names = ("fixed_eval_speedup", "comprehensive_kernel_ratio", "ablation_n_sink", "stream_curves")
    once, again = ({d.name: render(d.figure, suffix) for d in all_drawings(root) if d.name in names} for _ in "12")
    assert once == again
    assert set(once) == set(names)
