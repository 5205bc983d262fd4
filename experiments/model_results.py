"""The results of one model while they come in: cells that are finished, and each file as soon as its cells are."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from experiments.kept import KeptWork
from experiments.measuring import Outcome
from experiments.methods import METHODS
from experiments.plan import HELD_CONSTANT, MAIN, Cell, FilePlan, ModelPlan, engines_of
from experiments.results import Runs, ablation_result, fixed_eval_result, main_result, read_result, save_result
from experiments.storage import check_writable, hash_of, remove_leftovers, set_aside, write_npz

CELLS = ".cells"


class ModelResults:
    """What is done of a model's plan, and the contents of its files (`main`, `ablations`).

    `output_dir` None: nothing is kept or written. `say` is told what was reused and written.
    """

    def __init__(self, plan: ModelPlan, output_dir: Path | None, say: Callable[[str], None]):
        self.plan, self.config, self.say = plan, plan.config, say
        source = plan.source
        self.root = None if output_dir is None else output_dir / source.slug
        self.store = KeptWork(None if output_dir is None else output_dir / CELLS / (source.slug or source.name))
        self.hashes = {cell: hash_of(plan.cell_config(cell)) for cell in plan.cells}
        self.done: dict[Cell, dict] = {}
        self.failed: dict[Cell, str] = {}
        self.main: list[dict] = []
        self.ablations: list[dict] = []
        self._written: set[FilePlan] = set()

    @property
    def missing(self) -> list[Cell]:
        return [cell for cell in self.plan.cells if cell not in self.done and cell not in self.failed]

    # --- cells -----------------------------------------------------------------------------------------------

    def prepare_folders(self) -> None:
        """Remove what a killed run left, and name what is in the folders and is no result of this program."""
        if self.root is None:
            return
        remove_leftovers(self.store.folder)
        for folder in (self.root / "final", self.root / "fixed_eval"):
            check_writable(folder, 1)
            remove_leftovers(folder)
            for path in sorted(folder.glob("*.json")):
                try:
                    read_result(path)
                except (ValueError, OSError) as error:
                    self.say(f"not used: {path} is {error}")

    def find_finished(self, move_broken: bool) -> None:
        """Load the finished cells of the plan; a broken record is named, and moved away where that is allowed."""
        for cell in () if self.config.force else self.plan.cells:
            if (run := self._load(cell, move_broken)) is not None:
                self.done[cell] = run

    def _load(self, cell: Cell, move_broken: bool = True) -> dict | None:
        """The run of a finished cell."""
        config_hash = self.hashes.get(cell) or hash_of(self.plan.cell_config(cell))
        found = self.store.find(cell, config_hash, self.say, move_broken)
        return None if found is None else found.values

    def fails_again(self, cell: Cell) -> bool:
        """Whether a repeat of the cell has failed: the same again would only take time. It then counts as failed."""
        for other, reason in self.failed.items():
            if replace(other, repeat=cell.repeat) == cell:
                self.failed[cell] = reason
                return True
        return False

    def keep(self, outcome: Outcome) -> None:
        """Keep a cell that was measured, or the reason why it failed."""
        if outcome.found is None:
            self.failed[outcome.cell] = outcome.reason
        else:
            self.store.save(outcome.cell, self.plan.cell_config(outcome.cell), outcome.found, outcome.wall_sec)
            self.done[outcome.cell] = outcome.found.values

    # --- files -----------------------------------------------------------------------------------------------

    def write_complete(self) -> None:
        """Write the files of which no cell is missing, each once."""
        missing = set(self.missing)
        for file in self.plan.files:
            needed = {cell for first in file.cells for cell in self._repeats(first)}
            if file not in self._written and not needed & missing:
                self._written.add(file)
                self._write_main(file) if file.kind == MAIN else self._write_ablation(file)

    def _repeats(self, first: Cell) -> list[Cell]:
        return [replace(first, repeat=repeat) for repeat in range(self.config.repeats)]

    def _runs(self, first: Cell) -> Runs:
        """The runs of a cell: those of this plan, and more repeats of the same configuration from earlier ones."""
        cells = self._repeats(first)
        runs = [self.done[cell] for cell in cells if cell in self.done]
        for cell in cells:
            if cell in self.failed:
                return Runs(first, runs, "failed", self.failed[cell])
        return Runs(first, runs if self.config.force else runs + self._earlier_runs(first, len(cells)))

    def _earlier_runs(self, first: Cell, first_repeat: int = 0) -> list[dict]:
        runs: list[dict] = []
        while (run := self._load(replace(first, repeat=first_repeat + len(runs)))) is not None:
            runs.append(run)
        return runs

    def _methods_of_earlier_runs(self, file: FilePlan) -> Iterable[Runs]:
        """Methods that are not in this plan, but finished earlier under the same conditions: they stay in the file."""
        known = {cell.method for cell in file.cells} | set(self.plan.facts.skipped)
        chosen = self.plan.facts.engines[file.first.backend]
        for name in (name for name in METHODS if name not in known):
            for engine in engines_of(name, chosen, METHODS):
                cell = replace(file.first, method=name, engine=engine)
                if runs := self._earlier_runs(cell):
                    yield Runs(cell, runs)

    def _write_main(self, file: FilePlan) -> None:
        facts = self.plan.facts
        methods = [self._runs(cell) for cell in file.cells]
        methods += self._methods_of_earlier_runs(file)
        skipped = ((replace(file.first, method=name, engine=""), reason) for name, reason in facts.skipped.items())
        methods += [Runs(cell, (), "skipped", reason) for cell, reason in skipped]
        value = main_result(self.plan.header(file), methods, self.plan.settings.sizes, facts.environment)
        self.main.append(value)
        if self.root is None:
            return
        path = self.root / "final" / f"{file.stem}.json"
        if self._save(path, value):  # losses beside it belong to what was there
            for losses in path.parent.glob(f"{file.stem}.*.nll.npz"):
                set_aside(losses, "earlier")
        for name in value["methods"]:
            own = self.root / "fixed_eval" / f"{file.first.dataset}_{name}_backend-{file.first.backend}.json"
            self._save(own, fixed_eval_result(value, name), quiet=True)
        wanted = self.config.save_token_nll and self.plan.source.weights != "random"
        for cell in reversed(file.cells) if wanted else ():  # of several engines the first one's stay
            losses = self.store.load(cell, self.hashes[cell]).arrays if cell in self.done else {"nll": ()}
            if len(losses["nll"]):
                write_npz(path.with_name(f"{file.stem}.{cell.method}.nll.npz"), **losses)

    def _write_ablation(self, file: FilePlan) -> None:
        entries = [self._runs(cell) for cell in file.cells]
        kind, environment = file.kind.removeprefix("ablation_"), self.plan.facts.environment
        value = ablation_result(self.plan.header(file), kind, entries, HELD_CONSTANT[file.kind], environment)
        self.ablations.append(value)
        if self.root is not None:
            self._save(self.root / "final" / f"{file.stem}.json", value)

    def _save(self, path: Path, value: dict, quiet: bool = False) -> bool:
        """Save a file; whether something else was there, which has been set aside."""
        saved = save_result(path, value, keep_previous=self.config.force)
        if saved.aside is not None or not quiet:
            self.say(saved.line)
        return saved.aside is not None
