"""A stream in a file: paused, moved to another process or device, and gone on with to the same bits.

The format is safetensors: the tensors of a :class:`~streaming_llm.stream_state.StreamState`, and its facts as JSON in
the header. The weights are not in it, and are not compared.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import StreamingConfig
from .inner_model import transformers_model
from .stream_state import StreamState, put

if TYPE_CHECKING:
    from .kv_cache import StreamingKVCache

FORMAT, VERSION = "streaming_llm.stream", 1
USER = "user."
"""Prefix of a caller's own strings in the header."""


def write(path: str | os.PathLike, state: StreamState, metadata: Mapping[str, str] | None = None) -> None:
    """Write a state as safetensors: the file is whole, or as it was before.

    Args:
        metadata: strings of the caller's own, see :func:`read_metadata`.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    own = {"format": FORMAT, "version": str(VERSION), "facts": json.dumps(state.facts, allow_nan=False)}
    header = own | {f"{USER}{name}": value for name, value in (metadata or {}).items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in state.tensors.items()}, temporary, header)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:  # its words for a full disk or a missing folder
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | os.PathLike) -> StreamState:
    """Read a state; its tensors are on the CPU.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no saved stream, or not whole.
    """
    header, tensors = _read(path, with_tensors=True)
    return StreamState(_facts(path, header), tensors)


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The strings that were given to :meth:`StreamingKVCache.save` with a stream; raises as :func:`read`."""
    header, _ = _read(path, with_tensors=False)
    return {name.removeprefix(USER): value for name, value in header.items() if name.startswith(USER)}


def _read(path: str | os.PathLike, with_tensors: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()} if with_tensors else {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a saved stream, or cut short ({error})") from None
    if header.get("format") != FORMAT:
        raise ValueError(f"{path}: a safetensors file, but not a saved stream")
    if header.get("version") != str(VERSION):
        raise ValueError(f"{path}: version {header.get('version')} of the format; this program reads {VERSION}")
    return header, tensors


def _facts(path: str | os.PathLike, header: dict[str, str]) -> dict[str, Any]:
    kinds = {"model": dict, "n_sink": int, "window_size": int, "rotary": list, "rotary_of_layer": list}
    kinds |= {"n_seen": int, "position_offset": int, "slots": list, "dtype": str | None}
    try:
        facts = json.loads(header["facts"])
        broken = [name for name, kind in kinds.items() if not isinstance(facts[name], kind)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a whole saved stream ({type(error).__name__}: {error})") from None
    if broken:
        raise ValueError(f"{path}: not a whole saved stream ({', '.join(broken)} missing)")
    return facts


def load(
    path: str | os.PathLike,
    model,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> StreamingKVCache:
    """See :meth:`StreamingKVCache.load`."""
    from .kv_cache import StreamingKVCache
    from .model import new_cache

    state = read(path)
    config = StreamingConfig(state.facts["n_sink"], state.facts["window_size"])
    if isinstance(model, nn.Module):
        cache = new_cache(transformers_model(model), config)
    else:
        cache = StreamingKVCache(model, config.n_sink, config.window_size)
    _restore(cache, path, state, model, device, dtype)
    return cache


def restore(
    cache: StreamingKVCache,
    path: str | os.PathLike,
    model,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """As :func:`load`, into a cache that is there already: its buffers stay where they are, if they fit.

    Raises:
        OSError, ValueError: as :func:`load`, and for another ``n_sink`` or ``window_size``; the cache is unchanged.
    """
    _restore(cache, path, read(path), model, device, dtype)


def _restore(cache: StreamingKVCache, path, state: StreamState, model, device, dtype: torch.dtype | None) -> None:
    if isinstance(model, nn.Module):
        model = transformers_model(model)
        _require_dtype(path, model, state.facts["dtype"], dtype)
        where = layer_devices(model, len(cache.layers)) if device is None else torch.device(device)
    else:
        where = torch.device("cpu" if device is None else device)
    try:
        put(cache, state, device=where, dtype=dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _require_dtype(path: str | os.PathLike, model: nn.Module, saved: str | None, wanted: torch.dtype | None) -> None:
    name = saved if wanted is None else str(wanted).removeprefix("torch.")
    own = str(model.dtype).removeprefix("torch.")
    if saved is not None and name != own:
        raise ValueError(
            f"{path}: dtype: {name} there, {own} here; pass dtype=torch.{own} to convert (the outputs will not be "
            "the same to the bit)"
        )


def layer_devices(model: nn.Module, num_layers: int) -> torch.device | list[torch.device]:
    """Where each decoder layer's keys belong."""
    stacks = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    if not stacks:
        return model.get_input_embeddings().weight.device
    return [next(layer.parameters()).device for layer in stacks[0]]
