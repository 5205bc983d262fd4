"""What to run: the settings of an evaluation, described once for the dataclass, its checks and the command lines.

`ExperimentConfig` holds what a person asked for (a field left at None means "what suits the model");
`settings_for` turns it into the numbers that are used for one model.
"""

import difflib
from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields
from pathlib import Path

from experiments.kvpress_support import PRESSES

EXPERIMENTS = ("main", "ablation_window_size", "ablation_n_sink")
ENGINES = ("auto", "eager", "graph", "graph+compile", "fused", "fused-triton")
DTYPES = ("float32", "float16", "bfloat16", "float64")
DEFAULT_ABLATION_N_SINKS = (0, 1, 2, 4, 8, 16)
DEMO_MODEL = "demo"
_MODEL_HELP = """demo (the default), a hub name such as EleutherAI/pythia-2.8b, a folder, a .gguf file, or
random:<size> such as random:pythia-2.8b (random weights: speed only)"""
_DATASETS_HELP = """demo_encyclopaedia, demo_narrative, wikitext, pg19, a folder, a file (.txt, .jsonl, .csv, .parquet,
..., or compressed), a data set of the hub: owner/name[:config][@split]; default: the two of the demo"""
_BOS_HELP = "beginning-of-sequence token: always, never, auto (default: as the model was trained)"
_METHODS_HELP = "baseline, streaming, kvpress (these are the default), window, dense"
_WINDOW_HELP = "recent tokens kept; default: what fills the context, up to 2048 (demo: 252)"
_BACKENDS_HELP = "math, flash, cudnn, auto; default: what FLASH_SDPA says (1: flash), else math"
_ENGINE_HELP = f"{', '.join(ENGINES)}; default: auto"
_DTYPE_HELP = f"{', '.join(DTYPES)}; default: bfloat16, on a CPU float32"
_SPREAD_HELP = "auto: over all GPUs, for a model that is too large for one"
_SCORING_HELP = "decode (default): by the token loop; parallel: in blocks, the speed from a sample"
_PRESS_HELP = "streaming_llm (default), knorm, keydiff, random, lagkv, cur, tova, cap, ..."


class SetupError(ValueError):
    """Something is wrong that was found before computing: command lines answer with one line and exit code 2."""


