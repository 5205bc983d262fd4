"""The results of one model while they come in: cells that are finished, and each file as soon as its cells are."""

from collections.abc import Callable, Iterable
from pathlib import Path

from experiments.cells import CellStore
from experiments.measuring import Outcome
from experiments.methods import METHODS
from experiments.plan import HELD_CONSTANT, MAIN, Cell, FilePlan, Group, ModelPlan, engines_of
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
        self.store = CellStore(None if output_dir is None else output_dir / CELLS / (source.slug or source.name))
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

    def _load(self, cell: Cell, move_broken: bool) -> dict | None:
        config_hash = self.hashes.get(cell) or hash_of(self.plan.cell_config(cell))
        try:
            return self.store.load(cell, config_hash)
        except ValueError as error:
            path = self.store.path(cell, config_hash)
            where = f"; it is kept as {self.store.set_aside(cell, config_hash)}" if move_broken else ""
            self.say(f"broken: {path} ({error}){where}; the cell counts as missing")
            return None

    def fails_again(self, cell: Cell) -> bool:
        """Whether a repeat of the cell has failed: the same again would only take time. It then counts as failed."""
        for other, reason in self.failed.items():
            if other.without_repeat == cell.without_repeat:
                self.failed[cell] = reason
                return True
        return False

    def keep(self, outcome: Outcome) -> None:
        """Keep a cell that was measured, or the reason why it failed."""
        if outcome.run is None:
            self.failed[outcome.cell] = outcome.reason
        else:
            self.store.save(outcome, self.plan.cell_config(outcome.cell))
            self.done[outcome.cell] = outcome.run

    # --- files -----------------------------------------------------------------------------------------------

    def write_complete(self) -> None:
        """Write the files of which no cell is missing, each once."""
        missing = set(self.missing)
        for file in self.plan.files:
            needed = {file.cell(group, repeat) for group in file.groups for repeat in range(self.config.repeats)}
            if file not in self._written and not needed & missing:
                self._written.add(file)
                self._write_main(file) if file.kind == MAIN else self._write_ablation(file)

    def _runs(self, file: FilePlan, group: Group) -> Runs:
        """The runs of a group: those of this plan, and more repeats of the same configuration from earlier ones."""
        cells = [file.cell(group, repeat) for repeat in range(self.config.repeats)]
        runs = [self.done[cell] for cell in cells if cell in self.done]
        for cell in cells:
            if cell in self.failed:
                return Runs(group, runs, "failed", self.failed[cell])
        return Runs(group, runs if self.config.force else runs + self._earlier_runs(file, group, len(cells)))

    def _earlier_runs(self, file: FilePlan, group: Group, first_repeat: int) -> list[dict]:
        runs: list[dict] = []
        while (run := self._load(file.cell(group, first_repeat + len(runs)), move_broken=True)) is not None:
            runs.append(run)
        return runs

    def _methods_of_earlier_runs(self, file: FilePlan, sizes: tuple[int, int]) -> Iterable[Runs]:
        """Methods that are not in this plan, but finished earlier under the same conditions: they stay in the file."""
        known = {group.method for group in file.groups} | set(self.plan.facts.skipped)
        chosen = self.plan.facts.engines[file.backend]
        for name in (name for name in METHODS if name not in known):
            for engine in engines_of(name, chosen, METHODS):
                group = Group(name, engine, *sizes)
                if runs := self._earlier_runs(file, group, first_repeat=0):
                    yield Runs(group, runs)

    def _write_main(self, file: FilePlan) -> None:
        plan, sizes = self.plan, self.plan.settings.sizes
        methods = [self._runs(file, group) for group in file.groups]
        methods += self._methods_of_earlier_runs(file, sizes)
        methods += [Runs(Group(name, "", *sizes), (), "skipped", why) for name, why in plan.facts.skipped.items()]
        value = main_result(plan.header(file), methods, sizes, plan.facts.environment)
        self.main.append(value)
        if self.root is None:
            return
        path = self.root / "final" / f"{file.stem}.json"
        if self._save(path, value):  # losses beside it belong to what was there
            for losses in path.parent.glob(f"{file.stem}.*.nll.npz"):
                set_aside(losses, "earlier")
        for name in value["methods"]:
            own = self.root / "fixed_eval" / f"{file.dataset}_{name}_backend-{file.backend}.json"
            self._save(own, fixed_eval_result(value, name), quiet=True)
        if self.config.save_token_nll and self.plan.source.weights != "random":
            self._write_losses(file, path)

    def _write_losses(self, file: FilePlan, path: Path) -> None:
        for group in reversed(file.groups):  # of several engines the first one's stay
            cell = file.cell(group, 0)
            if cell in self.done:
                nll, position = self.store.load_losses(cell, self.hashes[cell])
                if len(nll):
                    write_npz(path.with_name(f"{file.stem}.{group.method}.nll.npz"), nll=nll, position=position)

    def _write_ablation(self, file: FilePlan) -> None:
        groups = [self._runs(file, group) for group in file.groups]
        kind, environment = file.kind.removeprefix("ablation_"), self.plan.facts.environment
        value = ablation_result(self.plan.header(file), kind, groups, HELD_CONSTANT[file.kind], environment)
        self.ablations.append(value)
        if self.root is not None:
            self._save(self.root / "final" / f"{file.stem}.json", value)

    def _save(self, path: Path, value: dict, quiet: bool = False) -> bool:
        """Save a file; whether something else was there, which has been set aside."""
        saved = save_result(path, value, keep_previous=self.config.force)
        if saved.aside is not None or not quiet:
            self.say(str(saved))
        return saved.aside is not None
