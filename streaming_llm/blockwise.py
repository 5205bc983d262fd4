"""Exact block-parallel scoring: the perplexity of a stream at prefill speed.

A token's keys and values at a layer do not depend on what is evicted later. So a long text can go through the
model in blocks, every query masked to its own window and with the sinks at their distance for that query, and
gives the logits of the token-by-token loop.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .attachment import attached
from .config import StreamingConfig, require_int
from .engines import resolve_block_engine
from .engines.blocks import alike, block_forward, default_block_size, rows_of
from .families import family_of_model, transformers_model
from .kv_cache import StreamingKVCache
from .losses import token_nll
from .placement import input_device


def in_blocks(input_ids: Tensor | Iterable[Tensor], block_size: int) -> Iterator[Tensor]:
    """Chunks ``[batch, n]`` of any length, cut and joined into blocks of ``block_size`` (the last is shorter)."""
    if isinstance(input_ids, Tensor):
        yield from input_ids.split(block_size, dim=1) if input_ids.shape[1] else ()
        return
    held: list[Tensor] = []
    n_held = 0
    for chunk in input_ids:
        _require_ids(chunk)
        held.append(chunk)
        n_held += chunk.shape[1]
        if n_held >= block_size:
            joined = torch.cat(held, dim=1)
            whole = n_held - n_held % block_size
            yield from joined[:, :whole].split(block_size, dim=1)
            held, n_held = [joined[:, whole:]], n_held - whole
    if n_held:
        yield torch.cat(held, dim=1)


def _require_ids(ids: object) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"input_ids must be a tensor [batch, length], as tokenizers give, got {type(ids).__name__}")
    if ids.dim() != 2 or not ids.shape[0] or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"input_ids must be integer token ids [batch, length], got {ids.dtype} {list(ids.shape)}")


@contextmanager
def _beside(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """Copies made inside wait only for each other, not for the kernels that a CUDA ``device`` has been given."""
    if device not in _COPIES:
        _COPIES[device] = torch.cuda.Stream(device)
    with torch.cuda.stream(_COPIES[device]):
        yield _COPIES[device]


_COPIES: dict[torch.device, torch.cuda.Stream] = {}


def _to_device(ids: Tensor, device: torch.device) -> Tensor:
    """Ids as int64 on ``device``, without waiting for what runs there."""
    if ids.device == device or device.type != "cuda":
        return ids.to(device, torch.int64)
    main = torch.cuda.current_stream(device)
    with _beside(device) as stream:
        ids = ids.to(device, torch.int64)
    main.wait_stream(stream)
    ids.record_stream(main)
    return ids


class BlockScorer:
    """Losses of one stream, block after block.

    Args:
        model: a causal language model that is attached as long as blocks are fed.
        cache: a cache of this model.
        last_hidden: final hidden state ``[batch, 1, hidden]`` of the last token that ``cache`` has seen, if any.
        engine: see :func:`score_stream`.
    """

    def __init__(
        self, model: nn.Module, cache: StreamingKVCache, last_hidden: Tensor | None = None, engine: str = "auto"
    ) -> None:
        self.model, self.cache, self.last_hidden = model, cache, last_hidden
        self.forward = block_forward(model, resolve_block_engine(model, engine))
        self.device = input_device(model)

    @torch.no_grad()
    def score(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """Feed the next tokens ``[batch, n]``.

        Returns:
            Losses in nats ``[batch, n]``, or ``[batch, n - 1]`` of a stream's first block, whose first token nothing
            predicts (float32, or float64 for a float64 model), and final hidden states ``[batch, n, hidden]``.
        """
        block = _to_device(block, self.device)
        hidden = self.forward(block, self.cache)
        # Each state predicts the next token: a block's first is predicted by the state before it.
        if self.last_hidden is None:
            predicting, targets = hidden[:, :-1], block[:, 1:]
        else:
            predicting, targets = torch.cat((self.last_hidden, hidden[:, :-1]), dim=1), block
        self.last_hidden = hidden[:, -1:].clone()
        nll = token_nll(self.model, predicting, targets) if targets.shape[1] else hidden.new_empty(targets.shape)
        return nll, hidden


def score_stream(
    model: nn.Module,
    input_ids: Tensor | Iterable[Tensor],
    n_sink: int = 4,
    window_size: int = 1020,
    block_size: int | None = None,
    *,
    config: StreamingConfig | None = None,
    attention_mask: Tensor | None = None,
    engine: str = "auto",
    return_hidden: bool = False,
    on_block: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor | tuple[Tensor, Tensor] | None:
    """Negative log-likelihood of every token of a stream, exactly as the token-by-token loop gives it.

    Memory on the device does not grow with the stream. The kernel is chosen by the SDPA kernels in force
    (``torch.nn.attention.sdpa_kernel``) unless the engine has its own; the model is restored afterwards.

    Args:
        model: a Transformers causal language model of a supported family.
        input_ids: ``[batch, length]`` on any device, or an iterable of consecutive chunks ``[batch, n]``. The
            attention of the first tokens reaches back to the first id, which should be what the model was trained to
            see there (``tokenizer(text)`` puts it in front, if any).
        n_sink, window_size: see :class:`StreamingConfig`, or
        config: both in one.
        block_size: tokens processed at a time; chosen for model and device when ``None``.
        attention_mask: ``[batch, length]``, 0 at padding, left or right, of ids in one tensor: each row is a stream
            of its own.
        engine: ``eager`` (and ``graph``): the plain model call. ``fused``: this library's kernels, on CUDA, but for
            attention. ``fused-triton``: with an attention kernel of its own, where it is for the model. ``auto``:
            the fastest that runs, with the kernel that adapters name. :func:`streaming_llm.resolve_block_engine` says
            which runs.
        return_hidden: also return the final hidden states ``[batch, length, hidden]``.
        on_block: called with ``(start, nll, hidden_states)`` for each block instead of collecting anything: ``nll``
            ``[batch, n]`` of tokens ``start .. start + n - 1``, on the model's device.

    Returns:
        ``[batch, length - 1]`` in nats, float32, on the device of ``input_ids``; entry ``i`` is the loss of token
        ``i + 1``, and 0 where that is padding or the first of its row. With ``return_hidden`` a pair; with
        ``on_block`` ``None``.

    Raises:
        ValueError: an argument is out of range, the model cannot stream, or the stream is shorter than two tokens.
        TypeError: ``input_ids`` are no tensors.
    """
    config = StreamingConfig.given(n_sink, window_size, config)
    if isinstance(input_ids, Tensor):
        _require_ids(input_ids)
    if attention_mask is not None:
        if return_hidden or on_block is not None or not isinstance(input_ids, Tensor):
            raise ValueError("attention_mask needs ids in one tensor, and neither return_hidden nor on_block")
        return _score_rows(model, input_ids, attention_mask, config, block_size, engine)
    if block_size is None:
        block_size = default_block_size(config.window_size, model)
    require_int("block_size", block_size, 1)
    if not family_of_model(transformers_model(model)).blocks_continue:
        block_size = sys.maxsize  # recurrent layers take one block, at the beginning
    if return_hidden and on_block is not None:
        raise ValueError("return_hidden and on_block exclude each other: on_block is given the hidden states")

    collected = _Collector(return_hidden)
    sink = on_block or collected
    n_seen = 0
    with attached(model):
        scorer = BlockScorer(model, StreamingKVCache.from_model(model, config=config), engine=engine)
        for block in in_blocks(input_ids, block_size):
            nll, hidden = scorer.score(block)
            collected.home = block.device
            sink(max(n_seen, 1), nll, hidden)
            n_seen += block.shape[1]
    if n_seen < 2:
        raise ValueError(f"a stream of at least two tokens is needed to score one, got {n_seen}")
    return None if on_block is not None else collected.result()


def _score_rows(
    model: nn.Module, ids: Tensor, mask: Tensor, config: StreamingConfig, block_size: int | None, engine: str
) -> Tensor:
    """Losses of padded rows, those that are as long together."""
    rows = rows_of(ids, mask)
    nll = torch.zeros(len(ids), ids.shape[1] - 1, dtype=torch.float32, device=ids.device)
    with attached(model):
        for group in alike(map(len, rows)):
            packed = torch.stack([rows[index] for index in group])
            if packed.shape[1] < 2:
                raise ValueError(f"at least two tokens are needed to score one, got 1 in row {group[0]}")
            losses: Any = score_stream(model, packed, block_size=block_size, config=config, engine=engine)
            for index, of_row in zip(group, losses, strict=True):
                nll[index, mask[index].nonzero()[1:, 0].to(nll.device) - 1] = of_row
    return nll


class _Collector:
    """Gathers blocks on the device of the ids, one block late, so that a copy waits for nothing but its own block."""

    def __init__(self, keep_hidden: bool) -> None:
        self.keep_hidden = keep_hidden
        self.home = torch.device("cpu")
        self._pending: tuple[tuple[Tensor, ...], torch.cuda.Event | None] | None = None
        self._done: list[tuple[Tensor, ...]] = []

    def _flush(self) -> None:
        if self._pending is None:
            return
        (block, ready), self._pending = self._pending, None
        if ready is None:
            self._done.append(tuple(x.to(self.home) for x in block))
            return
        with _beside(block[0].device) as stream:
            stream.wait_event(ready)
            self._done.append(tuple(x.to(self.home) for x in block))

    def __call__(self, start: int, nll: Tensor, hidden: Tensor) -> None:
        self._flush()
        on_cuda = nll.device.type == "cuda" and self.home.type == "cpu"
        block = (nll.float(), hidden) if self.keep_hidden else (nll.float(),)
        self._pending = block, torch.cuda.current_stream(nll.device).record_event() if on_cuda else None
        if not on_cuda:
            self._flush()

    def result(self) -> Tensor | tuple[Tensor, Tensor]:
        self._flush()
        joined = tuple(torch.cat(parts, dim=1) for parts in zip(*self._done, strict=True))
        return (joined[0], joined[1]) if self.keep_hidden else joined[0]
