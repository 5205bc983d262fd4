"""The state of a stream as a value: all that its future depends on; whether it fits a cache; and in a file.

That is the stored keys and values as they lie, the sinks as they were first rotated, and how far the rows are. A state
also says of which model and cache it is: one that does not fit is refused, because it would silently give wrong
tokens. The weights are not in it, and are not compared.

A file is in the format safetensors, with the facts as JSON in its header. A stream goes on from it bit for bit, in
another process if need be.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import StreamingConfig
from .families import value_of
from .positions import StreamLayout
from .rope_utils import Rotary

FORMAT, VERSION = "streaming_llm.stream", 1
USER = "user."
"""Prefix of a caller's own strings in the header."""

MODEL_FACTS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_kv_heads",
    "multi_query",
    "new_decoder_architecture",
    "head_dim",
)
"""What decides the shape of keys and values in one family or another; compared where both sides have it."""


@dataclass(frozen=True)
class StreamState:
    """Where a stream is.

    Args:
        facts: JSON values. Of which cache: ``model`` (see ``MODEL_FACTS``), ``n_sink``, ``window_size``, ``rotary``
            (the rotations that occur), ``rotary_of_layer``; where layers differ ``windows`` (of each), and
            ``sliding_layers`` unless it is ``auto``. Where: ``n_seen`` and ``position_offset`` (a list of each row's
            where rows are not equally far), ``taken_back`` unless it is 0, ``dtype`` (of an empty stream ``None``),
            ``slots`` (allocated in each layer; the first of them are stored).
        tensors: ``<layer>.keys`` and ``<layer>.values`` ``[batch, num_kv_heads, n_stored, head_dim]`` and, once the
            sinks have moved, ``<layer>.sink_keys`` ``[batch, num_kv_heads, n_sink, head_dim]``; ``pending``
            ``[batch]`` where :attr:`StreamingKVCache.pending` is known. Those of a cache's state are views.
    """

    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def streaming_config(self) -> StreamingConfig:
        """Sinks and window of the stream."""
        sliding_layers = self.facts.get("sliding_layers", "auto")
        return StreamingConfig(self.facts["n_sink"], self.facts["window_size"], sliding_layers)

    @property
    def seen(self) -> list[int]:
        """Tokens seen, by each row or by all."""
        return _as_list(self.facts["n_seen"])

    @property
    def offset(self) -> list[int]:
        """Position of the first token, of each row or of all."""
        return _as_list(self.facts["position_offset"])


def _as_list(value: int | list[int]) -> list[int]:
    return value if isinstance(value, list) else [value]


def as_fact(values: Sequence[int]) -> int | list[int]:
    """One number for all rows, or a list."""
    return values[0] if len(values) == 1 else list(values)


def model_facts(config: Any) -> dict[str, Any]:
    """What a Transformers configuration says about the shape of keys and values."""
    config = config.get_text_config(decoder=True)
    return {name: value for name in MODEL_FACTS if (value := value_of(config, name)) is not None}


def rotation_facts(rotary: Rotary) -> dict[str, Any]:
    """A rotation as JSON values."""
    values = {"inv_freq": rotary.inv_freq.tolist()}  # JSON keeps every bit of a float64
    others = {name: value for name, value in vars(rotary).items() if not isinstance(value, Tensor)}
    if not rotary.offset:  # as in files from before there was one
        del others["offset"]
    return values | others


