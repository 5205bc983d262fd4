"""ExperimentRunner: from a configuration to result files, with everything checked first and nothing lost.

It plans, hands the cells that are missing to an executor, keeps each as it comes back, and writes each file when its
cells are there. It alone writes.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from experiments.config import ExperimentConfig, SetupError
from experiments.executors import Executor, make_executor
from experiments.model_results import CELLS, ModelResults
from experiments.models import ModelSource, find_model
from experiments.plan import Cell, ModelPlan, Task
from experiments.progress import TimeEstimator
from experiments.storage import check_writable, folder_lock
from experiments.summary import ablation_table, cell_line, main_table
from experiments.texts import default_datasets, load_texts

_NBYTES_NEEDED = 2**20  # what a run writes at least: records, losses and result files
_PROBE_STEPS = 4


@dataclass
class RunSummary:
    """What a run did, by model. `exit_code`: 0 all is well, 1 a cell failed."""

    outcomes: dict[str, ModelResults] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return 1 if self.failures else 0


class ExperimentRunner:
    """Runs an `ExperimentConfig` and writes its result files; with `output_dir` None it keeps and writes none.

    `say` gets what a person should read, a line or a table at a time. `run` raises SetupError for what is wrong
    before computing, SaveError where a result cannot be saved, and KeyboardInterrupt after having said what is done
    and what is left; a cell that fails is in the summary.
    """

    def __init__(self, config: ExperimentConfig, say: Callable[[str], None] = print):
        self.config = config
        self.say = say
        self.summary = RunSummary()

    def run(self) -> RunSummary:
        """Check everything, then run every cell that is not finished yet."""
        config, summary = self.config, self.summary
        with ExitStack() as stack:
            sources = _find_models(config)
            texts = {source.name: _load_texts(config, source) for source in sources}
            executor = stack.enter_context(make_executor(config))
            self.say(executor.description)
            if config.output_dir is not None and not config.dry_run:
                stack.enter_context(folder_lock(config.output_dir / CELLS / "lock"))
                check_writable(config.output_dir / CELLS, _NBYTES_NEEDED)
            at_once = executor.models_at_once or len(sources)
            for start in range(0, len(sources), at_once):
                models = self._plan(executor, sources[start : start + at_once], texts, first=start == 0)
                if config.dry_run:
                    self._dry_run(executor, models)
                else:
                    self._run(executor, models, later=sources[start + at_once :])
        for failure in summary.failures:
            self.say(f"FAILED: {failure}")
        return summary

    def _plan(self, executor: Executor, sources: Sequence[ModelSource], texts, first: bool) -> list[ModelResults]:
        """The models' plans. One that cannot be had is fatal where nothing has been computed yet, else a failure."""
        models = []
        for source, facts in zip(sources, executor.open(sources), strict=True):
            try:
                if isinstance(facts, SetupError):
                    raise facts
                plan = ModelPlan(self.config, source, source.info(), texts[source.name], facts)
            except SetupError as error:
                if first:
                    raise
                self.summary.failures.append(str(error))
                continue
            models.append(ModelResults(plan, self.config.output_dir, self.say))
            self._say_plan(plan)
        return models

    def _run(self, executor: Executor, models: Sequence[ModelResults], later: Sequence[ModelSource]) -> None:
        """Run what is missing, in order; keep each cell, and write each file as soon as its cells are finished."""
        by_name = {model.plan.source.name: model for model in models}
        self.summary.outcomes |= by_name
        estimator = TimeEstimator({kind: t for model in models for kind, t in model.store.earlier_times().items()})
        cells = [cell for model in models for cell in model.plan.cells]
        for model in models:
            model.prepare_folders()
            model.find_finished(move_broken=True)
            for cell in model.done:
                if model.store.folder is not None:
                    self.say(f"reused: {cell} ({model.store.path(cell, model.hashes[cell])})")
            model.write_complete()
        queue = _Queue(by_name)

        def left() -> str:
            return estimator.text([cell for model in models for cell in model.missing])

        def where(cell: Cell) -> str:
            return f"[{cells.index(cell) + 1}/{len(cells)}] {cell}"

        try:
            for outcome in executor.measure(queue.next, lambda task: f"{where(task.cell)}, left: {left()}"):
                model = by_name[outcome.cell.model]
                record = model.keep(outcome)
                if record is None:
                    self.say(f"{where(outcome.cell)}: FAILED: {outcome.reason}")
                else:
                    estimator.add(outcome.cell, outcome.wall_sec)
                    shown = cell_line(record, show_perplexity=model.plan.source.weights == "trained")
                    self.say(f"{where(outcome.cell)}: {shown}; left: {left()}")
                model.write_complete()
        except KeyboardInterrupt:
            self._say_interrupted(models, later)
            raise
        for model in models:
            model.write_complete()  # those whose last cells failed with an earlier repeat
            self._say_results(model)
            name = model.plan.source.name
            self.summary.failures += [f"{name}: {cell}: {reason}" for cell, reason in model.failed.items()]

    # --- what a person reads ----------------------------------------------------------------------------------

    def _say_plan(self, plan: ModelPlan) -> None:
        settings, facts = plan.settings, plan.facts
        self.say(
            f"model {plan.source.name}: {settings.n_sink} sinks + {settings.window_size} window, "
            f"{settings.max_eval_tokens} tokens, {len(plan.cells)} cells"
        )
        if set(facts.engines.values()) != {"eager"}:
            engines = ", ".join(f"{engine} ({backend})" for backend, engine in facts.engines.items())
            self.say(
                f"engine: {engines}; methods that cannot use it run eager; each is compared with its own baseline"
            )
        if plan.info.tokenizer is None:
            self.say(
                "its weights are random: it is measured for speed, on seeded random tokens; its perplexities mean "
                "nothing and are left out"
            )
        for warning in filter(None, (plan.beginning.warning, *(text.warning for text in plan.texts))):
            self.say(f"warning: {warning}")
        for name, reason in facts.skipped.items():
            self.say(f"skipped: {name}: {reason}")

    def _dry_run(self, executor: Executor, models: Sequence[ModelResults]) -> None:
        for model in models:
            plan, cells = model.plan, model.plan.cells
            model.find_finished(move_broken=False)
            for number, cell in enumerate(cells, start=1):
                self.say(f"[{number}/{len(cells)}] {cell}: {'already there' if cell in model.done else 'to do'}")
            for file in plan.files:
                self.say(f"file: {model.root / 'final' / (file.stem + '.json')}")
            estimator = TimeEstimator(model.store.earlier_times())
            probe_unknown_kinds(executor, model, estimator)
            self.say(f"{len(model.missing)} cells to do; time: {estimator.text(model.missing)}")

    def _say_results(self, model: ModelResults) -> None:
        name = model.plan.source.name
        if model.main:
            self.say(f"\n{name}: {model.main[0]['device']}, {model.main[0]['dtype']}")
            self.say(main_table(model.main))
        for result in model.ablations:
            kind, backend = result["ablation_type"], result["backend"]
            self.say(
                f"\n{name}: ablation of {kind}, {backend}, {result['dataset_key']}, "
                f"{result['num_tokens']} tokens, {result['held_constant']} held constant"
            )
            self.say(ablation_table(result))

    def _say_interrupted(self, models: Sequence[ModelResults], later: Sequence[ModelSource]) -> None:
        done, planned = sum(len(m.done) for m in models), sum(len(m.plan.cells) for m in models)
        self.say(f"\ninterrupted: {done} of {planned} cells are finished and kept")
        for cell in (cell for model in models for cell in model.missing):
            self.say(f"left: {cell}")
        for source in later:
            self.say(f"left: everything of model {source.name}")
        self.say("the same command goes on from here")


