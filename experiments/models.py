"""The models that are evaluated: the bundled demo, a hub name, a local folder, random weights of a known size."""

import copy
import hashlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from experiments.config import DEMO_MODEL, SetupError, first_line, unknown_name
from experiments.gguf_files import gguf_file, read_gguf, sha256_of
from experiments.hub import ask_hub
from experiments.random_models import RANDOM_SIZES, random_config, random_model
from experiments.tokens import NO_TOKENIZER, Beginning, beginning_of
from streaming_llm import StreamingConfig
from streaming_llm.families import family_of, layer_layouts, layer_windows, text_config
from streaming_llm.placement import stored_nbytes

DEMO_FOLDER = Path(__file__).resolve().parent / "assets" / "demo_model"
RANDOM_PREFIX = "random:"

_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.json")
_FILES = "files:"  # how the fingerprint of a folder begins


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model without its weights: its configuration and tokenizer (None for random weights).

    `add_bos_token` is what tokenizer_config.json says, None where it does not.
    """

    config: object
    tokenizer: object | None
    add_bos_token: bool | None

    @property
    def context_length(self) -> int:
        """Tokens of context that the model was made for; 2,048 where its configuration does not say."""
        return getattr(text_config(self.config), "max_position_embeddings", None) or 2048

    @property
    def vocab_size(self) -> int:
        return text_config(self.config).vocab_size

    @property
    def head_dim(self) -> int:
        """Size of an attention head, which not every configuration states."""
        config = text_config(self.config)
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @property
    def largest_window(self) -> int | None:
        """The largest `window_size` that a sliding window of the model's own allows; None for any."""
        windows = [window for window in layer_windows(self.config) if window]
        try:
            layer_layouts(self.config, StreamingConfig(0, max(windows, default=0) + 1))
        except ValueError:
            return min(windows)
        return None

    def beginning(self, option: str) -> Beginning:
        """What a stream of this model begins with; `option`: "auto", "always" or "never" a BOS token."""
        if self.tokenizer is None:
            return NO_TOKENIZER
        model_bos_id = getattr(text_config(self.config), "bos_token_id", None)
        return beginning_of(self.tokenizer, option, model_bos_id, self.add_bos_token)


