"""Baseline against StreamingLLM on one text, without a results folder: what `eval_streaming_llm.py` runs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from experiments.bars import progress_bar
from experiments.cells import Cell
from experiments.config import ExperimentConfig, SetupError
from experiments.environment import environment
from experiments.model_run import describe
from experiments.models import find_model
from experiments.plan import MAIN, FilePlan, plan_cells, plan_files
from experiments.results import MethodRuns, main_result, run_record
from experiments.session import ModelSession, resolve_machine
from experiments.storage import check_writable, write_json
from experiments.summary import main_table
from experiments.texts import default_datasets, load_texts

COMPARED = ("baseline", "streaming")


def run_comparison(config: ExperimentConfig, output: Path | None = None, say: Callable[[str], None] = print) -> int:
    """Run and print the comparison, and write it as a main result file where `output` says so.

    Returns 0, or 1 where a method failed. Raises SetupError for what is wrong before computing.
    """
    if output is not None:
        _check_output(output)
    config = replace(config, methods=COMPARED, only=(MAIN,))
    machine = resolve_machine(config)
    source = find_model(config.model[0], config.seed)
    datasets = config.datasets or default_datasets(has_tokenizer=source.weights != "random")
    texts = load_texts(datasets[:1], config.text_key)
    session = ModelSession(config, source, texts, machine)
    settings = session.settings
    say(
        f"{source.name} on {texts[0].experiment}: {settings.n_sink} sinks + {settings.window_size} window, "
        f"{machine.device}, {machine.dtype_name}, attention backend {machine.backends[0]}"
    )
    for warning in filter(None, (session.beginning.warning, texts[0].warning)):
        say(f"warning: {warning}")

    (file,) = plan_files(config, settings, [texts[0].key], machine.backends[:1], COMPARED)
    result = _compare(session, file)
    say(main_table([result]))
    if output is not None:
        write_json(output, result)
        say(f"wrote: {output}")
    if result["status"] == "failed":
        say(f"FAILED: {result['reason']}")
    return 1 if result["status"] == "failed" else 0


def _compare(session: ModelSession, file: FilePlan) -> dict:
    """Run the methods of a file, interleaved, and make the file's contents."""
    records: dict[str, list[dict]] = {group.method: [] for group in file.groups}
    failed: dict[str, str] = {}
    for cell in plan_cells([file], session.config.repeats):
        if cell.method not in failed:
            try:
                records[cell.method].append(_measure(session, cell))
            except Exception as error:  # whatever it is, it concerns this cell
                failed[cell.method] = describe(error)
    sizes = (session.settings.n_sink, session.settings.window_size)
    runs = [
        MethodRuns(method, *sizes, tuple(found), "failed" if method in failed else "ok", failed.get(method, ""))
        for method, found in records.items()
    ]
    header = session.header(
        file.dataset, file.tokens, file.backend, file.scoring, n_sink=sizes[0], window_size=sizes[1]
    )
    config = session.config
    return main_result(header, runs, sizes, environment(session.machine.device, config.command, config.seed, False))


def _measure(session: ModelSession, cell: Cell) -> dict:
    trained = session.source.weights == "trained"
    with progress_bar(str(cell), session.decode_steps(cell), session.config.progress, trained) as display:
        return run_record(session.measure(cell, display), cell.backend)


def _check_output(output: Path) -> None:
    if output.exists():
        raise SetupError(f"--output {output}: there is such a file already; nothing is overwritten")
    check_writable(output.parent, 2**16)
