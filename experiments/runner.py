"""ExperimentRunner: from a configuration to result files, with everything checked first and nothing lost."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from experiments.cells import CellStore
from experiments.config import ExperimentConfig, SetupError
from experiments.estimates import probe_seconds
from experiments.model_run import ModelOutcome, ModelRun
from experiments.models import ModelSource, find_model
from experiments.results import read_result
from experiments.session import Machine, ModelSession, check_methods_installed, resolve_machine
from experiments.storage import check_writable, folder_lock, remove_leftovers
from experiments.summary import ablation_table, main_table
from experiments.texts import Text, default_datasets, load_texts

_CELLS = ".cells"
_NBYTES_NEEDED = 2**20  # what a run writes at least: records, losses and result files


@dataclass
class RunSummary:
    """What a run did. `exit_code`: 0 all is well, 1 a cell failed."""

    outcomes: dict[str, ModelOutcome] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return 1 if self.failures else 0


class ExperimentRunner:
    """Runs an `ExperimentConfig` and writes its result files.

    `say` gets what a person should read, a line or a table at a time. `run` raises SetupError for what is wrong
    before computing, SaveError where a result cannot be saved, and KeyboardInterrupt after having said what is done
    and what is left; a cell that fails is in the summary.
    """

    def __init__(self, config: ExperimentConfig, say: Callable[[str], None] = print):
        self.config = config
        self.say = say

    def run(self) -> RunSummary:
        """Check everything, then run every cell that is not finished yet."""
        config = self.config
        machine = resolve_machine(config)
        kvpress_imported = check_methods_installed(config)
        sources = _find_models(config)
        texts = {source.name: _load_texts(config, source) for source in sources}
        self._say_machine(machine)
        if config.dry_run:
            for source in sources:
                self._dry_run(ModelSession(config, source, texts[source.name], machine), kvpress_imported)
            return RunSummary()
        with folder_lock(config.output_dir / _CELLS / "lock"):
            check_writable(config.output_dir / _CELLS, _NBYTES_NEEDED)
            return self._run_models(sources, texts, machine, kvpress_imported)

    def _run_models(self, sources, texts, machine: Machine, kvpress_imported: bool) -> RunSummary:
        summary = RunSummary()
        for number, source in enumerate(sources):
            try:
                session = ModelSession(self.config, source, texts[source.name], machine)
            except SetupError as error:
                if number == 0:  # nothing has been computed yet
                    raise
                summary.failures.append(str(error))
                self.say(f"FAILED: {error}")
                continue
            root = self._prepare_root(source)
            run = ModelRun(session, root, self._store(source), kvpress_imported, self.say)
            self._say_plan(session, run)
            try:
                outcome = run.run()
            except KeyboardInterrupt:
                self._say_interrupted(run, sources[number + 1 :])
                raise
            summary.outcomes[source.name] = outcome
            summary.failures += [f"{source.name}: {cell}: {reason}" for cell, reason in outcome.failed.items()]
            self._say_results(source, outcome)
            del session, run
            _free_memory()
        for failure in summary.failures:
            self.say(f"FAILED: {failure}")
        return summary

    # --- folders ----------------------------------------------------------------------------------------------

    def _root(self, source: ModelSource) -> Path:
        return self.config.output_dir / source.slug if source.slug else self.config.output_dir

    def _store(self, source: ModelSource) -> CellStore:
        return CellStore(self.config.output_dir / _CELLS / (source.slug or source.name))

    def _prepare_root(self, source: ModelSource) -> Path:
        """Remove what a killed run left, and name what is in the folders and is no result of this program."""
        root = self._root(source)
        remove_leftovers(self._store(source).folder)
        for folder in (root / "final", root / "fixed_eval"):
            check_writable(folder, 1)
            remove_leftovers(folder)
            for path in sorted(folder.glob("*.json")):
                try:
                    read_result(path)
                except (ValueError, OSError) as error:
                    self.say(f"not used: {path} is {error}")
        return root

    # --- what a person reads ----------------------------------------------------------------------------------

    def _say_machine(self, machine: Machine) -> None:
        backends = ", ".join(machine.backends)
        self.say(f"device {machine.device}, {machine.dtype_name}, attention backends: {backends}")

    def _say_plan(self, session: ModelSession, run: ModelRun) -> None:
        settings = session.settings
        self.say(
            f"model {session.source.name}: {settings.n_sink} sinks + {settings.window_size} window, "
            f"{settings.max_eval_tokens} tokens, {len(run.cells)} cells"
        )
        if self.config.decode_engine != "eager":
            engines = ", ".join(f"{engine} ({backend})" for backend, engine in session.engines.items())
            self.say(f"decode engine: {engines}; methods that cannot use it run eager and get no speedup")
        if session.loaded.tokenizer is None:
            self.say(
                "its weights are random: it is measured for speed, on seeded random tokens; its perplexities mean "
                "nothing and are left out"
            )
        for warning in filter(None, (session.beginning.warning, *(text.warning for text in session.texts.values()))):
            self.say(f"warning: {warning}")
        for name, reason in session.skipped.items():
            self.say(f"skipped: {name}: {reason}")

    def _dry_run(self, session: ModelSession, kvpress_imported: bool) -> None:
        run = ModelRun(session, self._root(session.source), self._store(session.source), kvpress_imported, self.say)
        self._say_plan(session, run)
        run.find_finished(move_broken=False)
        for number, cell in enumerate(run.cells, start=1):
            state = "already there" if cell in run.done else "to do"
            self.say(f"[{number}/{len(run.cells)}] {cell}: {state}")
        for file in run.files:
            self.say(f"file: {self._root(session.source) / 'final' / (file.stem + '.json')}")
        probe_unknown_kinds(run)
        self.say(f"{len(run.missing)} cells to do; time: {run.estimator.text(run.missing)}")

    def _say_results(self, source: ModelSource, outcome: ModelOutcome) -> None:
        if outcome.main:
            self.say(f"\n{source.name}: {outcome.main[0]['device']}, {outcome.main[0]['dtype']}")
            self.say(main_table(outcome.main))
        for result in outcome.ablations:
            kind, backend = result["ablation_type"], result["backend"]
            self.say(
                f"\n{source.name}: ablation of {kind}, {backend}, {result['dataset_key']}, "
                f"{result['num_tokens']} tokens, {result['held_constant']} held constant"
            )
            self.say(ablation_table(result))

    def _say_interrupted(self, run: ModelRun, later: list[ModelSource]) -> None:
        self.say(f"\ninterrupted: {run.outcome.finished} of {len(run.cells)} cells are finished and kept")
        for cell in run.missing:
            self.say(f"left: {cell}")
        for source in later:
            self.say(f"left: everything of model {source.name}")
        self.say("the same command goes on from here")


def probe_unknown_kinds(run: ModelRun) -> None:
    """Run a small piece of each kind of cell of which no time is known, for the estimate of a dry run."""
    for cell in run.missing:
        if not run.estimator.knows(cell):
            run.estimator.add(cell, probe_seconds(run.session, cell))


def _find_models(config: ExperimentConfig) -> list[ModelSource]:
    sources = [find_model(name, config.seed) for name in config.model]
    slugs = [source.slug for source in sources]
    for source in sources:
        if slugs.count(source.slug) > 1:
            raise SetupError(
                f"models {[s.name for s in sources if s.slug == source.slug]} would write into the same folder: "
                "run them with different --output-dir"
            )
    return sources


def _load_texts(config: ExperimentConfig, source: ModelSource) -> list[Text]:
    return load_texts(config.datasets or default_datasets(source.weights != "random"), config.text_key)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