@dataclass(frozen=True)
class LoadedModel(ModelInfo):
    """A model in evaluation mode on its device."""

    model: torch.nn.Module
    name: str = ""

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""
        return self.model.get_input_embeddings().weight.device

    @property
    def weights_mb(self) -> dict[str, float]:
        """Megabytes of weights by device."""
        held: dict[str, float] = {}
        for parameter in self.model.parameters():
            place = str(parameter.device)
            held[place] = held.get(place, 0.0) + stored_nbytes(parameter) / 1e6
        return held


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from. It is data, and loads the same model on whichever machine it is sent to.

    `slug` names its results folder ("" for the demo, which writes at the root); `fingerprint` identifies its
    weights: a hash of files, a hub commit, or size and seed. `where`: a folder, a hub name, or a random size;
    `options`: of Transformers' `from_pretrained`.
    """

    name: str
    slug: str
    weights: str  # "trained" | "random"
    fingerprint: str
    where: str
    options: dict = field(default_factory=dict)
    seed: int = 0

    @property
    def is_demo(self) -> bool:
        return self.name == DEMO_MODEL

    def info(self) -> ModelInfo:
        """The model without its weights; raises SetupError where it cannot be read, or cannot stream."""
        from transformers import AutoConfig, AutoTokenizer
        from transformers.models.auto.tokenization_auto import get_tokenizer_config

        if self.weights == "random":
            return ModelInfo(random_config(RANDOM_SIZES[self.where]), None, None)
        where, options = self._place(), self.options
        with self._readable():
            if "gguf_file" in options:
                config, tokenizer = read_gguf(where, options["gguf_file"], self.fingerprint)
                return ModelInfo(config, tokenizer, None)
            config = AutoConfig.from_pretrained(where, **options)
            family_of(config)  # refuses a model that cannot stream, before its weights are read
            tokenizer = AutoTokenizer.from_pretrained(where, **options)
            # A tokenizer drops this setting where its tokenizer.json has rules of its own.
            add_bos_token = get_tokenizer_config(where, **options).get("add_bos_token")
        return ModelInfo(config, tokenizer, add_bos_token)

    def load(self, dtype: torch.dtype, device: torch.device, device_map: str | None = None) -> LoadedModel:
        """The model on a device, or spread over all of them; raises SetupError where it cannot be loaded."""
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        info, where = self.info(), self._place()
        if self.weights == "random":
            model = random_model(RANDOM_SIZES[self.where], self.seed, dtype, device, device_map)
            return LoadedModel(**vars(info), model=model, name=self.name)
        known = {"config": copy.deepcopy(info.config)} if "gguf_file" in self.options else {}  # reading it takes long
        disable_progress_bar()  # of weights that are read, which it draws also where nobody watches
        with self._readable():
            model, report = AutoModelForCausalLM.from_pretrained(
                where,
                dtype=dtype,
                device_map=device_map,
                attn_implementation=_attention(info.config),
                output_loading_info=True,
                **known,
                **self.options,
            )
        if report["missing_keys"]:  # Transformers fills them with random numbers
            missing = ", ".join(sorted(report["missing_keys"])[:3])
            raise SetupError(f"model {self.name!r} could not be loaded: weights are missing ({missing}, ...)")
        model = model if device_map else model.to(device)
        return LoadedModel(**vars(info), model=model.eval().requires_grad_(False), name=self.name)

    def _place(self) -> str:
        """The folder or hub name; raises SetupError where this machine has no such folder, or another."""
        if self.is_demo:
            return str(DEMO_FOLDER)
        gguf = self.options.get("gguf_file")
        if gguf or self.fingerprint.startswith(_FILES):
            here = f"{self.where} on {socket.gethostname()}"
            if not Path(self.where, gguf or "").exists():
                what = f"file {gguf} in" if gguf else "folder"
                raise SetupError(f"model {self.name!r}: there is no {what} {here}; copy it there, or name a hub model")
            found = f"gguf:{sha256_of(Path(self.where, gguf))}" if gguf else _files_fingerprint(Path(self.where))
            if found != self.fingerprint:
                raise SetupError(f"model {self.name!r}: the files in {here} are not those of the model")
        return self.where

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a file is missing, or is not what it should be: each reader has its own errors
            what = f"{type(error).__name__}: {first_line(error)}"
            raise SetupError(f"model {self.name!r} could not be loaded: {what}") from None


def find_model(name: str, seed: int = 0) -> ModelSource:
    """The source of the model called `name`; raises SetupError for a name that leads nowhere. Loads no weights."""
    if name == DEMO_MODEL:
        return _folder(name, DEMO_FOLDER, slug="")
    if name.startswith(RANDOM_PREFIX):
        size = name.removeprefix(RANDOM_PREFIX)
        if size not in RANDOM_SIZES:
            raise unknown_name(f"size in {RANDOM_PREFIX}<size>:", size, RANDOM_SIZES)
        slug = _slug(name.replace(":", "-"))
        return ModelSource(name, slug, "random", f"random:{size}:seed={seed}", size, seed=seed)
    if (file := gguf_file(Path(name))) is not None:
        options = {"local_files_only": True, "gguf_file": file.name}
        return ModelSource(name, _slug(file.stem), "trained", f"gguf:{sha256_of(file)}", str(file.parent), options)
    if Path(name).is_dir():
        return _folder(name, Path(name), slug=_slug(Path(name).resolve().name))
    if Path(name).exists():
        raise SetupError(
            f"model {name!r} is a file: pass a .gguf file, or the folder that holds config.json and the weights"
        )
    if name.startswith(("/", ".", "~")):
        raise SetupError(f"model {name!r}: there is no such file or folder")
    return _hub(name)


def _slug(name: str) -> str:
    slug = "".join(c if c.isalnum() or c in "._-" else "-" for c in name).strip(".")
    # Folders of the demo's results lie beside the models' own.
    return f"{slug}-model" if slug in ("", "final", "fixed_eval", "superseded") else slug


def _folder(name: str, folder: Path, slug: str) -> ModelSource:
    if not (folder / "config.json").is_file():
        where = "experiments/assets/demo_model" if name == DEMO_MODEL else name
        raise SetupError(f"model {name!r}: there is no config.json in the folder {where}")
    folder = folder.resolve()
    return ModelSource(name, slug, "trained", _files_fingerprint(folder), str(folder), {"local_files_only": True})


def _files_fingerprint(folder: Path) -> str:
    """A hash of the files that a model is loaded from."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _WEIGHT_FILES for path in folder.glob(pattern)}):
        digest.update(path.name.encode() + bytes.fromhex(sha256_of(path)))
    return f"{_FILES}{digest.hexdigest()}"


def _hub(name: str) -> ModelSource:
    from huggingface_hub import try_to_load_from_cache

    known, reason = ask_hub(name, "model")
    copy = try_to_load_from_cache(name, "config.json")  # .../snapshots/<commit>/config.json
    commit = known or (Path(copy).parent.name if isinstance(copy, str) else None)
    if commit is None:
        raise SetupError(
            f"model {name!r} was not found: it is not {DEMO_MODEL!r}, not {RANDOM_PREFIX}<size>, not a local folder, "
            f"not in this machine's hub cache, and the hub gave no answer ({reason}); "
            "pass the path of a local folder instead: --model path/to/folder"
        )
    options = {"local_files_only": known is None, "revision": commit}
    return ModelSource(name, _slug(name.replace("/", "--")), "trained", f"hub:{name}@{commit}", name, options)


def _attention(model_config) -> str:
    """SDPA where Transformers has it for this model, else the attention that its file writes out.

    The latter is given a kernel, or refused one, by `wrap_attention`: GPT-J goes through SDPA once wrapped, and what
    Gemma 2 soft-caps is math.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return "sdpa" if MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)]._supports_sdpa else "eager"
