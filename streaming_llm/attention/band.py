"""Exact attention of a block of new tokens over a streaming cache.

Every query of the block has its own window and its own distance to the sinks. The paths, chosen by the SDPA
kernels that are allowed (``torch.nn.attention.sdpa_kernel``):

* ``flash``: no mask. The band of the window is either one call of CUDA's windowed flash kernel, or, cut into
  blocks of ``W`` queries, two causal calls: the block over itself, and the block over the ``W`` keys before it,
  which is causal once both are reversed. The sinks are scored with the query turned to their distance, and
  everything is merged by log-sum-exp.
* ``cudnn`` (where neither of the others is allowed): the two causal calls.
* ``math``: one softmax with a mask, see :mod:`.math_kernel`. Soft-capped scores (Gemma 2) take this path alone.

A kernel that does all of this at once may be given instead.

Shapes: query ``[batch, num_heads, q_len, head_dim]``, key and value ``[batch, num_kv_heads, kv_len, head_dim]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rope_utils import rotate
from . import kernel_choice
from .math_kernel import Scores, band_math
from .plan import BlockPlan
from .torch_kernels import WITH_LSE, causal_attention, flash, join_learned, merge, repeat_heads
from .wide_copies import joined

try:
    from . import triton_kernels
except ImportError:  # no Triton: PyTorch's own operators do the same
    triton_kernels = None  # type: ignore[assignment]

WithLse = tuple[Tensor, Tensor]
"""Attention and the log-sum-exp of its scores."""

OwnKernel = Callable[..., None]
"""``(query, key, value, out, window, scores, sinks)``, as :func:`.band_attention` takes them."""


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, scores: Scores, own: OwnKernel | None = None
) -> Tensor:
    """Attention of new tokens under the stream's rule (each its own window, sinks at ``min(t, S+W) - j``).

    Args:
        query: rotated to the tokens' positions in the stream.
        key, value: of the new tokens; those that ``plan.previous`` lacks precede them.
        plan: made by the cache.
        own: a kernel that does all of it, in place of those of SDPA.

    Returns:
        ``[batch, num_heads, q_len, head_dim of value]`` in the dtype of ``query``.
    """
    kernel = "own" if own else kernel_choice.choose_kernel(query, scores.softcap)
    # Under autocast a cache may hold another dtype.
    key, value, *previous = (repeat_heads(query, x.to(query.dtype), kernel) for x in (key, value, *plan.previous))
    batch, num_heads, q_len = query.shape[:3]
    out = query.new_empty((batch, q_len, num_heads, value.shape[-1]))
    window, band = plan.layout.config.window_size, _Band(plan, scores, kernel, own)
    if continues(query, plan, kernel):  # only the first W queries see tokens of the blocks before
        keys, values = (joined((x[:, :, -window:], new[:, :, :window]), dim=2)
                        for x, new in zip(previous, (key, value), strict=True))  # fmt: skip
        band.attend(query[:, :, :window], keys, values, out[:, :window], plan.first_query)
        band.attend(query[:, :, window:], key, value, out[:, window:], plan.first_query + window)
        return out.transpose(1, 2)
    if previous:
        key, value = (joined(parts, dim=2) for parts in zip(previous, (key, value), strict=True))
    # Up to token S + W nothing has been evicted: plain causal attention over every token so far.
    n_dense = min(max(plan.layout.config.cache_size + 1 - plan.first_query, 0), q_len)
    if n_dense:
        kv_len = plan.first_query + n_dense - plan.first_key
        dense = query[:, :, :n_dense], key[:, :, :kv_len], value[:, :, :kv_len]
        if own:
            own(*dense, out[:, :n_dense], None, scores, None)
        else:
            out[:, :n_dense] = causal_attention(*dense, scores).transpose(1, 2)
    if n_dense < q_len:
        first_query = plan.first_query + n_dense
        first_key = first_query - window - plan.first_key
        keys, values = key[:, :, first_key:], value[:, :, first_key:]
        band.attend(query[:, :, n_dense:], keys, values, out[:, n_dense:], first_query)
    return out.transpose(1, 2)


def continues(query: Tensor, plan: BlockPlan, kernel: str) -> bool:
    """Whether a block's keys are to stay where they lie, earlier ones being copied before its first ``W`` alone.

    That is worth it on a CUDA device, for a block longer than the window after a cache that is full.
    """
    config = plan.layout.config
    full = plan.first_query > config.cache_size and query.shape[2] > config.window_size
    return full and bool(plan.previous) and kernel != "math" and query.device.type == "cuda"


@dataclass(frozen=True)
class _Band:
    """How queries past the cache size attend, by a kernel."""

    plan: BlockPlan
    scores: Scores
    kernel: str
    own: OwnKernel | None = None

    @property
    def _window(self) -> int:
        return self.plan.layout.config.window_size

    def attend(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, first_query: int) -> None:
        """Attention of queries that are all past the cache size; keys begin ``W`` tokens before the first of them.

        Writes to ``out`` ``[batch, q_len, num_heads, head_dim]``.
        """
        if self.own:
            sinks = self._sinks(first_query, query.shape[2])
            self.own(query, key, value, out, self._window, self.scores, sinks)
            return
        config, learned = self.plan.layout.config, self.scores.learned
        rotation = self.plan.rotation if config.n_sink else None
        can_turn = rotation is None or (rotation.rotary.rotary_dim > 0 and not rotation.rotary.offset)
        can_merge = can_turn and learned is None and query.shape[-1] == value.shape[-1]
        if self.kernel != "math" and triton_kernels is not None and triton_kernels.available(query) and can_merge:
            self._by_triton(query, key, value, out, first_query)
            return
        turned = None
        if rotation is not None:
            # Queries are turned from token t to position S + W, where sinks as first rotated see them.
            cos, sin = rotation.turns(config.cache_size - first_query, query.shape[2], query.device)
            turned = rotate(query, cos, sin, rotation.rotary)
        if self.kernel == "math":
            found = band_math(query, turned, key, value, self.plan, self.scores)
        else:
            found, lse = self._over_window(query, key, value)
            if turned is not None:
                found, lse = self._with_sinks(found, lse, turned)
            if learned is not None:
                found = join_learned(found, lse, learned)
        out.copy_(found.transpose(1, 2))

    def _by_triton(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, first_query: int) -> None:
        """The same, put together by one kernel that also scores the sinks."""
        q_len = query.shape[2]
        whole = q_len - q_len % self._window
        if self.kernel != "flash" and 0 < whole < q_len:  # two causal calls take n * W queries, or fewer than W
            keys, values = (x[:, :, : whole + self._window] for x in (key, value))
            self._by_triton(query[:, :, :whole], keys, values, out[:, :whole], first_query)
            query, key, value = (x[:, :, whole:] for x in (query, key, value))
            self._by_triton(query, key, value, out[:, whole:], first_query + whole)
            return
        sinks = self._sinks(first_query, q_len)
        if self.kernel == "flash" or not whole:
            newer, older = self._over_window(query, key, value), None
        else:
            newer, older = self._halves(query, key, value, triton_kernels.reversed_blocks)
        if sinks is None and older is None:
            out.copy_(newer[0].transpose(1, 2))
        else:
            triton_kernels.merge_parts(query, newer, older, sinks, self.scores.scale, out)

    def _sinks(self, first_query: int, q_len: int) -> triton_kernels.Sinks | None:
        """The sinks, for kernels that turn the queries themselves."""
        config, rotation = self.plan.layout.config, self.plan.rotation
        if not config.n_sink or rotation is None:
            return None
        keys, values = self.plan.sinks
        cos, sin = rotation.turns(config.cache_size - first_query, q_len, keys.device, paired=True)
        return triton_kernels.Sinks(keys, values, cos, sin, rotation.rotary.interleaved)

    def _with_sinks(self, out: Tensor, lse: Tensor, turned: Tensor) -> WithLse:
        """Add the sinks, a handful of keys, to the attention over the window and its log-sum-exp."""
        batch, num_heads, q_len, head_dim = turned.shape
        keys, values = self.plan.sinks
        grouped = (batch, keys.shape[1], -1, head_dim)  # [batch, num_kv_heads, groups * q_len, head_dim]
        dtype = lse.dtype
        scores = (turned.reshape(grouped).to(dtype) @ keys.transpose(2, 3).to(dtype)) * self.scores.scale
        scores = scores.view(batch, num_heads, q_len, -1)
        total = torch.logaddexp(lse, scores.logsumexp(-1))
        weights = (scores - total.unsqueeze(-1)).exp().view(batch, keys.shape[1], -1, keys.shape[2])
        from_sinks = (weights @ values.to(dtype)).view_as(out)
        return torch.addcmul(from_sinks, out.to(dtype), (lse - total).exp().unsqueeze(-1)), total

    def _over_window(self, query: Tensor, key: Tensor, value: Tensor) -> WithLse:
        """Attention over the window alone."""
        window, scale = self._window, self.scores.scale
        if self.kernel == "flash" and query.device.type == "cuda":
            return flash(query, key, value, scale, True, window_size_left=window, window_size_right=0)
        batch, q_len = query.shape[0], query.shape[2]
        if q_len > window:
            query, key, value = (F.pad(x, (0, 0, 0, -q_len % window)) for x in (query, key, value))
            newer, (older, older_lse) = self._halves(query, key, value, lambda x, n: _blocks(x, n).flip(2))
            found = merge(*newer, older.flip(2), older_lse.flip(2))
            out, lse = (x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)[:, :, :q_len] for x in found)
            return out, lse
        attend = WITH_LSE[self.kernel]
        out, lse = attend(query, key[:, :, window:], value[:, :, window:], scale, causal=True)
        # Of the W keys before, query i sees those from the i-th on: causal among the first q_len once reversed.
        older, older_lse = attend(*(x[:, :, :q_len].flip(2) for x in (query, key, value)), scale, causal=True)
        out, lse = merge(out, lse, older.flip(2), older_lse.flip(2))
        if q_len < window:
            between = slice(q_len, window)
            out, lse = merge(out, lse, *attend(query, key[:, :, between], value[:, :, between], scale, causal=False))
        return out, lse

    def _halves(
        self, query: Tensor, key: Tensor, value: Tensor, reverse: Callable[[Tensor, int], Tensor]
    ) -> tuple[WithLse, WithLse]:
        """A multiple of ``W`` queries by two causal calls, not merged: see :func:`.triton_kernels.merge_parts`.

        Args:
            reverse: what :func:`.triton_kernels.reversed_blocks` does.
        """
        window, scale, attend = self._window, self.scores.scale, WITH_LSE[self.kernel]
        own = (_blocks(x, window) for x in (query, key[:, :, window:], value[:, :, window:]))
        before = (reverse(x, window) for x in (query, key[:, :, :-window], value[:, :, :-window]))
        return attend(*own, scale, causal=True), attend(*before, scale, causal=True)


def _blocks(x: Tensor, window: int) -> Tensor:
    """``[batch, heads, n * W, head_dim]`` as ``[batch * n, heads, W, head_dim]``."""
    return x.unflatten(2, (-1, window)).transpose(1, 2).flatten(0, 1)
