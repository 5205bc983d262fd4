"""One model, ready to be measured: loaded, its texts tokenised, all checked that can be before computing."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.cells import Cell
from experiments.config import DTYPES, ExperimentConfig, ModelSettings, SetupError, settings_for
from experiments.engines import resolve_engine
from experiments.environment import what_matters
from experiments.kvpress_support import PRESSES, import_adapter, kvpress_version
from experiments.methods import DEFAULT_METHODS, METHODS, Method, MethodSettings, head_dim
from experiments.models import LoadedModel, ModelSource
from experiments.perplexity import PerplexityResult, compute_perplexity, decode_steps
from experiments.progress import LossDisplay
from experiments.results import Header, hash_of
from experiments.texts import Text
from experiments.tokens import first_tokens, random_tokens
from personal_adapters.neox_flash import wrap_attention
from personal_adapters.sdpa import check_backend_available, resolve_attn_backend, select_dtype


@dataclass(frozen=True)
class Machine:
    """Where and in what everything runs: device, dtype, and the attention backends (never "auto")."""

    device: torch.device
    dtype: torch.dtype
    backends: tuple[str, ...]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def resolve_machine(config: ExperimentConfig) -> Machine:
    """Device, dtype and backends of a configuration; raises SetupError for what does not exist or run here."""
    try:
        device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise SetupError(f"unknown device {config.device!r}: choose cpu or cuda, cuda:0, ...") from None
    if device.type not in ("cpu", "cuda"):
        raise SetupError(f"device {config.device!r} is not supported: choose cpu or cuda, cuda:0, ...")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SetupError(f"device {config.device!r}: PyTorch sees {torch.cuda.device_count()} CUDA devices here")
    try:
        dtype = getattr(torch, config.dtype) if config.dtype in DTYPES else select_dtype(device)
        asked = config.attn_backend_list or (None,)
        backends = [resolve_attn_backend(name, device=device, dtype=dtype) for name in asked]
    except ValueError as error:
        raise SetupError(str(error)) from None
    return Machine(device, dtype, tuple(dict.fromkeys(backends)))


@dataclass(frozen=True)
class Stream:
    """A text as the model gets it: token ids int64 [1, N]."""

    text: Text
    ids: Tensor

    @property
    def num_tokens(self) -> int:
        return self.ids.shape[1]


class ModelSession:
    """A loaded model with its settings, streams and methods. Raises SetupError where one of them cannot be had."""

    def __init__(self, config: ExperimentConfig, source: ModelSource, texts: Sequence[Text], machine: Machine):
        self.config, self.source, self.machine = config, source, machine
        self.loaded: LoadedModel = source.load(machine.dtype, machine.device)
        self.settings: ModelSettings = settings_for(
            config, self.loaded.context_length, source.is_demo, self.loaded.largest_window
        )
        self.beginning = self.loaded.beginning(config.bos)
        self.texts = {text.key: text for text in texts}
        self._streams: dict[tuple[str, int], Stream] = {}
        self._check_head_dim()
        self.engines = self._resolve_engines()
        self._wrap(machine.backends[0])
        self.methods, self.skipped = self._check_methods()
        for text in texts:
            self.stream(text.key, self.settings.max_eval_tokens)

    @property
    def model(self):
        return self.loaded.model

    def _check_head_dim(self) -> None:
        """Kernels are limited in the size of a head; the machine was checked before the model was known."""
        machine = self.machine
        for backend in machine.backends:
            available = check_backend_available(backend, machine.dtype, machine.device, head_dim(self.model.config))
            if not available:
                raise SetupError(f"attention backend {backend!r} cannot run {self.source.name!r}: {available.reason}")

    def _wrap(self, backend: str) -> None:
        try:
            wrap_attention(self.model, backend)
        except ValueError as error:
            raise SetupError(f"model {self.source.name!r} cannot be measured: {error}") from None

    def _resolve_engines(self) -> dict[str, str]:
        """The decode engine with each backend: what was asked for, "auto" resolved by the streaming decoder."""
        engines = {}
        for backend in self.machine.backends:
            self._wrap(backend)
            sizes = (self.settings.n_sink, self.settings.window_size)
            try:
                engines[backend] = resolve_engine(self.model, self.config.decode_engine, *sizes)
            except ValueError as error:
                raise SetupError(f"decode engine {self.config.decode_engine!r} cannot run: {error}") from None
        return engines

    def _check_methods(self) -> tuple[tuple[str, ...], dict[str, str]]:
        """The methods that can run, by attaching each to the model, and of the default ones why another cannot."""
        asked = self.config.methods or DEFAULT_METHODS
        able, skipped = [], {}
        for name in asked:
            reason = METHODS[name].unavailable() or self._cannot(name)
            if reason is None:
                able.append(name)
            elif self.config.methods is None and METHODS[name].optional:
                skipped[name] = reason
            else:
                raise SetupError(f"method {name!r} cannot run with model {self.source.name!r}: {reason}")
        return tuple(able), skipped

    def _cannot(self, name: str) -> str | None:
        try:
            sizes = (self.settings.n_sink, self.settings.window_size)
            with METHODS[name](self.model, self.method_settings(*sizes, self.machine.backends[0])):
                return None
        except (ValueError, ImportError) as error:
            return str(error)

    def stream(self, key: str, limit: int) -> Stream:
        """The first `limit` tokens of a text."""
        if (key, limit) not in self._streams:
            text, tokenizer = self.texts[key], self.loaded.tokenizer
            vocab_size = self.loaded.vocab_size
            if tokenizer is None:
                ids = random_tokens(text, vocab_size, limit, self.config.seed)
            elif text.documents is None:
                raise SetupError(f"data set {text.dataset} is for models with random weights (random:<size>) only")
            else:
                ids = first_tokens(text, tokenizer, self.beginning.ids, limit)
            largest = int(ids.max())
            if largest >= vocab_size:
                raise SetupError(f"data set {text.dataset}: token id {largest} is outside the model's vocabulary")
            self._streams[key, limit] = Stream(text, ids)
        return self._streams[key, limit]

    def method_settings(self, n_sink: int, window_size: int, backend: str) -> MethodSettings:
        engine = self.engines[backend]
        return MethodSettings(n_sink, window_size, engine, self.config.kvpress_press, self.config.seed)

    def cell_config(self, cell: Cell) -> dict:
        """Everything that could change a cell's figures, its hash's preimage; the same for all its repeats."""
        stream = self.stream(cell.dataset, cell.tokens)
        value = self._shared_config(stream, cell.backend, cell.scoring)
        value |= {"method": cell.method, "n_sink": cell.n_sink, "window_size": cell.window_size}
        return value | (self._kvpress_config() if cell.method == "kvpress" else {})

    def _shared_config(self, stream: Stream, backend: str, scoring: str) -> dict:
        return {
            "schema": 1,
            "model": self.source.fingerprint,
            "data_sha256": stream.text.sha256,
            "tokens_sha256": hashlib.sha256(stream.ids.numpy().tobytes()).hexdigest(),
            "num_tokens": stream.num_tokens,
            "backend": backend,
            "dtype": self.machine.dtype_name,
            "scoring": scoring,
            "decode_sample": self.config.decode_sample if scoring == "parallel" else None,
            "decode_engine": self.engines[backend],
            "seed": self.config.seed,
            "warmup_steps": self.config.warmup_steps,
            **what_matters(self.machine.device),
        }

    def _kvpress_config(self) -> dict:
        return {"kvpress": kvpress_version(), "kvpress_press": self.config.kvpress_press}

    def header(self, key: str, limit: int, backend: str, scoring: str, **sizes) -> Header:
        """The conditions of a result file; its hash covers all methods' configurations, not which of them ran."""
        stream = self.stream(key, limit)
        shared = self._shared_config(stream, backend, scoring) | self._kvpress_config() | sizes
        has_tokenizer = self.loaded.tokenizer is not None
        return Header(
            experiment=stream.text.experiment,
            model=self.source.name,
            dataset=stream.text.dataset,
            dataset_key=key,
            backend=backend,
            dtype=self.machine.dtype_name,
            device=shared["device"],
            num_tokens=stream.num_tokens,
            max_eval_tokens=limit,
            tokens="the text, by the model's tokenizer" if has_tokenizer else f"random ids, seed {self.config.seed}",
            scoring=scoring,
            weights=self.source.weights,
            bos=self.beginning.record(),
            data_sha256=stream.text.sha256,
            config_hash=hash_of(shared),
        )

    def method(self, cell: Cell) -> Method:
        """The cell's method object on the model, which from now on runs the cell's backend."""
        wrap_attention(self.model, cell.backend)
        return METHODS[cell.method](self.model, self.method_settings(cell.n_sink, cell.window_size, cell.backend))

    def decode_steps(self, cell: Cell) -> int:
        """How many decode steps the cell times."""
        num_tokens = self.stream(cell.dataset, cell.tokens).num_tokens
        prompt = min(cell.n_sink + cell.window_size, num_tokens)
        return decode_steps(num_tokens, prompt, cell.scoring, self.config.decode_sample)

    def measure(self, cell: Cell, display: LossDisplay) -> PerplexityResult:
        """Run a cell."""
        return compute_perplexity(
            self.model,
            self.stream(cell.dataset, cell.tokens).ids,
            self.method(cell),
            scoring=cell.scoring,
            decode_sample=self.config.decode_sample,
            warmup_steps=self.config.warmup_steps,
            progress=display,
        )


def check_methods_installed(config: ExperimentConfig) -> bool:
    """Import what optional methods need, before anything is timed; whether kvpress was imported.

    Raises SetupError where a method that was named explicitly cannot run in this environment.
    """
    for name in config.methods or ():
        reason = METHODS[name].unavailable()
        if reason is not None:
            raise SetupError(f"method {name!r} cannot run here: {reason}")
    entry = PRESSES.get(config.kvpress_press)
    if entry is not None and entry.cannot:
        raise SetupError(f"kvpress_press {config.kvpress_press!r} cannot run: {entry.cannot}")
    if "kvpress" not in (config.methods or DEFAULT_METHODS) or METHODS["kvpress"].unavailable() is not None:
        return False
    try:
        import_adapter()
    except ImportError as error:
        if config.methods is not None:
            raise SetupError(f"method 'kvpress' cannot run here: {error}") from None
        return False
    return True
