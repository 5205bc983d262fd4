"""The models that are evaluated: the bundled demo, a hub name, a local folder, a GGUF file, random weights."""

import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from experiments.config import DEMO_MODEL, SetupError, unknown_name
from experiments.hub import ask_hub
from streaming_llm.families import family_of, text_config

DEMO_FOLDER = Path(__file__).resolve().parent / "assets" / "demo_model"
RANDOM_PREFIX = "random:"
GGUF = ".gguf"

_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.json")


@dataclass(frozen=True)
class PythiaSize:
    """The sizes in which the Pythia models differ (Biderman et al., 2023)."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int


RANDOM_SIZES = {
    "pythia-70m": PythiaSize(512, 6, 8, 2048, 50304),
    "pythia-160m": PythiaSize(768, 12, 12, 3072, 50304),
    "pythia-410m": PythiaSize(1024, 24, 16, 4096, 50304),
    "pythia-1b": PythiaSize(2048, 16, 8, 8192, 50304),
    "pythia-1.4b": PythiaSize(2048, 24, 16, 8192, 50304),
    "pythia-2.8b": PythiaSize(2560, 32, 32, 10240, 50304),
    "pythia-6.9b": PythiaSize(4096, 32, 32, 16384, 50432),
    "pythia-12b": PythiaSize(5120, 36, 40, 20480, 50688),
}


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, before it is loaded.

    `slug` names its results folder ("" for the demo, which writes at the root); `fingerprint` identifies its
    weights: a hash of files, a hub commit, or size and seed.
    """

    name: str
    slug: str
    weights: str  # "trained" | "random"
    fingerprint: str
    load: Callable[[torch.dtype, torch.device], "LoadedModel"]

    @property
    def is_demo(self) -> bool:
        return self.name == DEMO_MODEL


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on its device, and its tokenizer (None for random weights)."""

    model: torch.nn.Module
    tokenizer: object | None

    @property
    def context_length(self) -> int:
        """Tokens of context that the model was made for; 2,048 where its configuration does not say."""
        return getattr(text_config(self.model.config), "max_position_embeddings", None) or 2048

    @property
    def vocab_size(self) -> int:
        return text_config(self.model.config).vocab_size


def find_model(name: str, seed: int = 0) -> ModelSource:
    """The source of the model called `name`; raises SetupError for a name that leads nowhere. Loads no weights."""
    if name == DEMO_MODEL:
        return _folder(name, DEMO_FOLDER, slug="")
    if name.startswith(RANDOM_PREFIX):
        return _random(name, seed)
    if Path(name).suffix == GGUF and Path(name).is_file():
        return _gguf(name, Path(name))
    if Path(name).is_dir():
        files = [] if (Path(name) / "config.json").exists() else list(Path(name).glob(f"*{GGUF}"))
        return _gguf(name, *files) if len(files) == 1 else _folder(name, Path(name), _slug(Path(name).resolve().name))
    if Path(name).exists():
        raise SetupError(f"model {name!r} is a file: pass a {GGUF} file, or the folder of config.json and the weights")
    if name.startswith(("/", ".", "~")):
        raise SetupError(f"model {name!r}: there is no such folder")
    return _hub(name)


def _slug(name: str) -> str:
    slug = "".join(c if c.isalnum() or c in "._-" else "-" for c in name).strip(".")
    # Folders of the demo's results lie beside the models' own.
    return f"{slug}-model" if slug in ("", "final", "fixed_eval", "superseded") else slug


def _folder(name: str, folder: Path, slug: str) -> ModelSource:
    if not (folder / "config.json").is_file():
        where = "experiments/assets/demo_model" if name == DEMO_MODEL else name
        raise SetupError(f"model {name!r}: there is no config.json in the folder {where}")
    digest = hashlib.sha256()
    files = sorted({path for pattern in _WEIGHT_FILES for path in folder.glob(pattern)})
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())

    def load(dtype: torch.dtype, device: torch.device) -> LoadedModel:
        return _from_pretrained(name, str(folder), dtype, device, local_files_only=True)

    return ModelSource(name, slug, "trained", f"files:{digest.hexdigest()}", load)


def _gguf(name: str, path: Path) -> ModelSource:
    """A file of weights, configuration, tokenizer and chat template, which Transformers de-quantises."""
    from transformers.utils import is_gguf_available

    if not is_gguf_available():
        raise SetupError(f"model {name!r}: reading it needs the package gguf, or a newer one: pip install -U gguf")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()

    def load(dtype: torch.dtype, device: torch.device) -> LoadedModel:
        return _from_pretrained(name, str(path.parent), dtype, device, local_files_only=True, gguf_file=path.name)

    return ModelSource(name, _slug(path.stem), "trained", f"gguf:{digest}", load)


def _hub(name: str) -> ModelSource:
    answer = ask_hub(name, "model")
    commit = answer.commit or _cached_commit(name)
    if commit is None:
        raise SetupError(
            f"model {name!r} was not found: it is not {DEMO_MODEL!r}, not {RANDOM_PREFIX}<size>, not a local folder, "
            f"not in this machine's hub cache, and the hub gave no answer ({answer.reason}); "
            "pass the path of a local folder instead: --model path/to/folder"
        )

    def load(dtype: torch.dtype, device: torch.device) -> LoadedModel:
        offline = answer.commit is None
        return _from_pretrained(name, name, dtype, device, local_files_only=offline, revision=commit)

    return ModelSource(name, _slug(name.replace("/", "--")), "trained", f"hub:{name}@{commit}", load)


def _cached_commit(name: str) -> str | None:
    """The commit of the hub model that this machine holds a copy of, if any."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(name, "config.json")
    return Path(path).parent.name if isinstance(path, str) else None  # .../snapshots/<commit>/config.json


