"""Token ids of a text of any length, a few windows of characters at a time.

A window's ids are those of the whole document except near its ends. So windows overlap, and one takes over from
the other in the middle of a stretch in which both gave the same tokens at the same characters. Where they never
agree (a run of a thousand equal characters, say), the two are tokenised as one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from experiments.config import SetupError
from experiments.texts import DATASETS, RANDOM_TOKENS, random_tokens

from .documents import Corpus, documents_of

WINDOW_CHARACTERS = 1 << 16
OVERLAP_CHARACTERS = 1 << 11
MAX_WINDOWS_AT_ONCE = 16
"""Windows given to the tokenizer together: it works on them in parallel."""

LEAST_AGREEMENT = 16
"""Tokens in which two windows have to agree, in half of their overlap."""


@dataclass(frozen=True)
class Window:
    """A part of a document, and its tokens.

    Attributes:
        start: number of its first character in the document.
        ids, spans: its tokens, and the characters (from, to) of each, counted from the window's start.
        first: the first of the tokens that has not been given out by the window before.
    """

    start: int
    text: str
    ids: list[int]
    spans: list[tuple[int, int]]
    first: int = 0

    @property
    def end(self) -> int:
        return self.start + len(self.text)

    def tokens(self, low: int, high: int) -> tuple[int, list[tuple[int, int, int]]]:
        """Tokens that begin at the document's characters `low .. high - 1`: the index of the first, and all as
        (id, from, to)."""
        begin, end = (bisect_left(self.spans, at - self.start, key=lambda span: span[0]) for at in (low, high))
        spans = ((a + self.start, b + self.start) for a, b in self.spans[begin:end])
        return begin, [(token, *span) for token, span in zip(self.ids[begin:end], spans, strict=True)]


class DocumentTokenizer:
    """Token ids of documents, as the tokenizer gives them for each as a whole, in memory that does not grow.

    Special tokens are not added here. `own_start` is what the tokenizer puts in front of a text by itself (what it
    puts behind one, if anything, is left out: a stream has no end); `start` is the same, or the beginning-of-sequence
    token of a tokenizer that puts nothing in front; `None` where there is none.

    Args:
        tokenizer: a Transformers tokenizer that knows which characters a token stands for (a "fast" one).
    """

    def __init__(
        self, tokenizer, window_characters: int = WINDOW_CHARACTERS, overlap_characters: int = OVERLAP_CHARACTERS
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise SetupError(
                f"{type(tokenizer).__name__} does not tell which characters a token stands for, which is needed to "
                "tokenise a long text in parts: use a fast tokenizer (a folder with a tokenizer.json)"
            )
        self.tokenizer = tokenizer
        self.window_characters, self.overlap_characters = window_characters, overlap_characters
        self.own_start = put_in_front(tokenizer)
        bos = tokenizer.bos_token_id
        self.start = self.own_start or (None if bos is None else [bos])

    def ids(self, pieces: Iterable[str]) -> Iterator[tuple[list[int], int]]:
        """The ids of one document, part by part, and up to which of its characters (about) each part goes."""
        held: Window | None = None
        for window in self._encoded(self._windows(pieces)):
            if held is None:
                held = window
                continue
            cut = _agreement(held, window)
            if cut is None:
                held = self._as_one(held, window)
                continue
            yield held.ids[held.first : cut[0]], held.end
            held = Window(window.start, window.text, window.ids, window.spans, first=cut[1])
        if held is not None:
            yield held.ids[held.first :], held.end

    def _windows(self, pieces: Iterable[str]) -> Iterator[tuple[int, str]]:
        size, step = self.window_characters, self.window_characters - self.overlap_characters
        start, text = 0, ""
        for piece in pieces:
            for at in range(0, len(piece), size):
                text += piece[at : at + size]
                while len(text) > size:
                    yield start, text[:size]
                    start, text = start + step, text[step:]
        if text:
            yield start, text

    def _encoded(self, windows: Iterator[tuple[int, str]]) -> Iterator[Window]:
        at_once = 1  # the first tokens of a long text should not have to wait for many
        while batch := list(islice(windows, at_once)):
            starts, texts = zip(*batch, strict=True)
            for start, text, ids, spans in zip(starts, texts, *self._encode(list(texts)), strict=True):
                yield Window(start, text, ids, spans)
            at_once = min(2 * at_once, MAX_WINDOWS_AT_ONCE)

    def _encode(self, texts: list[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        encoding = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return encoding["input_ids"], encoding["offset_mapping"]

    def _as_one(self, held: Window, window: Window) -> Window:
        text = held.text + window.text[held.end - window.start :]
        [ids], [spans] = self._encode([text])
        if ids[: held.first] != held.ids[: held.first]:
            raise RuntimeError(f"the tokens at character {held.start} depend on the text {len(text)} characters on")
        return Window(held.start, text, ids, spans, held.first)


def put_in_front(tokenizer) -> list[int]:
    """The ids that a tokenizer puts in front of a text by itself."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    places = [i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain]
    if not places:
        raise SetupError(f"{type(tokenizer).__name__} gives other ids for a text with special tokens than without")
    return whole[: places[0]]


