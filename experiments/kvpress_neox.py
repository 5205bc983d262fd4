"""kvpress in the decode loop, on GPT-NeoX too. Imports kvpress: use `kvpress_support.import_adapter`.

kvpress knows Llama-like models. On GPT-NeoX it fails for five names, which `_ModelView` and `_AttentionView`
supply without changing kvpress or the model: the model's `.model`, a layer's `.self_attn`, the attention's
`head_dim`, and to its hooks `hidden_states` (passed by position there) and `past_key_values` (called `layer_past`).

Every press runs under key re-rotation: kept keys get the positions of their slots, and the query follows them.
For the StreamingLLM press this is what kvpress itself calls the method of the paper.
"""

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import kvpress
import torch
from kvpress import DecodingPress, KeyRerotationPress, ScorerPress

from experiments.kvpress_support import PRESSES
from personal_adapters.neox_flash import NeoXFlashAttentionAdapter
from streaming_llm.families import layer_windows, rotaries_from_model

# It warns about every model class that it does not know, and so about the view.
logging.getLogger("kvpress.presses.base_press").setLevel(logging.ERROR)


class RerotatingScorerPress(KeyRerotationPress, ScorerPress):
    """Key re-rotation as a `ScorerPress`, which is all that `DecodingPress` takes, limited to the rotary dimensions.

    (GPT-NeoX rotates a quarter of each head.)
    """

    @staticmethod
    def rerotate_keys(module, indices: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Keys [batch, heads, kv_len, head_dim] at `indices` [batch, heads, kept], rotated to positions 0..kept-1."""
        rotary_dim = 2 * module.rotary_emb.inv_freq.numel()
        rotary_view = SimpleNamespace(rotary_emb=module.rotary_emb, head_dim=rotary_dim)
        rotated = KeyRerotationPress.rerotate_keys(rotary_view, indices, keys[..., :rotary_dim])
        if rotary_dim == keys.shape[-1]:
            return rotated
        rest = keys[..., rotary_dim:]
        rest = rest.gather(2, indices.unsqueeze(-1).expand(-1, -1, -1, rest.shape[-1]))
        return torch.cat([rotated, rest], dim=-1)


class _AttentionView:
    """An attention layer under the names that kvpress looks for; all else, its class too, is the layer's own."""

    def __init__(self, attention):
        self._attention = attention
        config = attention.config
        default = config.hidden_size // config.num_attention_heads
        self.head_dim = getattr(attention, "head_dim", None) or default
        self.rotary_emb = None  # kvpress sets it; on this view, so that the model keeps its own attributes

    def __getattr__(self, name):
        return getattr(self._attention, name)

    @property
    def __class__(self):
        return type(self._attention)  # kvpress asks `isinstance` where a family's projections differ

    def register_forward_hook(self, hook, with_kwargs: bool):
        """Register kvpress's hook; it sees the call with the names of a Llama attention."""
        names = [name for name in inspect.signature(self._attention.forward).parameters if name != "kwargs"]

        def renamed(module, args, kwargs, output):
            named = dict(zip(names, args, strict=False)) | kwargs
            if "past_key_values" not in named:
                named["past_key_values"] = named["layer_past"]
            return hook(self, args, named, output)

        return self._attention.register_forward_hook(renamed, with_kwargs=with_kwargs)


class _ModelView:
    """A causal language model under the names that kvpress looks for: `.model.layers[i].self_attn`."""

    def __init__(self, model):
        base = model.base_model
        layers = [SimpleNamespace(self_attn=_attention_view(layer)) for layer in base.layers]
        self.config = model.config
        self.model = SimpleNamespace(layers=layers, rotary_emb=base.rotary_emb)


def _attention_view(layer) -> _AttentionView:
    for name in ("self_attn", "attention"):
        attention = getattr(layer, name, None)
        if isinstance(attention, NeoXFlashAttentionAdapter):
            attention = attention.wrapped
        if attention is not None:
            return _AttentionView(attention)
    raise ValueError(f"kvpress: {type(layer).__name__} has no attention layer under the names self_attn, attention")


def build_press(name: str, cache_size: int, n_sink: int) -> DecodingPress:
    """The press called `name` (see `PRESSES`) in kvpress's decode loop, compressing to `cache_size` at every step."""
    entry = PRESSES[name]
    if entry.cannot:
        raise ValueError(f"kvpress_press {name!r} cannot run: {entry.cannot}")
    options = {entry.sink_keyword: n_sink} if entry.sink_keyword else {}
    press = RerotatingScorerPress(getattr(kvpress, entry.class_name)(**options))
    return DecodingPress(press, compression_interval=1, target_size=cache_size)


def _not_rerotated(model) -> str | None:
    """Why kvpress would re-rotate or keep other keys than the model's attention means; None if it does neither."""
    rotaries = rotaries_from_model(model)
    if not hasattr(model.base_model, "layers"):
        return "it finds no layers under the names that it knows"
    if any(rotary.interleaved for rotary in rotaries):
        return "it re-rotates halves of a head, and this family rotates pairs of neighbours"
    if any(layer_windows(model.config)):
        return "layers have sliding windows of their own, and its cache is cut by slot"
    if len(set(map(id, rotaries))) > 1:
        return "it re-rotates the keys of all layers alike, and those of this model differ"
    return None


@contextmanager
def attach(press: DecodingPress, model, press_name: str) -> Iterator[None]:
    """Within it, the model's forwards compress the cache that they are given. The model is restored on leaving.

    Raises ValueError where the press needs what the model's family does not have.
    """
    reason = _not_rerotated(model)
    if reason is not None:
        raise ValueError(f"kvpress cannot run on {type(model).__name__} and be right: {reason}")
    view = _ModelView(model)
    attention = view.model.layers[0].self_attn
    if PRESSES[press_name].needs_queries and not (hasattr(attention, "q_proj") or hasattr(attention, "qkv_proj")):
        raise ValueError(
            f"kvpress_press {press_name!r} cannot run on {type(model).__name__}: it recomputes queries, and kvpress "
            "knows no way to do so for this family's attention"
        )
    with press(view):
        yield