def _from_pretrained(name, where, dtype, device, **options) -> LoadedModel:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        model_config = AutoConfig.from_pretrained(where, **options)
        family_of(model_config)  # refuses a model that cannot stream, before its weights are read
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        with _no_loading_bar():
            model, report = AutoModelForCausalLM.from_pretrained(
                where,
                dtype=dtype,
                attn_implementation=_attention(model_config),
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # a file is missing, or is not what it should be: each reader has its own errors
        raise SetupError(f"model {name!r} could not be loaded: {_first_line(error)}") from None
    if report["missing_keys"]:  # Transformers fills them with random numbers
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise SetupError(f"model {name!r} could not be loaded: weights are missing ({missing}, ...)")
    return LoadedModel(model.to(device).eval().requires_grad_(False), tokenizer)


def _attention(model_config) -> str:
    """SDPA where Transformers has it for this model, else the attention that its file writes out.

    The latter is given a kernel, or refused one, by `wrap_attention`: GPT-J goes through SDPA once wrapped, and what
    Gemma 2 soft-caps is math.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return "sdpa" if MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)]._supports_sdpa else "eager"


@contextmanager
def _no_loading_bar() -> Iterator[None]:
    """Transformers draws a bar while it reads weights, also where nobody watches."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # the bar of GGUF files cannot be turned off
            yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _random(name: str, seed: int) -> ModelSource:
    size = name.removeprefix(RANDOM_PREFIX)
    if size not in RANDOM_SIZES:
        raise unknown_name(f"size in {RANDOM_PREFIX}<size>:", size, RANDOM_SIZES)

    def load(dtype: torch.dtype, device: torch.device) -> LoadedModel:
        return LoadedModel(random_model(RANDOM_SIZES[size], seed, dtype, device), None)

    return ModelSource(name, _slug(name.replace(":", "-")), "random", f"random:{size}:seed={seed}", load)


def random_model(size: PythiaSize, seed: int, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """A GPT-NeoX of the given sizes with seeded random weights, made in place on the device, in the dtype."""
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    config = GPTNeoXConfig(
        **asdict(size),
        max_position_embeddings=2048,
        rotary_pct=0.25,
        use_parallel_residual=True,
        tie_word_embeddings=False,
        hidden_act="gelu",
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)