def _agreement(held: Window, window: Window) -> tuple[int, int] | None:
    """Where `window` can take over: the index of the same token in both, amid tokens that are the same in both."""
    margin = (held.end - window.start) // 4
    low, high = window.start + margin, held.end - margin
    (at_held, ours), (at_window, theirs) = held.tokens(low, high), window.tokens(low, high)
    if len(ours) < LEAST_AGREEMENT or ours != theirs:
        return None
    return at_held + len(ours) // 2, at_window + len(ours) // 2


class TokenStream:
    """A corpus as one stream of token ids: its documents joined as they come, with nothing between them.

    The tokenizer's own first token stands at the very start, and, with `bos_per_document`, before each document.

    Args:
        limit: tokens of the stream, `None` for all.
    """

    def __init__(
        self, corpus: Corpus, tokenizer: DocumentTokenizer, limit: int | None, bos_per_document: bool = False
    ) -> None:
        self.corpus, self.tokenizer = corpus, tokenizer
        self.limit, self.bos_per_document = limit, bos_per_document
        self._counts = (0, 0)  # tokens given out, and the characters they stand for, for the estimate of a length
        if bos_per_document and tokenizer.start is None:
            raise SetupError("--bos-per-document: the tokenizer has no beginning-of-sequence token")
        self._require_two_tokens()

    def _require_two_tokens(self) -> None:
        n_found = 0
        for document in documents_of(self.corpus.pieces()):
            for ids, _ in self.tokenizer.ids(document):
                n_found += len(ids)
                if n_found >= 2:
                    return
        raise SetupError(
            f"data set {self.corpus.name}: the text has fewer than two tokens, there is nothing to predict"
        )

    def chunks(self, start: int = 0) -> Iterator[Tensor]:
        """The stream from token `start` on, in chunks int64 ``[1, n]`` of whatever length comes."""
        n_before = 0
        for ids in self._ids():
            if self.limit is not None:
                ids = ids[: self.limit - n_before]
            wanted = ids[max(0, start - n_before) :]
            n_before += len(ids)
            if wanted:
                yield torch.tensor([wanted], dtype=torch.int64)
            if n_before == self.limit:
                return

    def _ids(self) -> Iterator[list[int]]:
        tokens = characters = 0
        for document in documents_of(self.corpus.pieces()):
            front = self._front(is_first=not tokens)
            end = 0
            for ids, end in self.tokenizer.ids(document):
                if ids:
                    ids, front = front + ids, []
                    tokens += len(ids)
                    self._counts = (tokens, characters + end)
                    yield ids
            characters += end

    def _front(self, is_first: bool) -> list[int]:
        if self.bos_per_document:
            return self.tokenizer.start
        return self.tokenizer.own_start if is_first else []

    def expected_tokens(self) -> int | None:
        """The stream's length as far as can be told from the tokens a character had so far."""
        tokens, characters = self._counts
        if not characters:
            return self.limit
        expected = round(tokens / characters * self.corpus.survey.characters)
        return expected if self.limit is None else min(expected, self.limit)


class RandomStream:
    """Random token ids in place of a text, for a model without a tokenizer; see :class:`TokenStream`."""

    def __init__(self, vocab_size: int, limit: int, seed: int) -> None:
        self.limit = limit
        self._ids = random_tokens(DATASETS[RANDOM_TOKENS](), vocab_size, limit, seed)

    def chunks(self, start: int = 0) -> Iterator[Tensor]:
        yield self._ids[:, start:]

    def expected_tokens(self) -> int:
        return self.limit


def read_ahead(chunks: Iterator[Tensor], depth: int = 2 * MAX_WINDOWS_AT_ONCE) -> Iterator[Tensor]:
    """The same chunks, up to `depth` of them tokenised by a thread while the model works on those before.

    Close it, or read it to its end, to be rid of the thread.
    """
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read_ahead")
    try:
        pending = deque(pool.submit(next, chunks, None) for _ in range(depth))
        while (chunk := pending.popleft().result()) is not None:
            pending.append(pool.submit(next, chunks, None))
            yield chunk
    finally:
        pool.shutdown(cancel_futures=True)
