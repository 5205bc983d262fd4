"""The experiments by name, in the order of the page."""

from experiments.paper.attention import Attention
from experiments.paper.language import CacheSizes, Curves, LineBreaks, Long, Positions, Sinks, Speed
from experiments.paper.pieces import Experiment
from experiments.paper.questions import Questions
from experiments.paper.streameval import StreamEval

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        Curves(), LineBreaks(), Sinks(), Attention(), Long(), CacheSizes(), Speed(), StreamEval(), Questions(),
        Positions(),
    )
}  # fmt: skip
