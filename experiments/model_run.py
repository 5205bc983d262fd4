"""The evaluation of one model: runs the cells that are missing, keeps each, and assembles the result files."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from experiments.bars import progress_bar
from experiments.cells import Cell, CellRecord, CellStore
from experiments.environment import environment
from experiments.methods import METHODS
from experiments.plan import HELD_CONSTANT, MAIN, FilePlan, Group, TimeEstimator, plan_cells, plan_files
from experiments.results import (
    MethodRuns,
    Saved,
    ablation_result,
    fixed_eval_result,
    hash_of,
    main_result,
    run_record,
    save_result,
)
from experiments.session import ModelSession
from experiments.storage import set_aside, write_npz
from experiments.summary import cell_line

Say = Callable[[str], None]


@dataclass
class ModelOutcome:
    """What became of a model's evaluation: the contents of its files, and the cells that failed with the reason."""

    main: list[dict] = field(default_factory=list)
    ablations: list[dict] = field(default_factory=list)
    failed: dict[Cell, str] = field(default_factory=dict)
    finished: int = 0
    planned: int = 0


class ModelRun:
    """Runs the plan of one model session into `root` (which holds `final/` and `fixed_eval/`)."""

    def __init__(self, session: ModelSession, root: Path, store: CellStore, kvpress_imported: bool, say: Say):
        self.session, self.root, self.store, self.say = session, root, store, say
        self.config = session.config
        self._kvpress_imported = kvpress_imported
        self._trained = session.source.weights == "trained"  # perplexities of random weights are not shown
        self.files = plan_files(
            self.config, session.settings, tuple(session.texts), session.machine.backends, session.methods
        )
        self.cells = plan_cells(self.files, self.config.repeats)
        self.configs = {cell: session.cell_config(cell) for cell in self.cells}
        self.done: dict[Cell, CellRecord] = {}
        self.outcome = ModelOutcome(planned=len(self.cells))
        self.estimator = TimeEstimator(store.earlier_times())

    # --- what is there already -------------------------------------------------------------------------------

    def find_finished(self, move_broken: bool) -> None:
        """Load the finished cells of this plan; a broken record is named, and moved away where that is allowed."""
        for cell in () if self.config.force else self.cells:
            record = self._load(cell, move_broken)
            if record is not None:
                self.done[cell] = record
        self.outcome.finished = len(self.done)

    def _load(self, cell: Cell, move_broken: bool) -> CellRecord | None:
        config_hash = self._hash(cell)
        try:
            return self.store.load(cell, config_hash)
        except ValueError as error:
            path = self.store.path(cell, config_hash)
            where = f"; it is kept as {self.store.set_aside(cell, config_hash)}" if move_broken else ""
            self.say(f"broken: {path} ({error}){where}; the cell counts as missing")
            return None

    def _hash(self, cell: Cell) -> str:
        return hash_of(self.configs.get(cell) or self.session.cell_config(cell))

    @property
    def missing(self) -> list[Cell]:
        return [cell for cell in self.cells if cell not in self.done and cell not in self.outcome.failed]

    # --- running ----------------------------------------------------------------------------------------------

    def run(self) -> ModelOutcome:
        """Run what is missing, in order; write each file as soon as its cells are finished."""
        self.find_finished(move_broken=True)
        for cell in self.done:
            self.say(f"reused: {cell} ({self.store.path(cell, self._hash(cell))})")
        written: set[FilePlan] = set()
        self._write_complete(written)
        for number, cell in enumerate(self.cells, start=1):
            if cell not in self.done:
                self._run_cell(number, cell)
                self._write_complete(written)
        return self.outcome

    def _run_cell(self, number: int, cell: Cell) -> None:
        where = f"[{number}/{len(self.cells)}] {cell}"
        first = replace(cell, repeat=0)
        earlier = [reason for other, reason in self.outcome.failed.items() if replace(other, repeat=0) == first]
        if earlier:  # the same again would only take time
            self.outcome.failed[cell] = earlier[0]
            return
        left = self.estimator.text(self.missing)
        start = time.perf_counter()
        record, reason = self._measure(cell, f"{where}, left: {left}")
        if record is None:
            self.outcome.failed[cell] = reason
            self.say(f"{where}: FAILED: {reason}")
            return
        self.done[cell] = record
        self.outcome.finished += 1
        self.estimator.add(cell, time.perf_counter() - start)
        self.say(f"{where}: {cell_line(record, self._trained)}; left: {self.estimator.text(self.missing)}")

    def _measure(self, cell: Cell, title: str) -> tuple[CellRecord | None, str]:
        """Run and keep one cell. This is the boundary at which a failure becomes a reason, and the others go on."""
        start = time.perf_counter()
        reason = ""
        with progress_bar(title, self.session.decode_steps(cell), self.config.progress, self._trained) as display:
            try:
                result = self.session.measure(cell, display)
            except Exception as error:  # whatever it is, it concerns this cell
                reason = describe(error)
        if reason:
            gc.collect()  # what the failed run held must not be missing to the next one
            return None, reason
        record = CellRecord(cell, self._hash(cell), run_record(result, cell.backend), time.perf_counter() - start)
        self.store.save(record, result.nll, result.position, self.configs[cell])
        return record, ""

    # --- files ------------------------------------------------------------------------------------------------

    def _write_complete(self, written: set[FilePlan]) -> None:
        """Write the files of which no cell is missing, each once."""
        missing = set(self.missing)
        for file in self.files:
            needed = {file.cell(group, repeat) for group in file.groups for repeat in range(self.config.repeats)}
            if file not in written and not needed & missing:
                self._write_main(file) if file.kind == MAIN else self._write_ablation(file)
                written.add(file)

    def _runs(self, file: FilePlan, group: Group) -> MethodRuns:
        """The runs of a group: those of this plan, and more repeats of the same configuration from earlier ones."""
        cells = [file.cell(group, repeat) for repeat in range(self.config.repeats)]
        sizes = (group.method, group.n_sink, group.window_size)
        records = [self.done[cell] for cell in cells if cell in self.done]
        failed = [self.outcome.failed[cell] for cell in cells if cell in self.outcome.failed]
        if failed:
            return MethodRuns(*sizes, tuple(record.run for record in records), "failed", failed[0])
        if not self.config.force:
            records += self._earlier_runs(file, group, first_repeat=len(cells))
        return MethodRuns(*sizes, tuple(record.run for record in records))

    def _earlier_runs(self, file: FilePlan, group: Group, first_repeat: int) -> list[CellRecord]:
        records = []
        while (record := self._load(file.cell(group, first_repeat + len(records)), move_broken=True)) is not None:
            records.append(record)
        return records

    def _write_main(self, file: FilePlan) -> None:
        settings = self.session.settings
        sizes = (settings.n_sink, settings.window_size)
        header = self.session.header(
            file.dataset, file.tokens, file.backend, file.scoring, n_sink=sizes[0], window_size=sizes[1]
        )
        methods = [self._runs(file, group) for group in file.groups]
        methods += self._methods_of_earlier_runs(file, sizes)
        methods += [MethodRuns(name, *sizes, (), "skipped", why) for name, why in self.session.skipped.items()]
        value = main_result(header, methods, sizes, self._environment())
        path = self.root / "final" / f"{file.stem}.json"
        if self._save(path, value).aside is not None:  # losses beside it belong to what was there
            for losses in path.parent.glob(f"{file.stem}.*.nll.npz"):
                set_aside(losses, "earlier")
        for name in value["methods"]:
            own = self.root / "fixed_eval" / f"{file.dataset}_{name}_backend-{file.backend}.json"
            self._save(own, fixed_eval_result(value, name), quiet=True)
        if self.config.save_token_nll:
            self._write_losses(file, path)
        self.outcome.main.append(value)

    def _methods_of_earlier_runs(self, file: FilePlan, sizes: tuple[int, int]) -> list[MethodRuns]:
        """Methods that are not in this plan, but finished earlier under the same conditions: they stay in the file."""
        known = {group.method for group in file.groups} | set(self.session.skipped)
        found = []
        for name in METHODS:
            records = [] if name in known else self._earlier_runs(file, Group(name, *sizes), first_repeat=0)
            if records:
                found.append(MethodRuns(name, *sizes, tuple(record.run for record in records)))
        return found

    def _write_losses(self, file: FilePlan, path: Path) -> None:
        for group in file.groups:
            record = self.done.get(file.cell(group, 0))
            if record is not None and self.session.source.weights != "random":
                nll, position = self.store.load_losses(record)
                if len(nll):
                    write_npz(path.with_name(f"{file.stem}.{group.method}.nll.npz"), nll=nll, position=position)

    def _write_ablation(self, file: FilePlan) -> None:
        header = self.session.header(
            file.dataset, file.tokens, file.backend, file.scoring, sizes=[list(_sizes(g)) for g in file.groups]
        )
        groups = [self._runs(file, group) for group in file.groups]
        kind = file.kind.removeprefix("ablation_")
        value = ablation_result(header, kind, groups, HELD_CONSTANT[file.kind], self._environment())
        self._save(self.root / "final" / f"{file.stem}.json", value)
        self.outcome.ablations.append(value)

    def _save(self, path: Path, value: dict, quiet: bool = False) -> Saved:
        saved = save_result(path, value, keep_previous=self.config.force)
        if saved.aside is not None or not quiet:
            self.say(str(saved))
        return saved

    def _environment(self) -> dict:
        return environment(self.session.machine.device, self.config.command, self.config.seed, self._kvpress_imported)


def _sizes(group: Group) -> tuple[int, int]:
    return group.n_sink, group.window_size


def describe(error: Exception) -> str:
    """An error as a reason: its kind and first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"out of memory: {lines[0] if lines else type(error).__name__}"
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
