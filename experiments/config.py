"""What to run: the settings of an evaluation, validated, with defaults that suit the model.

`ExperimentConfig` holds what a person asked for (a field left at None means "what suits the model");
`settings_for` turns it into the numbers that are used for one model.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

EXPERIMENTS = ("main", "ablation_window_size", "ablation_n_sink")
SCORINGS = ("decode", "parallel")
BOS_OPTIONS = ("auto", "always", "never")
DECODE_ENGINES = ("eager", "graph", "fused", "auto")
DTYPES = ("float32", "float16", "bfloat16", "float64")
DEFAULT_ABLATION_N_SINKS = (0, 1, 2, 4, 8, 16)
DEMO_MODEL = "demo"


class SetupError(ValueError):
    """Something is wrong that was found before computing: command lines answer with one line and exit code 2."""


def unknown_name(what: str, name: object, known: Iterable[str]) -> SetupError:
    """The error for a name that is in no table: the known names, and the nearest match."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return SetupError(f"unknown {what} {name!r}{hint}; known: {', '.join(known)}")


def at_least(what: str, value: int | None, low: int) -> None:
    """Refuse a number below `low`, or one that is no whole number; None (unset) passes."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise SetupError(f"{what} must be a whole number of at least {low}, got {value!r}")


@dataclass(frozen=True)
class ExperimentConfig:
    """One evaluation: models x data sets x backends x methods x repeats, and the ablations.

    Names are given as in the command line: a string or a sequence of strings. None means the default that suits
    the model: see `settings_for` for the numbers, `experiments.texts.default_datasets` for the texts, and
    `experiments.methods.DEFAULT_METHODS` for the methods (of those, one whose optional dependency is absent is
    skipped; a method that is named here has to be able to run).

    Raises SetupError (a ValueError) naming the field, the value and what is allowed.
    """

    model: tuple[str, ...] = (DEMO_MODEL,)
    datasets: tuple[str, ...] | None = None
    text_key: str = "text"  # of the records of files and hub data sets
    bos: str = "auto"  # a beginning-of-sequence token in front: `experiments.tokens.beginning_of`
    methods: tuple[str, ...] | None = None
    attn_backend_list: tuple[str, ...] | None = None  # None: FLASH_SDPA, then math
    dtype: str | None = None  # None: what `select_dtype` picks for the device
    device: str | None = None  # None: CUDA where there is one, else the CPU
    n_sink: int | None = None
    window_size: int | None = None
    max_eval_tokens: int | None = None
    repeats: int = 1
    only: tuple[str, ...] = EXPERIMENTS
    scoring: str = "decode"
    decode_sample: int = 128  # decode steps that are timed under scoring "parallel"
    decode_engine: str = "eager"
    kvpress_press: str = "streaming_llm"
    ablation_window_sizes: tuple[int, ...] | None = None
    ablation_n_sinks: tuple[int, ...] | None = None
    ablation_tokens: int | None = None
    output_dir: Path = Path("results")
    save_token_nll: bool = False
    force: bool = False
    dry_run: bool = False
    seed: int = 0
    warmup_steps: int = 4
    progress: bool = True
    command: str = ""  # the command line, for the record

    def __post_init__(self):
        for name in ("model", "datasets", "methods", "attn_backend_list", "only"):
            self._set(name, _names(name, getattr(self, name)))
        for name in ("ablation_window_sizes", "ablation_n_sinks"):
            value = getattr(self, name)
            self._set(name, None if value is None else tuple(value))
        self._set("output_dir", Path(self.output_dir))
        self._check_names()
        self._check_numbers()

    def _set(self, name, value):
        object.__setattr__(self, name, value)  # the dataclass is frozen; this normalises what it was given

    def _check_names(self):
        from experiments.kvpress_support import PRESSES
        from experiments.methods import METHODS  # here: it imports torch and the library

        tables = [("only", self.only, EXPERIMENTS), ("methods", self.methods or (), METHODS)]
        tables += [("scoring", (self.scoring,), SCORINGS), ("decode_engine", (self.decode_engine,), DECODE_ENGINES)]
        tables.append(("bos", (self.bos,), BOS_OPTIONS))
        tables.append(("kvpress_press", (self.kvpress_press,), PRESSES))
        if self.dtype is not None:
            tables.append(("dtype", (self.dtype,), DTYPES))
        for what, values, known in tables:
            for value in values:
                if value not in known:
                    raise unknown_name(what, value, known)

    def _check_numbers(self):
        lows = {"n_sink": 0, "window_size": 1, "max_eval_tokens": 2, "repeats": 1, "decode_sample": 1}
        lows |= {"ablation_tokens": 2, "seed": 0, "warmup_steps": 0}
        for name, low in lows.items():
            at_least(name, getattr(self, name), low)
        for name, low in (("ablation_window_sizes", 1), ("ablation_n_sinks", 0)):
            for value in getattr(self, name) or ():
                at_least(name, value, low)


def _names(field: str, value) -> tuple[str, ...] | None:
    """A string or a sequence of strings as a tuple without repetitions, in order; None stays None."""
    if value is None:
        return None
    values = (value,) if isinstance(value, str) else tuple(value)
    if not values or not all(isinstance(item, str) and item for item in values):
        raise SetupError(f"{field} must be one name or several, got {value!r}")
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
    def cache_size(self) -> int:
        return self.n_sink + self.window_size


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
