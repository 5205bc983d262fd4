"""``python -m streaming_llm``: what runs here, in one screen, for bug reports; with a model: whether it streams."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import textwrap
import warnings
from collections import Counter
from pathlib import Path

import huggingface_hub
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import ENGINES, StreamingConfig, __version__, supported_families
from .families import layer_layouts, rotaries_from_config

KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def _kernels(device: str, dtype: torch.dtype) -> str:
    """Names of PyTorch's attention kernels that run on a device in a dtype, found by running them."""
    runs = []
    for name, kernel in KERNELS.items():
        query = torch.zeros(1, 2, 16, 64, device=device, dtype=dtype)
        try:
            with torch.no_grad(), warnings.catch_warnings(), sdpa_kernel(kernel):
                warnings.simplefilter("ignore")  # PyTorch says there why it does not run
                F.scaled_dot_product_attention(query, query, query, is_causal=True)
            runs.append(name)
        except RuntimeError:
            continue
    return ", ".join(runs) or "none"


def _devices() -> list[tuple[str, str]]:
    n_gpus = torch.cuda.device_count()
    rows = [("CPU", f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")]
    for index in range(n_gpus):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        rows.append((f"cuda:{index}", f"{properties.name}, {memory}, compute {properties.major}.{properties.minor}"))
    where = [("cpu", torch.float32)] + [("cuda", dtype) for dtype in (torch.bfloat16, torch.float32) if n_gpus]
    for device, dtype in where:
        rows.append((f"attention, {device}", f"{_kernels(device, dtype)} ({str(dtype).removeprefix('torch.')})"))
    return rows


def _engines() -> list[tuple[str, str]]:
    on_gpu, triton = torch.cuda.is_available(), importlib.util.find_spec("triton") is not None
    here = {"eager": True, "graph": on_gpu, "graph+compile": on_gpu}
    runs = [name for name in ENGINES if here.get(name, on_gpu and triton)]
    return [("engines", ", ".join(runs) + ("" if on_gpu else " (the others need a CUDA device)"))]


def report() -> str:
    """What runs here."""
    versions = [
        ("streaming-llm", __version__),
        ("Python", platform.python_version()),
        ("PyTorch", torch.__version__),
        ("Transformers", transformers.__version__),
        ("Triton", _version("triton")),
    ]
    families = ", ".join(supported_families())
    rows = [*versions, *_devices(), *_engines(), ("model types", families)]
    wide = max(len(name) for name, _ in rows) + 2
    return "\n".join(
        textwrap.fill(f"{name:<{wide}}{value}", 110, subsequent_indent=" " * wide) for name, value in rows
    )


def _version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "not installed"
    return getattr(importlib.import_module(package), "__version__", "unknown")


def model_report(name: str, streaming: StreamingConfig) -> str:
    """Whether a model streams, by its configuration.

    Raises:
        ValueError: it does not; says why.
        OSError: there is no such model.
        ImportError: it is a GGUF file, and the package that reads these is not installed.
    """
    path = Path(name)
    if name.startswith(("/", ".", "~")) and not path.exists():
        raise OSError("there is no such file or folder")
    if path.suffix == ".gguf" and path.is_file():
        config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    else:
        here = path.exists() or not _hub_answers(name)
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=here)
    layouts, rotaries = layer_layouts(config, streaming), rotaries_from_config(config)
    kept = Counter((layout.config.n_sink, layout.config.window_size) for layout in layouts)
    layers = ", ".join(
        f"{count} layers keep {sinks} sinks + {window} tokens" for (sinks, window), count in kept.items()
    )
    turned = sorted({rotary.rotary_dim for rotary in rotaries})
    return f"{name} ({config.model_type}) streams: {layers}; rotated dimensions: {', '.join(map(str, turned))}"


def _hub_answers(name: str) -> bool:
    """Whether the hub says anything about a model, asked once: Transformers tries again for half a minute."""
    try:
        huggingface_hub.HfApi().model_info(name, timeout=10)
    except (HfHubHTTPError, HFValidationError):
        return True  # that there is none, or that one has to log in: Transformers says so
    except Exception:  # no network: each version of the hub's client has errors of its own
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m streaming_llm", description=__doc__.partition(": ")[2])
    parser.add_argument("model", nargs="?", help="a model's name on the hub, its folder, or a .gguf file")
    sizes = {"n_sink": "sinks kept", "window_size": "recent tokens kept"}
    for key, meaning in sizes.items():
        default = getattr(StreamingConfig, key)
        about = f"{meaning}; default: {default}"
        parser.add_argument(f"--{key.replace('_', '-')}", type=int, default=default, metavar="N", help=about)
    options = parser.parse_args()
    if options.model is None:
        print(report())
        return 0
    try:
        print(model_report(options.model, StreamingConfig(options.n_sink, options.window_size)))
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"error: {options.model}: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
