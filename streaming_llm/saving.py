"""A stream in a file: paused, moved to another process or device, and gone on with to the same bits.

The format is safetensors: the tensors of a :class:`~streaming_llm.stream_state.StreamState`, and its facts as JSON in
the header. The weights are not in it, and are not compared.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .stream_state import StreamState

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
    kinds |= {"n_seen": int | list, "position_offset": int | list, "slots": list, "dtype": str | None}
    try:
        facts = json.loads(header["facts"])
        broken = [name for name, kind in kinds.items() if not isinstance(facts[name], kind)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a whole saved stream ({type(error).__name__}: {error})") from None
    if broken:
        raise ValueError(f"{path}: not a whole saved stream ({', '.join(broken)} missing)")
    return facts
