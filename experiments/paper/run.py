"""Running experiments: everything checked first, each piece kept as it is finished, a file for each experiment."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.config import SetupError
from experiments.kept import Found, KeptWork
from experiments.measuring import attempt
from experiments.paper.pieces import PIECES, Experiment, Piece, distinct
from experiments.paper.setting import Setting
from experiments.progress import TimeEstimator
from experiments.results import SCHEMA_VERSION, save_result
from experiments.storage import hash_of, now, remove_leftovers

Say = Callable[[str], None]


class PaperModel:
    """The experiments of one model, and what of them is there."""

    def __init__(self, setting: Setting, experiments: Sequence[Experiment], root: Path, force: bool, say: Say):
        self.setting, self.say, self.force = setting, say, force
        self.folder = root / (setting.source.slug or setting.source.name)
        self.store, self.common = KeptWork(root / PIECES / self.folder.name), setting.common()
        self.experiments = {}
        for experiment in experiments:
            reason = experiment.why_not(setting)
            if reason is None:
                self.experiments[experiment] = experiment.pieces(setting)
            else:
                say(f"skipped: {experiment.name}: {reason}")
        self.found: dict[str, Found] = {}
        self.failed: dict[str, str] = {}
        self.estimator = TimeEstimator(self.store.earlier_times())

    def key(self, piece: Piece) -> str:
        return hash_of(piece.config)

    @property
    def pieces(self) -> list[Piece]:
        return distinct(piece for pieces in self.experiments.values() for piece in pieces)

    @property
    def missing(self) -> list[Piece]:
        return [piece for piece in self.pieces if self.key(piece) not in self.found | self.failed]

    def find_finished(self, move_broken: bool) -> None:
        """Load what is finished."""
        for piece in () if self.force else self.pieces:
            config_hash = hash_of(self.common | piece.config)
            if (found := self.store.find(piece, config_hash, self.say, move_broken)) is not None:
                self.found[self.key(piece)] = found

    def run(self) -> list[Path]:
        """Compute what is missing, and write each experiment's file as soon as it is complete; -> their paths."""
        remove_leftovers(self.store.folder)
        self.find_finished(move_broken=True)
        written, total = [], len(self.pieces)
        for experiment, pieces in self.experiments.items():
            for piece in pieces:
                if self.key(piece) in self.found | self.failed:
                    continue
                number = total - len(self.missing) + 1
                start = time.perf_counter()
                found, reason = attempt(piece.compute)
                took = time.perf_counter() - start
                if found is None:
                    self.failed[self.key(piece)] = reason
                    self.say(f"[{number}/{total}] {experiment.name}: {piece.name}: FAILED: {reason}")
                    continue
                self.store.save(piece, self.common | piece.config, found, took)
                self.found[self.key(piece)] = found
                self.estimator.add(piece, took)
                left = self.estimator.text(self.missing)
                self.say(f"[{number}/{total}] {experiment.name}: {piece.name}: {_summary(found)}; left: {left}")
            written.append(self._write(experiment, pieces))
        return written

    def _write(self, experiment: Experiment, pieces: Sequence[Piece]) -> Path:
        found = {piece.name: self.found[self.key(piece)] for piece in pieces if self.key(piece) in self.found}
        failed = {piece.name: self.failed[self.key(piece)] for piece in pieces if self.key(piece) in self.failed}
        value = {"schema_version": SCHEMA_VERSION, "kind": "paper", "experiment": experiment.name}
        value |= {"title": experiment.title, "reference": experiment.reference, **self.setting.header()}
        value |= {"config_hash": hash_of(self.common | {"pieces": [piece.config for piece in pieces]})}
        value |= experiment.result(self.setting, found) if found else {"rows": []}
        value |= {"status": "failed" if failed else "ok", "failed": failed, "timestamp": now()}
        path = self.folder / f"{experiment.name}.json"
        self.say(str(save_result(path, value)))
        return path


def _summary(found: Found) -> str:
    shown = [f"{key} {value:.4g}" for key, value in found.values.items()
             if key in ("perplexity", "accuracy", "tpot_ms") and value is not None]  # fmt: skip
    return ", ".join(shown) or "done"


def plan_lines(model: PaperModel) -> list[str]:
    """What there is to do, for a dry run."""
    model.find_finished(move_broken=False)
    lines = []
    for experiment, pieces in model.experiments.items():
        for piece in pieces:
            state = "already there" if model.key(piece) in model.found else "to do"
            lines.append(f"{experiment.name} ({experiment.reference}): {piece.name}, {piece.tokens:,} tokens: {state}")
        lines.append(f"file: {model.folder / (experiment.name + '.json')}")
    lines.append(f"{len(model.missing)} pieces to do; time: {model.estimator.text(model.missing)}")
    return lines


def require_known(names: Sequence[str] | None, known: dict[str, Experiment]) -> list[Experiment]:
    """The experiments of these names, in their order; all if none are given. Raises SetupError."""
    from experiments.config import unknown_name

    for name in names or ():
        if name not in known:
            raise unknown_name("experiment", name, known)
    chosen = [known[name] for name in dict.fromkeys(known if names is None else names)]
    if not chosen:
        raise SetupError("--only needs a name")
    return chosen
