"""Models in GGUF files, which Transformers reads and de-quantises, with their tokenizers and chat templates."""

import functools
import hashlib
import importlib.util
from pathlib import Path

from experiments.config import SetupError
from streaming_llm.families import family_of

_PROBE = "Call me Ishmael. Some years ago - never mind how long precisely - I thought I would sail about a little."
_LEAST_CHARACTERS = 2  # a tokenizer's tokens hold at least so many on average


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path names: itself, or the only one in a folder without a config.json.

    Raises SetupError for a folder with several, or where the package that reads them is missing.
    """
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise SetupError(f"model {str(path)!r}: the folder holds several GGUF files ({names}): name one of them")
        path = files[0] if files else path
    if path.suffix != ".gguf" or not path.is_file():
        return None
    if importlib.util.find_spec("gguf") is None:
        raise SetupError(f"model {str(path)!r}: it needs the package gguf: pip install -e '.[gguf]' in the checkout")
    return path.resolve()


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, read once as long as it does not change."""
    return _sha256(path, path.stat().st_size, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache(maxsize=2)
def read_gguf(folder: str, name: str, fingerprint: str) -> tuple[object, object]:
    """Configuration and tokenizer of a file; kept, for reading them takes a minute.

    Raises ValueError for a file that cannot be read, a model that cannot stream, and a tokenizer that Transformers
    does not read rightly.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    options = {"gguf_file": name, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
    except Exception as error:  # each part of the reader has its own
        raise ValueError(
            f"the GGUF file cannot be read ({error}): it is broken, or of a model that Transformers does not know"
        ) from None
    family_of(config)
    # Each look into the file takes ten seconds: with its type given, the tokenizer asks for no configuration.
    kind = {"tokenizer_type": config.model_type} if TOKENIZER_MAPPING_NAMES.get(config.model_type) else {}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options, **kind)
    n_tokens = len(tokenizer(_PROBE, add_special_tokens=False).input_ids)
    if n_tokens * _LEAST_CHARACTERS > len(_PROBE):
        raise ValueError(
            f"its tokenizer, as this version of Transformers reads it, makes {n_tokens} tokens of {len(_PROBE)} "
            "characters of English, and perplexities would mean nothing: convert the model, or use another version"
        )
    return config, tokenizer
