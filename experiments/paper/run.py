"""Running experiments: everything checked first, each piece kept as it is finished, a file for each experiment."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.kept import Found, KeptWork
from experiments.measuring import attempt
from experiments.paper.asking import StreamEval
from experiments.paper.attention import Attention
from experiments.paper.language import CacheSizes, Curves, LineBreaks, Long, Positions, Sinks, Speed
from experiments.paper.questions import Questions
from experiments.paper.setting import PIECES, Experiment, Piece, Setting
from experiments.progress import TimeEstimator
from experiments.results import SCHEMA_VERSION, save_result
from experiments.storage import hash_of, now, remove_leftovers

Say = Callable[[str], None]
_SHOWN = ("perplexity", "accuracy", "tpot_ms")
EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        Curves(), LineBreaks(), Sinks(), Attention(), Long(), CacheSizes(), Speed(), StreamEval(), Questions(),
        Positions(),
    )
}  # fmt: skip
"""The experiments by name, in the order of the page."""


class PaperModel:
    """The experiments of one model, and what of them is there."""

    def __init__(self, setting: Setting, experiments: Sequence[Experiment], root: Path, force: bool, say: Say):
        self.setting, self.say, self.force, self.common = setting, say, force, setting.common()
        self.folder = root / (setting.source.slug or setting.source.name)
        self.store = KeptWork(root / PIECES / self.folder.name)
        self.experiments: dict[Experiment, list[Piece]] = {}
        for experiment in experiments:
            reason = experiment.why_not(setting)
            if reason is None:
                self.experiments[experiment] = experiment.pieces(setting)
            else:
                say(f"skipped: {experiment.name}: {reason}")
        # The first of those that are the same stands for them.
        self.pieces = {p.key: p for pieces in [*self.experiments.values()][::-1] for p in pieces[::-1]}
        self.found: dict[str, Found] = {}
        self.failed: dict[str, str] = {}
        self.estimator = TimeEstimator(self.store.earlier_times())

    @property
    def missing(self) -> list[Piece]:
        return [piece for key, piece in self.pieces.items() if key not in self.found | self.failed]

    def find_finished(self, move_broken: bool) -> None:
        """Load what is finished."""
        for key, piece in {} if self.force else self.pieces.items():
            config_hash = hash_of(self.common | piece.config)
            if (found := self.store.find(piece, config_hash, self.say, move_broken)) is not None:
                self.found[key] = found

    def plan(self) -> None:
        """Say what there is to do."""
        self.find_finished(move_broken=False)
        for experiment, pieces in self.experiments.items():
            for piece in pieces:
                state = "already there" if piece.key in self.found else "to do"
                where = f"{experiment.name} ({experiment.reference})"
                self.say(f"{where}: {piece.name}, {piece.tokens:,} tokens: {state}")
            self.say(f"file: {self.folder / (experiment.name + '.json')}")
        self.say(f"{len(self.missing)} pieces to do; time: {self.estimator.text(self.missing)}")

    def run(self) -> None:
        """Compute what is missing, and write each experiment's file as soon as it is complete."""
        remove_leftovers(self.store.folder)
        self.find_finished(move_broken=True)
        for experiment, pieces in self.experiments.items():
            for piece in pieces:
                if piece.key not in self.found | self.failed:
                    number = len(self.pieces) - len(self.missing) + 1
                    what = f"[{number}/{len(self.pieces)}] {experiment.name}: {piece.name}"
                    self.say(f"{what}: {self._compute(piece)}")
            self._write(experiment, pieces)

    def _compute(self, piece: Piece) -> str:
        """Compute a piece and keep it; what became of it."""
        start = time.perf_counter()
        found, reason = attempt(piece.compute)
        if found is None:
            self.failed[piece.key] = reason
            return f"FAILED: {reason}"
        took = time.perf_counter() - start
        self.store.save(piece, self.common | piece.config, found, took)
        self.found[piece.key] = found
        self.estimator.add(piece, took)
        shown = [f"{key} {found.values[key]:.4g}" for key in _SHOWN if found.values.get(key) is not None]
        return f"{', '.join(shown) or 'done'}; left: {self.estimator.text(self.missing)}"

    def _write(self, experiment: Experiment, pieces: Sequence[Piece]) -> None:
        found = {piece.name: self.found[piece.key] for piece in pieces if piece.key in self.found}
        failed = {piece.name: self.failed[piece.key] for piece in pieces if piece.key in self.failed}
        value = {"schema_version": SCHEMA_VERSION, "kind": "paper", "experiment": experiment.name}
        value |= {"title": experiment.title, "reference": experiment.reference, **self.setting.header()}
        value |= {"config_hash": hash_of(self.common | {"pieces": [piece.config for piece in pieces]})}
        value |= experiment.result(self.setting, found) if found else {"rows": []}
        value |= {"status": "failed" if failed else "ok", "failed": failed, "timestamp": now()}
        self.say(save_result(self.folder / f"{experiment.name}.json", value).line)