class _Queue:
    """The tasks that are left, in order."""

    def __init__(self, models: dict[str, ModelResults]):
        self.models = models
        self.cells = [cell for model in models.values() for cell in model.missing]

    def next(self, model: str | None) -> Task | None:
        """The next task, one of `model` if there is any left. None when there are no more."""
        while self.cells:
            cell = next((cell for cell in self.cells if cell.model == model), self.cells[0])
            self.cells.remove(cell)
            results = self.models[cell.model]
            if not results.fails_again(cell):
                return results.plan.task(cell)
        return None


def probe_unknown_kinds(executor: Executor, model: ModelResults, estimator: TimeEstimator) -> None:
    """Run a small piece of each kind of cell of which no time is known, for the estimate of a dry run."""
    kinds = {cell.kind: cell for cell in model.missing if not estimator.knows(cell)}
    probes = []
    for cell in kinds.values():
        task, cache_size = model.plan.task(cell), cell.n_sink + cell.window_size
        length = 4 * cache_size if cell.scoring == "parallel" else cache_size + _PROBE_STEPS + 1
        config = replace(model.config, warmup_steps=1, decode_sample=_PROBE_STEPS)
        probes.append(replace(task, config=config, ids=task.ids[:, :length]))
    waiting = list(probes)
    for outcome in executor.measure(lambda _: waiting.pop(0) if waiting else None, lambda task: str(task.cell)):
        run, cell = outcome.run, outcome.cell
        if run is not None:
            task = model.plan.task(cell)
            steps = model.config.warmup_steps + task.steps
            seconds = 2 * run["prefill_sec"] + steps * (run["tpot_ms"] or 0.0) / 1e3
            if "scoring_sec" in run:
                seconds += run["scoring_sec"] * task.ids.shape[1] / (run["scored_tokens"] + 1)
            estimator.add(cell, seconds)


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


def _load_texts(config: ExperimentConfig, source: ModelSource) -> list:
    return load_texts(config.datasets or default_datasets(source.weights != "random"), config.text_key)
