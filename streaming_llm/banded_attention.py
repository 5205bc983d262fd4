"""Exact attention of a block of new tokens over a streaming cache.

Every query of the block has its own window and its own distance to the sinks. The paths, chosen by the SDPA
kernels that are allowed (``torch.nn.attention.sdpa_kernel``):

* ``flash``: no mask. The band of the window is either one call of CUDA's windowed flash kernel, or, cut into
  blocks of ``W`` queries, two causal calls: the block over itself, and the block over the ``W`` keys before it,
  which is causal once both are reversed. The sinks are scored with the query turned to their distance, and
  everything is merged by log-sum-exp.
* ``cudnn`` (where neither of the others is allowed): the two causal calls.
* ``math``: one softmax with a mask, see :mod:`math_attention`. Soft-capped scores (Gemma 2) take this path alone.

Shapes: query ``[batch, num_heads, q_len, head_dim]``, key and value ``[batch, num_kv_heads, kv_len, head_dim]``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .copies import joined
from .math_attention import band_math, causal_math
from .rope_utils import rotate
from .sinks import BlockPlan

try:
    from . import triton_kernels
except ImportError:  # no Triton: PyTorch's own operators do the same
    triton_kernels = None


def choose_kernel(query: Tensor) -> str:
    """The kernel to use among those that are allowed for SDPA: ``flash``, else ``math``, else ``cudnn``.

    With gradients only math will do: the other operators do not differentiate the log-sum-exp that results are
    merged by.

    Raises:
        RuntimeError: none of the allowed kernels can do it.
    """
    needs_grad = torch.is_grad_enabled() and query.requires_grad
    on_cuda = query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256
    flash_runs = query.device.type == "cpu" or (query.device.type == "cuda" and on_cuda)
    if flash_runs and not needs_grad and torch.backends.cuda.flash_sdp_enabled():
        return "flash"
    if torch.backends.cuda.math_sdp_enabled():
        return "math"
    if query.device.type == "cuda" and on_cuda and not needs_grad and torch.backends.cuda.cudnn_sdp_enabled():
        return "cudnn"
    raise RuntimeError(
        f"no allowed attention kernel takes a block of {query.dtype} with head_dim {query.shape[-1]} on "
        f"{query.device.type}{' with gradients' if needs_grad else ''}: allow math, or flash or cudnn with bfloat16 "
        "or float16 under torch.no_grad()"
    )


def kernel_for(query: Tensor, softcap: float | None) -> str:
    """The kernel to use, as :func:`choose_kernel` says, for scores that may be soft-capped.

    Raises:
        RuntimeError: none of the allowed kernels can do it. No kernel of PyTorch's caps scores, so that they have to
            be written out, which is ``math``.
    """
    if softcap is None:
        return choose_kernel(query)
    if torch.backends.cuda.math_sdp_enabled():
        return "math"
    raise RuntimeError(
        f"no allowed attention kernel soft-caps scores (at {softcap}): allow math, which writes the scores out"
    )


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, scale: float, softcap: float | None = None
) -> Tensor:
    """Attention of new tokens under the stream's rule (each its own window, sinks at ``min(t, S+W) - j``).

    Args:
        query: rotated to the tokens' positions in the stream.
        key, value: of the new tokens; those that ``plan.previous`` lacks precede them.
        plan: made by the cache; marked as consumed.
        scale: factor on the scores.
        softcap: bound of the scores, see :func:`explicit_attention`.

    Returns:
        ``[batch, num_heads, q_len, head_dim]`` in the dtype of ``query``.
    """
    plan.consumed = True
    kernel = kernel_for(query, softcap)
    # Under autocast a cache may hold another dtype.
    key, value, *previous = (repeat_heads(query, x.to(query.dtype), kernel) for x in (key, value, *plan.previous))
    batch, num_heads, q_len, head_dim = query.shape
    out = query.new_empty((batch, q_len, num_heads, head_dim))
    window, given = plan.layout.config.window_size, (plan, scale, kernel, softcap)
    if _continues(query, plan, kernel):  # only the first W queries see tokens of the blocks before
        early = (joined((x[:, :, -window:], new[:, :, :window]), dim=2)
                 for x, new in zip(previous, (key, value), strict=True))  # fmt: skip
        _streaming_band(query[:, :, :window], *early, out[:, :window], plan.first_query, *given)
        _streaming_band(query[:, :, window:], key, value, out[:, window:], plan.first_query + window, *given)
        return out.transpose(1, 2)
    if previous:
        key, value = (joined(parts, dim=2) for parts in zip(previous, (key, value), strict=True))
    # Queries up to token S + W have lost nothing yet: plain causal attention over every token so far.
    n_dense = min(max(plan.layout.config.cache_size + 1 - plan.first_query, 0), q_len)
    if n_dense:
        kv_len = plan.first_query + n_dense - plan.first_key
        dense = (query[:, :, :n_dense], key[:, :, :kv_len], value[:, :, :kv_len])
        out[:, :n_dense] = causal_attention(*dense, scale, kernel, softcap).transpose(1, 2)
    if n_dense < q_len:
        first_query = plan.first_query + n_dense
        first_key = first_query - window - plan.first_key
        band = (query[:, :, n_dense:], key[:, :, first_key:], value[:, :, first_key:])
        _streaming_band(*band, out[:, n_dense:], first_query, *given)
    return out.transpose(1, 2)


def _continues(query: Tensor, plan: BlockPlan, kernel: str) -> bool:
    """Whether most of a block is attended to where its keys lie, apart from its first queries: on a CUDA device."""
    config = plan.layout.config
    full = plan.first_query > config.cache_size and query.shape[2] > config.window_size
    return full and kernel != "math" and query.device.type == "cuda"


def repeat_heads(query: Tensor, x: Tensor, kernel: str) -> Tensor:
    """Keys or values repeated to one per query head, except where the kernel shares them itself."""
    groups = query.shape[1] // x.shape[1]
    if groups == 1 or (kernel == "flash" and query.device.type == "cuda"):
        return x
    return x.repeat_interleave(groups, dim=1)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, kernel: str, softcap: float | None = None
) -> Tensor:
    """Causal attention whose last query sees the last key (SDPA's ``is_causal`` aligns the first ones).

    The result may be of higher precision than the query.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    if kernel == "math":
        return causal_math(query, key, value, scale, softcap)
    past = kv_len - q_len
    attend = FUSED[kernel]
    out, lse = attend(query, key[:, :, past:], value[:, :, past:], scale, causal=True)
    if not past:
        return out
    return merge(out, lse, *attend(query, key[:, :, :past], value[:, :, :past], scale, causal=False))[0]


def flash(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """PyTorch's own flash kernel for the device, without a mask.

    Returns:
        Output like ``query`` and the log-sum-exp of the scores ``[batch, num_heads, q_len]``, float32 or better.
    """
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scale
        )
        return out, lse
    return _cuda_flash(query, key, value, scale, causal)


def windowed_flash(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> tuple[Tensor, Tensor]:
    """CUDA's flash kernel with a band: query ``i`` sees keys ``i .. i + window`` of ``window + q_len``."""
    return _cuda_flash(query, key, value, scale, True, window_size_left=window, window_size_right=0)


def _cuda_flash(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, **window: int
) -> tuple[Tensor, Tensor]:
    head_dim = query.shape[-1]
    if head_dim % 8:
        query, key, value = (F.pad(x, (0, 8 - head_dim % 8)) for x in (query, key, value))
    out, lse = torch.ops.aten._flash_attention_forward(
        *(x.transpose(1, 2) for x in (query, key, value)),
        None, None, query.shape[2], key.shape[2], 0.0, causal, False, scale=scale, **window,
    )[:2]  # fmt: skip
    return out.transpose(1, 2)[..., :head_dim], lse


def cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """cuDNN's attention; arguments and results as of :func:`flash`."""
    head_dim = query.shape[-1]
    if head_dim % 8:
        query, key, value = (F.pad(x, (0, 8 - head_dim % 8)) for x in (query, key, value))
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False, scale=scale
    )[:2]
    return out[..., :head_dim], lse.view(query.shape[:3])


FUSED: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"flash": flash, "cudnn": cudnn}
"""Kernels that give the log-sum-exp with the result."""


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys from the attention over each.

    Args:
        out, other: ``[..., q_len, head_dim]``.
        lse, other_lse: log-sum-exp of the scores over each set, ``[..., q_len]``.

    Returns:
        Result and log-sum-exp in the precision of the latter, so that merging again does not round again.
    """
    total = torch.logaddexp(lse, other_lse)
    dtype = torch.promote_types(out.dtype, lse.dtype)
    weight, other_weight = ((x - total).exp().unsqueeze(-1).to(dtype) for x in (lse, other_lse))
    return out * weight + other * other_weight, total


def _streaming_band(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    first_query: int,
    plan: BlockPlan,
    scale: float,
    kernel: str,
    softcap: float | None,
) -> None:
    """Attention of queries that are all past the cache size; keys begin ``W`` tokens before the first of them.

    Writes to ``out`` ``[batch, q_len, num_heads, head_dim]``.
    """
    config, rotation = plan.layout.config, plan.rotation
    # Queries are turned from token t to position S + W, where the sinks in their first rotation see them.
    turns = (config.cache_size - first_query, query.shape[2], query.device)
    if kernel == "math":
        turned = rotate(query, *rotation.turns(*turns), rotation.rotary) if config.n_sink else None
        out.copy_(band_math(query, turned, key, value, plan, scale, softcap).transpose(1, 2))
        return
    if triton_kernels is None or not triton_kernels.available(query) or not rotation.rotary.rotary_dim:
        found, lse = _band_fused(query, key, value, config.window_size, scale, kernel)
        if config.n_sink:
            found = _merge_sinks(found, lse, rotate(query, *rotation.turns(*turns), rotation.rotary), plan, scale)
        out.copy_(found.transpose(1, 2))
        return
    whole = query.shape[2] - query.shape[2] % config.window_size
    if kernel != "flash" and whole not in (0, query.shape[2]):
        for part, at in ((slice(whole), 0), (slice(whole, None), whole)):
            keys = slice(at, None if at else whole + config.window_size)
            band = query[:, :, part], key[:, :, keys], value[:, :, keys], out[:, part]
            _streaming_band(*band, first_query + at, plan, scale, kernel, softcap)
        return
    sinks = None
    if config.n_sink:
        cos_sin = rotation.turns(*turns, paired=True)
        sinks = triton_kernels.Sinks(plan.sink_keys, plan.sink_values, *cos_sin, rotation.rotary.interleaved)
    if kernel == "flash" or not whole:
        parts = _band_fused(query, key, value, config.window_size, scale, kernel), None
    else:
        parts = _band_halves(query, key, value, config.window_size, scale, FUSED[kernel])
    triton_kernels.merge(query, *parts, sinks, scale, out)


def _band_halves(
    query: Tensor, key: Tensor, value: Tensor, window: int, scale: float, attend: Callable
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A multiple of ``W`` queries by two causal calls, not merged: see :func:`triton_kernels.merge`."""
    own = (x.unflatten(2, (-1, window)).transpose(1, 2).flatten(0, 1)
           for x in (query, key[:, :, window:], value[:, :, window:]))  # fmt: skip
    before = (triton_kernels.reversed_blocks(x, window)
              for x in (query, key[:, :, :-window], value[:, :, :-window]))  # fmt: skip
    return attend(*own, scale, causal=True), attend(*before, scale, causal=True)


