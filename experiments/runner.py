"""ExperimentRunner: from a configuration to result files, with everything checked first and nothing lost.

It plans, hands the cells that are missing to an executor, keeps each as it comes back, and writes each file when its
cells are there. It alone writes.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from experiments.config import ExperimentConfig, SetupError
from experiments.executors import CellQueue, InProcess, Probes
from experiments.model_results import CELLS, ModelResults
from experiments.models import ModelSource, find_model
from experiments.plan import ModelPlan
from experiments.progress import ablation_table, cell_line, main_table
from experiments.storage import check_writable, folder_lock
from experiments.texts import default_datasets, load_texts

_NBYTES_NEEDED = 2**20  # what a run writes at least: records, losses and result files


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
            texts = {}
            for source in sources:
                names = config.datasets or default_datasets(source.weights != "random")
                texts[source.name] = load_texts(names, config.text_key)
            executor = make_executor(config)
            stack.callback(executor.close)
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

    def _plan(self, executor, sources: Sequence[ModelSource], texts, first: bool) -> list[ModelResults]:
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

    def _run(self, executor, models: Sequence[ModelResults], later: Sequence[ModelSource]) -> None:
        """Run what is missing, in order; keep each cell, and write each file as soon as its cells are finished."""
        by_name = {model.plan.source.name: model for model in models}
        self.summary.outcomes |= by_name
        for model in models:
            model.prepare_folders()
            model.find_finished(move_broken=True)
            for cell in model.done:
                self.say(f"reused: {cell} ({model.store.path(cell, model.hashes[cell])})")
            model.write_complete()
        queue = CellQueue(models)
        try:
            for outcome in executor.measure(queue):
                cell, model = outcome.cell, by_name[outcome.cell.model]
                model.keep(outcome)
                if outcome.found is None:
                    self.say(f"{queue.title(cell)}: FAILED: {outcome.reason}")
                else:
                    queue.estimator.add(cell, outcome.wall_sec)
                    shown = cell_line(outcome.found.values, show_perplexity=model.plan.source.weights == "trained")
                    self.say(f"{queue.title(cell)}: {shown}; left: {queue.time_left()}")
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

    def _dry_run(self, executor, models: Sequence[ModelResults]) -> None:
        for model in models:
            plan, cells = model.plan, model.plan.cells
            model.find_finished(move_broken=False)
            for number, cell in enumerate(cells, start=1):
                self.say(f"[{number}/{len(cells)}] {cell}: {'already there' if cell in model.done else 'to do'}")
            for file in plan.files:
                self.say(f"file: {model.root / 'final' / (file.stem + '.json')}")
            probes = Probes(model)
            for outcome in executor.measure(probes):
                if outcome.found is not None:
                    probes.add(outcome.found.values, plan.task(outcome.cell))
            self.say(f"{len(model.missing)} cells to do; time: {probes.time_left()}")

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


def make_executor(config: ExperimentConfig):
    """The executor that a configuration names; raises SetupError where it cannot be had."""
    if config.launcher == "local":
        return InProcess(config)
    from experiments.ray_executor import RayExecutor

    try:
        return RayExecutor(config)
    except ImportError as error:
        raise SetupError(
            f"--launcher ray needs the package ray, which cannot be imported ({error}): "
            "pip install -e '.[cluster]' in the checkout"
        ) from None


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