def model_differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What sets two models apart by their facts, in words."""
    return [
        f"{name}: {there[name]} there, {here[name]} here"
        for name in MODEL_FACTS
        if name in there and name in here and there[name] != here[name]
    ]


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """What keeps a state with the facts ``theirs`` from a cache with the identity ``ours``, in words."""
    found = model_differences(theirs["model"], ours["model"])
    for name in ("rotary_of_layer", "slots"):
        if not found and len(theirs[name]) != len(ours["rotary_of_layer"]):
            found.append(f"layers in {name}: {len(theirs[name])} there, {len(ours['rotary_of_layer'])} here")
    for name in ("n_sink", "window_size", "windows"):
        if theirs.get(name) != ours.get(name):
            found.append(f"{name}: {theirs.get(name)} there, {ours.get(name)} here")
    if found:
        return found
    for layer, (a, b) in enumerate(zip(theirs["rotary_of_layer"], ours["rotary_of_layer"], strict=True)):
        rotation, own = theirs["rotary"][a], ours["rotary"][b]
        names = [name for name in {**rotation, **own} if rotation.get(name) != own.get(name)]
        if names:
            return [f"{name} of the rotation in layer {layer}: {_pair(rotation, own, name)}" for name in names]
    return []


def _pair(theirs: dict[str, Any], ours: dict[str, Any], name: str) -> str:
    a, b = theirs.get(name), ours.get(name)
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        index = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        return f"number {index} is {a[index]!r} there, {b[index]!r} here"
    if isinstance(a, list) and isinstance(b, list):
        return f"{len(a)} there, {len(b)} here"
    return f"{a} there, {b} here"


def require_dtype(state: StreamState, own: torch.dtype, wanted: torch.dtype | None) -> None:
    """Raise ``ValueError`` where a state, converted to ``wanted``, is not in the model's ``own`` dtype."""
    saved = state.facts["dtype"]
    name, here = (str(dtype).removeprefix("torch.") for dtype in (wanted or saved, own))
    if saved is not None and name != here:
        raise ValueError(
            f"dtype: {name} there, {here} here; pass dtype=torch.{here} to convert (the outputs will not be the same "
            "to the bit)"
        )


def layer_tensors(state: StreamState, index: int, layout: StreamLayout) -> dict[str, Tensor]:
    """A layer's tensors.

    Raises:
        ValueError: they do not agree with the counters, or with each other.
    """
    names = ("keys", "values", "sink_keys")
    found = {name: state.tensors[key] for name in names if (key := f"{index}.{name}") in state.tensors}
    n_seen = max(state.seen)
    n_stored, n_sink = layout.stored(n_seen), layout.config.n_sink
    expected = {"keys": n_stored, "values": n_stored} if n_seen else {}
    if n_seen > layout.capacity and n_sink:
        expected["sink_keys"] = n_sink
    lengths = {name: tensor.shape[2] if tensor.dim() == 4 else None for name, tensor in found.items()}
    rows = {tuple(tensor.shape[:2]) for tensor in found.values()}
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in found.values()}
    whole = not found or (len(rows) == 1 and dtypes == {state.facts["dtype"]})
    if found and len(state.seen) > 1:
        whole = whole and next(iter(rows))[0] == len(state.seen) == len(state.offset)
    if lengths != expected or not whole or not n_stored <= state.facts["slots"][index] <= layout.capacity:
        raise ValueError(f"layer {index} is not whole: slots {lengths} where {expected} belong after {n_seen} tokens")
    return found


# In a file


def write(path: str | os.PathLike[str], state: StreamState, metadata: Mapping[str, str] | None = None) -> None:
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


def read(path: str | os.PathLike[str]) -> StreamState:
    """Read a state; its tensors are on the CPU.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no saved stream, or not whole.
    """
    header, tensors = _read(path, with_tensors=True)
    kinds: dict[str, Any] = {"model": dict, "n_sink": int, "window_size": int, "rotary": list, "rotary_of_layer": list}
    kinds |= {"n_seen": int | list, "position_offset": int | list, "slots": list, "dtype": str | None}
    try:
        facts = json.loads(header["facts"])
        broken = [name for name, kind in kinds.items() if not isinstance(facts[name], kind)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a whole saved stream ({type(error).__name__}: {error})") from None
    if broken:
        raise ValueError(f"{path}: not a whole saved stream ({', '.join(broken)} missing)")
    return StreamState(facts, tensors)


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """What is raised about a state says which file it is from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The strings that were given to :meth:`StreamingKVCache.save` with a stream; raises as :func:`read`."""
    header, _ = _read(path, with_tensors=False)
    return {name.removeprefix(USER): value for name, value in header.items() if name.startswith(USER)}


def _read(path: str | os.PathLike[str], with_tensors: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
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