def unknown_name(what: str, name: object, known: Iterable[str]) -> SetupError:
    """The error for a name that is in no table: the known names, and the nearest match."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return SetupError(f"unknown {what} {name!r}{hint}; known: {', '.join(known)}")


def first_line(error: Exception) -> str:
    """What an error says first, or its kind where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def at_least(what: str, value: int | None, low: int) -> None:
    """Refuse a number below `low`, or one that is no whole number; None (unset) passes."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise SetupError(f"{what} must be a whole number of at least {low}, got {value!r}")


def _methods() -> Iterable[str]:
    from experiments.methods import METHODS  # here: it imports torch and the library

    return METHODS


def _option(default, help: str, **details):
    """A field with what a command line says about it.

    `many`: it holds a tuple, of which one value may be given alone. `low`: the least value of a whole number.
    `known`: the names that there are, or a function that gives them. `flags`: other than the field's name.
    `metavar`: stands for the value in `--help`.
    """
    return field(default=default, metadata={"help": help, **details})


def _number(default: int | None, low: int, metavar: str, help: str, **details):
    return _option(default, help, low=low, metavar=metavar, **details)


@dataclass(frozen=True)
class ExperimentConfig:
    """One evaluation: models x data sets x backends x methods x repeats, and the ablations.

    Names are given as in the command line: a string or a sequence of strings. None means the default that suits
    the model: see `settings_for` for the numbers, `experiments.texts.default_datasets` for the texts, and
    `experiments.methods.DEFAULT_METHODS` for the methods (of those, one whose optional dependency is absent is
    skipped; a method that is named here has to be able to run).

    Raises SetupError (a ValueError) naming the field, the value and what is allowed.
    """

    model: tuple[str, ...] = _option((DEMO_MODEL,), _MODEL_HELP, many=True)
    datasets: tuple[str, ...] | None = _option(None, _DATASETS_HELP, many=True)
    text_key: str = _option("text", "key or column of a record that holds its text; default: text", metavar="KEY")
    bos: str = _option("auto", _BOS_HELP, known=("auto", "always", "never"), metavar="WHEN")
    methods: tuple[str, ...] | None = _option(None, _METHODS_HELP, many=True, known=_methods)

    n_sink: int | None = _number(None, 0, "S", "sinks kept; default: 4")
    window_size: int | None = _number(None, 1, "W", _WINDOW_HELP)
    max_eval_tokens: int | None = _number(None, 2, "N", "tokens of each text; default: 4096 (demo: 768)")

    attn_backend_list: tuple[str, ...] | None = _option(None, _BACKENDS_HELP, many=True)
    engine: str = _option("auto", _ENGINE_HELP, known=ENGINES, flags=("--engine", "--decode-engine"))
    dtype: str | None = _option(None, _DTYPE_HELP, known=DTYPES)
    device: str | None = _option(None, "cpu, cuda, cuda:1, ...; default: cuda where there is one")
    device_map: str | None = _option(None, _SPREAD_HELP, known=("auto",))
    seed: int = _number(0, 0, "N", "for random weights and tokens; default: 0")

    only: tuple[str, ...] = _option(EXPERIMENTS, ", ".join(EXPERIMENTS), many=True, known=EXPERIMENTS)
    repeats: int = _number(1, 1, "N", "runs of each cell, interleaved; figures are medians; default: 1")
    scoring: str = _option("decode", _SCORING_HELP, known=("decode", "parallel"))
    decode_sample: int = _number(128, 0, "N", "steps timed under parallel scoring and in ablations; default: 128")
    kvpress_press: str = _option("streaming_llm", _PRESS_HELP, known=PRESSES)
    ablation_window_sizes: tuple[int, ...] | None = _number(
        None, 1, "W", "default: the five largest powers of two within the context", many=True
    )
    ablation_n_sinks: tuple[int, ...] | None = _number(
        None, 0, "S", "default: 0 1 2 4 8 16, the cache's size unchanged", many=True
    )
    ablation_tokens: int | None = _number(None, 2, "N", "of the first data set; default: 4096 or more")

    output_dir: Path | None = _option("results", "default: results; in it a folder for each model", metavar="DIR")
    save_token_nll: bool = _option(False, "keep each token's loss: <stem>.<method>.nll.npz beside the main files")
    force: bool = _option(False, "run cells again that are finished already")
    dry_run: bool = _option(False, "say what is to do and about how long it takes; compute nothing")
    progress: bool = _option(True, "no progress bars")

    launcher: str = _option("local", "local (default) or ray: side by side, on all GPUs", known=("local", "ray"))
    ray_address: str | None = _option(None, "of a cluster (auto: the one of this machine)", metavar="HOST:PORT")
    gpus_per_cell: float | None = _option(None, "default: 1; a fraction only where nothing is timed", metavar="N")
    cpus_per_cell: int = _number(1, 1, "N", "default: 1")
    gpu_type: str | None = _option(None, "by Ray's name (H100, ...), where a cluster has several kinds")
    retries: int = _number(2, 0, "N", "how often a cell whose worker died is tried again; default: 2")

    warmup_steps: int = field(default=4, metadata={"low": 0})
    command: str = ""  # the command line, for the record

    def __post_init__(self):
        for item in fields(self):
            if item.metadata.get("many"):
                object.__setattr__(self, item.name, _many(item, getattr(self, item.name)))
            value, details = getattr(self, item.name), item.metadata
            known = details.get("known")
            for one in () if value is None else value if details.get("many") else (value,):
                if "low" in details:
                    at_least(item.name, one, details["low"])
                if known is not None and one not in (names := known() if callable(known) else known):
                    raise unknown_name(item.name, one, names)
        if self.output_dir is not None:
            object.__setattr__(self, "output_dir", Path(self.output_dir))


def _many(item: Field, value) -> tuple | None:
    """One value or a sequence of them as a tuple without repetitions, in order; None stays None where it may."""
    if value is None and item.default is None:
        return None
    is_text = "low" not in item.metadata
    values = (value,) if isinstance(value, str | int) else tuple(value or ())
    if not values or (is_text and not all(isinstance(one, str) and one for one in values)):
        raise SetupError(f"{item.name} must be one {'name' if is_text else 'number'} or several, got {value!r}")
    return tuple(dict.fromkeys(values))


@dataclass(frozen=True)
class ModelSettings:
    """The numbers of an evaluation of one model. `cache_size` = n_sink + window_size, in tokens."""

    n_sink: int
    window_size: int
    max_eval_tokens: int
    ablation_window_sizes: tuple[int, ...]
    ablation_n_sinks: tuple[int, ...]
    ablation_tokens: int

    @property
    def sizes(self) -> tuple[int, int]:
        """Sinks and window."""
        return self.n_sink, self.window_size

    @property
    def cache_size(self) -> int:
        return sum(self.sizes)


def settings_for(
    config: ExperimentConfig, context_length: int, is_demo: bool, largest_window: int | None = None
) -> ModelSettings:
    """The numbers for a model with a context of `context_length` tokens.

    The demo model: 4 sinks + 252, 768 tokens (a run on two CPU cores takes minutes). Any other model: 4 sinks and
    the window that fills its context, up to 2,048 together; 4,096 tokens. Ablations score 4,096 tokens or more:
    they are about perplexity, and block-parallel scoring is cheap. `largest_window` is what a sliding window of the
    model's own allows (None: any); a larger one that was asked for is a SetupError.
    """
    n_sink = 4 if config.n_sink is None else config.n_sink
    longest = min(context_length, largest_window or context_length)
    cache_size = 256 if is_demo else min(longest, 2048)
    window_size = max(1, cache_size - n_sink) if config.window_size is None else config.window_size
    for option, sizes in {
        "--window-size": [window_size],
        "--ablation-window-sizes": config.ablation_window_sizes or (),
    }.items():
        if largest_window is not None and max(sizes, default=0) > largest_window:
            raise SetupError(
                f"a window of {max(sizes)} tokens is larger than the model's own sliding window: "
                f"{option} at most {largest_window}"
            )
    tokens = config.max_eval_tokens or (768 if is_demo else 4096)
    ablation_tokens = config.ablation_tokens or max(tokens, 4096)
    windows = config.ablation_window_sizes or window_ladder(min(longest, ablation_tokens))
    cache_size = n_sink + window_size
    sinks = config.ablation_n_sinks or tuple(s for s in DEFAULT_ABLATION_N_SINKS if s < cache_size)
    too_many = [s for s in sinks if s >= cache_size]
    if too_many:
        raise SetupError(
            f"ablation_n_sinks must leave room for a window in a cache of {cache_size} tokens, got {too_many[0]}"
        )
    return ModelSettings(n_sink, window_size, tokens, windows, sinks, ablation_tokens)


def window_ladder(longest: int, steps: int = 5) -> tuple[int, ...]:
    """The `steps` largest powers of two that are at most `longest`, ascending."""
    top = longest.bit_length() - 1
    return tuple(2**power for power in range(max(0, top - steps + 1), top + 1))
