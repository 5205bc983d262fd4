"""The tables and figures of "Efficient Streaming Language Models with Attention Sinks" (ICLR 2024), on any model.

python experiments/reproduce_paper.py --model path/to/model.gguf --datasets books.txt.xz
"""

import functools
import sys
from contextlib import nullcontext
from pathlib import Path

if __name__ == "__main__":  # perhaps in a checkout that is not installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments.cli import GOES_ON, MODEL, TEXTS, OneLineParser, add_options, config_from, guarded
from experiments.config import SetupError, at_least, unknown_name
from experiments.measuring import resolve_machine
from experiments.models import find_model
from experiments.paper.questions import read_questions
from experiments.paper.run import EXPERIMENTS, PaperModel
from experiments.paper.setting import PIECES, Lengths, Setting
from experiments.plotting.paper_page import write_pages
from experiments.storage import check_writable, folder_lock
from experiments.texts import default_datasets, load_as_one

_EXAMPLES = """examples:
  the bundled demo (minutes on a CPU):
    python experiments/reproduce_paper.py
  a real model on books, all of it:
    python experiments/reproduce_paper.py --model model.gguf --datasets books.txt.xz --attn-backend-list flash \\
        --questions ARC-Challenge-Test.jsonl
  some of it, on two models, with streams of at most 100,000 tokens:
    python experiments/reproduce_paper.py --model small.gguf large.gguf --only long sinks --max-eval-tokens 100000

Results are JSON files, figures and one page under <output-dir>/paper/. Interrupted or killed, the same command goes
on where it stopped. exit codes: 0 all is well; 1 something failed while running; 2 something is wrong that was found
before computing; 130 interrupted."""
_NBYTES_NEEDED = 1 << 20


def build_parser() -> OneLineParser:
    """The command line."""
    parser = OneLineParser("reproduce_paper.py", __doc__.splitlines()[0], _EXAMPLES)
    what = add_options(parser, "what is run", ("model", *TEXTS))
    names = ", ".join(f"{name} ({one.reference})" for name, one in EXPERIMENTS.items())
    what.add_argument("--only", nargs="+", metavar="NAME", help=f"{names}; default: all")
    about = (
        "multiple choice: a .jsonl or .json in ARC's format, allenai/ai2_arc:ARC-Challenge (hub), or made (easy ones)"
    )
    what.add_argument("--questions", metavar="FILE", help=f"{about}; default: no streaming question answering")
    sizes = add_options(parser, "sizes, in tokens", ("n_sink", "max_eval_tokens"), max_eval_tokens={
        "help": "no stream is longer; default: the paper's lengths, for the demo a few thousand tokens"})  # fmt: skip
    sizes.add_argument("--cache-size", type=int, metavar="C", help="sinks and window; default: 1024, for the demo 128")
    sizes.add_argument("--samples", type=int, metavar="N", help="streams of StreamEval; default: 10, for the demo 2")
    how = ("attn_backend_list", "engine", *MODEL[1:], "device_map", "repeats")
    add_options(parser, "how it is computed", how, one=("attn_backend_list",))
    add_options(parser, "output", ("output_dir", "force", "dry_run"))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    namespace = build_parser().parse_args(argv)
    return guarded(lambda: _run(namespace, argv), later=GOES_ON)


def _run(namespace, argv: list[str]) -> int:
    say = functools.partial(print, flush=True)
    only = vars(namespace).pop("only")
    config = config_from(namespace, argv, "experiments/reproduce_paper.py")
    for name in only or ():
        if name not in EXPERIMENTS:
            raise unknown_name("experiment", name, EXPERIMENTS)
    chosen = [EXPERIMENTS[name] for name in dict.fromkeys(only or EXPERIMENTS)]
    for name in ("cache_size", "samples"):
        at_least(name, getattr(namespace, name), 1)
    if namespace.cache_size is not None and namespace.cache_size <= (4 if config.n_sink is None else config.n_sink):
        raise SetupError(f"--cache-size {namespace.cache_size} leaves no room for a window beside the sinks")
    if namespace.questions is not None:
        read_questions(namespace.questions)
    sources, machine = [find_model(name, config.seed) for name in config.model], resolve_machine(config)
    text = load_as_one(config.datasets or default_datasets(True), config.text_key)
    root, failed = config.output_dir / "paper", False
    if not config.dry_run:
        check_writable(root / PIECES, _NBYTES_NEEDED)
    settings = []
    for source in sources:
        lengths = Lengths.of(source.info().context_length, source.is_demo, namespace.cache_size,
                             config.max_eval_tokens, namespace.samples)  # fmt: skip
        settings.append(Setting(config, source, machine, text, lengths, namespace.questions))
    with nullcontext() if config.dry_run else folder_lock(root / PIECES / "lock"):
        for setting in settings:
            say(f"model {setting.source.name}: {machine.device}, {machine.dtype_name}, {setting.backend}")
            model = PaperModel(setting, chosen, root, config.force, say)
            if config.dry_run:
                model.plan()
                continue
            model.run()
            failed = failed or bool(model.failed)
            setting.free()
        for path in () if config.dry_run else write_pages(root):
            say(f"wrote: {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