def _merge_sinks(out: Tensor, lse: Tensor, turned: Tensor, plan: BlockPlan, scale: float) -> Tensor:
    """Add the sinks, a handful of keys, to the attention over the window."""
    batch, num_heads, q_len, head_dim = turned.shape
    keys, values = plan.sink_keys, plan.sink_values
    grouped = (batch, keys.shape[1], -1, head_dim)  # [batch, num_kv_heads, groups * q_len, head_dim]
    dtype = lse.dtype
    scores = (turned.reshape(grouped).to(dtype) @ keys.transpose(2, 3).to(dtype)) * scale
    scores = scores.view(batch, num_heads, q_len, -1)
    total = torch.logaddexp(lse, scores.logsumexp(-1))
    weights = (scores - total.unsqueeze(-1)).exp().view(batch, keys.shape[1], -1, keys.shape[2])
    from_sinks = (weights @ values.to(dtype)).view_as(out)
    return torch.addcmul(from_sinks, out.to(dtype), (lse - total).exp().unsqueeze(-1))


def _band_fused(
    query: Tensor, key: Tensor, value: Tensor, window: int, scale: float, kernel: str
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the window alone."""
    if kernel == "flash" and query.device.type == "cuda":
        return windowed_flash(query, key, value, scale, window)
    attend = FUSED[kernel]
    q_len = query.shape[2]
    if q_len > window:
        return _band_folded(query, key, value, window, scale, attend)
    out, lse = attend(query, key[:, :, window:], value[:, :, window:], scale, causal=True)
    # Of the W keys before, query i sees those from the i-th on: causal among the first q_len once reversed.
    reverse = [x[:, :, :q_len].flip(2) for x in (query, key, value)]
    older, older_lse = attend(*reverse, scale, causal=True)
    out, lse = merge(out, lse, older.flip(2), older_lse.flip(2))
    if q_len < window:
        between = slice(q_len, window)
        out, lse = merge(out, lse, *attend(query, key[:, :, between], value[:, :, between], scale, causal=False))
    return out, lse


def _band_folded(
    query: Tensor, key: Tensor, value: Tensor, window: int, scale: float, attend: Callable
) -> tuple[Tensor, Tensor]:
    """The same for more than ``W`` queries: cut into blocks of ``W``, which become entries of the batch."""
    batch, q_len = query.shape[0], query.shape[2]
    n_blocks = -(-q_len // window)
    padding = n_blocks * window - q_len

    def fold(x: Tensor) -> Tensor:  # [batch, heads, n * W, d] -> [batch, n, heads, W, d]
        x = F.pad(x, (0, 0, 0, padding))
        return x.unflatten(2, (-1, window)).transpose(1, 2)

    def unfold(x: Tensor) -> Tensor:  # [batch * n, heads, W, ...] -> [batch, heads, q_len, ...]
        return x.unflatten(0, (batch, n_blocks)).transpose(1, 2).flatten(2, 3)[:, :, :q_len]

    queries, keys, values = fold(query), fold(key), fold(value)
    own = [x.flatten(0, 1) for x in (queries, keys[:, 1:], values[:, 1:])]
    before = [x.flatten(0, 1).flip(2) for x in (queries, keys[:, :-1], values[:, :-1])]
    out, lse = attend(*own, scale, causal=True)
    older, older_lse = attend(*before, scale, causal=True)
    out, lse = merge(out, lse, older.flip(2), older_lse.flip(2))
    return unfold(out), unfold(lse)
