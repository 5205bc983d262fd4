"""NeoXFlashAttentionAdapter: one attention layer, run with one SDPA kernel and no other.

Named after GPT-NeoX, the first family; it wraps every family of ``recognition.ATTENTION_CLASSES``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from .recognition import attention_layers
from .sdpa import backend_context, require_backend
from .written_out import give_sdpa, is_written_out, take_sdpa


class NeoXFlashAttentionAdapter(nn.Module):
    """Takes an attention layer's place in the module tree and runs its unchanged forward with one kernel.

    The adapter shares the layer's parameters, buffers, submodules and hooks, so state-dict keys, ``.to()``,
    optimisers, ``device_map``, PEFT and quantisation see what they saw before, and a hook runs once, whenever it was
    registered; every other attribute is the layer's own.

    Args:
        attention: the attention layer.
        backend: name of the one SDPA kernel to allow, see ``sdpa.ATTN_BACKENDS``.

    Raises:
        ValueError: unknown backend.
    """

    def __init__(self, attention: nn.Module, backend: str) -> None:
        super().__init__()
        if isinstance(attention, NeoXFlashAttentionAdapter):
            attention = attention.wrapped
        for name in self.__dict__:  # nn.Module's own: parameters, buffers, submodules, hooks, training
            self.__dict__[name] = attention.__dict__[name]
        self.__dict__["wrapped"] = attention  # no submodule: its own are in the tree already
        self.backend = backend

    @property
    def backend(self) -> str:
        """Name of the kernel; assign another to switch without reloading."""
        return self.__dict__["_backend"]

    @backend.setter
    def backend(self, name: str) -> None:
        self.__dict__["_backend"] = require_backend(name)

    def kernel_context(self) -> AbstractContextManager:
        """Context in which SDPA can run this adapter's kernel only, for code that does not call ``forward``."""
        return backend_context(self.backend)

    def forward(self, *args, **kwargs):
        """The layer's forward, in which SDPA can run this adapter's kernel only."""
        with self.kernel_context():
            return self.wrapped.forward(*args, **kwargs)  # the hooks are shared and have run

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "wrapped" not in self.__dict__:  # while being unpickled
                raise
            return getattr(self.__dict__["wrapped"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        wrapped = self.__dict__.get("wrapped")
        if wrapped is not None and name in wrapped.__dict__:  # an attribute of the layer, which its forward reads
            setattr(wrapped, name, value)
        if wrapped is None or name in self.__dict__ or name not in wrapped.__dict__:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__ or name not in self.__dict__["wrapped"].__dict__:
            super().__delattr__(name)
        else:
            delattr(self.wrapped, name)

    def extra_repr(self) -> str:
        return f"{type(self.wrapped).__name__}, backend={self.backend!r}"


def wrap_attention(model: nn.Module, backend: str) -> int:
    """Run every attention layer of ``model`` with the kernel ``backend``, in place.

    A model that is wrapped already is pointed at ``backend``. No weight and no state-dict key changes.

    Args:
        model: a Transformers model of a family in ``recognition.ATTENTION_CLASSES``, with ``sdpa`` attention
            (GPT-J has none, and is given it). Where scores are soft-capped (Gemma 2), ``eager`` too, and ``math``
            is the only backend: no SDPA kernel caps scores, so that they have to be written out.
        backend: see ``sdpa.ATTN_BACKENDS``; not ``auto`` (``sdpa.resolve_attn_backend`` resolves that).

    Returns:
        The number of layers wrapped.

    Raises:
        ValueError: unknown backend or model family, attention that does not go through SDPA, or scores that the
            backend does not soft-cap.
    """
    require_backend(backend)
    layers = attention_layers(model)
    implementation = getattr(model.config, "_attn_implementation", None) or ""
    written_out = all(is_written_out(getattr(layer, "wrapped", layer)) for _, _, layer in layers)
    cap = getattr(model.config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    if cap is not None and backend != "math":
        raise ValueError(
            f"the model soft-caps its attention scores (at {cap}), which the kernel of backend {backend!r} does not: "
            "use math, which writes them out"
        )
    if not implementation.endswith("sdpa") and not written_out and cap is None:
        raise ValueError(
            f"the model's attention implementation is {implementation!r}, which takes no SDPA kernel: "
            "load it with attn_implementation='sdpa'"
        )
    for parent, name, layer in layers:
        if isinstance(layer, NeoXFlashAttentionAdapter):
            layer.backend = backend
        else:
            give_sdpa(layer)
            setattr(parent, name, NeoXFlashAttentionAdapter(layer, backend))
    return len(layers)


def unwrap_attention(model: nn.Module) -> int:
    """Undo :func:`wrap_attention`; a model that is not wrapped stays as it is.

    Returns:
        The number of layers unwrapped.
    """
    layers = [found for found in attention_layers(model) if isinstance(found[2], NeoXFlashAttentionAdapter)]
    for parent, name, adapter in layers:
        take_sdpa(adapter.wrapped)
        setattr(parent, name, adapter.wrapped)
    return len(layers)
