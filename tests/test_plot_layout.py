"""Every figure, over sparse and crowded results: no text on other text, none outside the page, bytes reproducible."""

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.text import Text
from plot_fixtures.synthetic import BACKENDS, DATASETS, METHODS, write_older, write_set

from experiments.make_report import SCRIPTS
from experiments.plotting import style
from experiments.plotting.page import FORMATS, render
from experiments.plotting.script import draw_styled
from experiments.plotting.table import read_results

LONG = ("the-strange-case-of-dr-jekyll-and-mr-hyde_0123abcd", "a_" + "very_" * 12 + "long_name", "pg19")
LAST = ("dense", "cudnn")
CASES = {
    "one method, one data set": lambda root: write_set(root, DATASETS[:1], ["streaming"], ["math"], repeats=1),
    "default": write_set,
    "crowded": lambda root: write_set(
        root, DATASETS, METHODS, BACKENDS, skip=[(d, "kvpress", "cudnn") for d in DATASETS[2:]]
    ),
    "long names": lambda root: write_set(root, LONG, METHODS, BACKENDS, model=LONG[0] * 2, drop=[(LONG[1], *LAST)]),
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
    """Visible texts and their boxes ``[n, (x0, y0, x1, y1)]`` in pixels, less a pixel: touching is not overlapping."""
    with mpl.rc_context(style.RC):
        figure.draw_without_rendering()
    unseen = {label for ax in figure.axes for label in labels_out_of_view(ax)}
    found = figure.findobj(lambda a: isinstance(a, Text) and a.get_visible() and a.get_text().strip())
    texts = [text for text in found if text not in unseen]
    boxes = np.array([text.get_window_extent().extents for text in texts]) + np.array([1, 1, -1, -1])
    shown = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return [text.get_text() for text, is_shown in zip(texts, shown, strict=True) if is_shown], boxes[shown]


def labels_out_of_view(ax):
    """Labels of ticks beyond an axis's ends: matplotlib makes them and draws none; and those of hidden axes."""
    for axis in (ax.xaxis, ax.yaxis):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            if not low <= tick.get_loc() <= high or not axis.get_visible():
                yield tick.label1
                yield tick.label2


@pytest.mark.parametrize("case", CASES)
def test_no_text_overlaps_or_leaves_the_page_which_has_a_page_s_size(case, tmp_path):
    drawings = all_drawings(CASES[case](tmp_path / "results"))
    assert drawings
    for drawing in drawings:
        figure = drawing.figure
        texts, boxes = text_boxes(figure)
        outside = (boxes[:, :2] < 0).any(axis=1) | (boxes[:, 2:] > figure.bbox.extents[2:]).any(axis=1)
        assert not outside.any(), (drawing.name, [texts[i] for i in np.flatnonzero(outside)])
        apart = (boxes[:, None, :2] >= boxes[None, :, 2:]).any(axis=2)
        clashes = np.argwhere(np.triu(~(apart | apart.T), 1))
        assert not len(clashes), (drawing.name, [(texts[i], texts[j]) for i, j in clashes])
        width, height = figure.get_size_inches()
        assert width <= 2 * style.HALF_PAGE_IN
        assert height <= 11.7


def test_same_bytes_each_time(tmp_path):
    root = write_set(tmp_path / "results", DATASETS[:1], METHODS[:2])
    names = {"fixed_eval_speedup", "comprehensive_kernel_ratio", "ablation_n_sink", "stream_curves"}

    def rendered():
        drawings = [drawing for drawing in all_drawings(root) if drawing.name in names]
        return {(d.name, suffix): render(d.figure, suffix) for d in drawings for suffix in FORMATS}

    once = rendered()
    assert once == rendered()
    assert len(once) == len(names) * len(FORMATS)
