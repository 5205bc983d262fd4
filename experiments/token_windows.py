"""Token ids of a text of any length, a few windows of characters at a time, in memory that does not grow.

A window's ids are those of the whole text except near its ends. So windows overlap, and one takes over from the
other in the middle of a stretch in which both gave the same tokens at the same characters. Where they never agree (a
run of a thousand equal characters, say), the two are tokenised as one.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

WINDOW_CHARACTERS = 1 << 16
OVERLAP_CHARACTERS = 1 << 11
_MAX_WINDOWS_AT_ONCE = 16  # given to the tokenizer together: it works on them in parallel
_LEAST_AGREEMENT = 16  # tokens in which two windows have to agree, in half of their overlap


@dataclass(frozen=True)
class _Window:
    """A part of a text, and its tokens.

    `start`: number of its first character. `ids`, `spans`: its tokens, and the characters (from, to) of each,
    counted from the window's start. `first`: the first of the tokens that has not been given out by the window
    before.
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
        """Tokens that begin at characters `low .. high - 1`: the index of the first, and all as (id, from, to)."""
        begin, end = (bisect_left(self.spans, at - self.start, key=lambda span: span[0]) for at in (low, high))
        spans = ((a + self.start, b + self.start) for a, b in self.spans[begin:end])
        return begin, [(token, *span) for token, span in zip(self.ids[begin:end], spans, strict=True)]


def token_ids(
    tokenizer, parts: Iterable[str], window: int = WINDOW_CHARACTERS, overlap: int = OVERLAP_CHARACTERS
) -> Iterator[tuple[list[int], int]]:
    """The ids of the text that `parts` make together, as the tokenizer gives them for it as a whole.

    Yields them part by part, with up to which character (about) each goes, in memory that does not grow with the
    text; special tokens are not added. A tokenizer that does not say which characters a token stands for (a "slow"
    one) is given the text whole.
    """
    if not getattr(tokenizer, "is_fast", False):
        text = "".join(parts)
        yield tokenizer(text, add_special_tokens=False, verbose=False).input_ids, len(text)
        return
    held: _Window | None = None
    for new in _encoded(tokenizer, _windows(parts, window, overlap)):
        if held is None:
            held = new
        elif (cut := _agreement(held, new)) is None:
            held = _as_one(tokenizer, held, new)
        else:
            yield held.ids[held.first : cut[0]], held.end
            held = _Window(new.start, new.text, new.ids, new.spans, first=cut[1])
    if held is not None:
        yield held.ids[held.first :], held.end


def _windows(parts: Iterable[str], size: int, overlap: int) -> Iterator[tuple[int, str]]:
    start, text = 0, ""
    for part in parts:
        for at in range(0, len(part), size):
            text += part[at : at + size]
            while len(text) > size:
                yield start, text[:size]
                start, text = start + size - overlap, text[size - overlap :]
    if text:
        yield start, text


def _encoded(tokenizer, windows: Iterator[tuple[int, str]]) -> Iterator[_Window]:
    at_once = 1  # the first tokens of a long text should not have to wait for many
    while batch := list(islice(windows, at_once)):
        starts, texts = zip(*batch, strict=True)
        for window in zip(starts, texts, *_encode(tokenizer, list(texts)), strict=True):
            yield _Window(*window)
        at_once = min(2 * at_once, _MAX_WINDOWS_AT_ONCE)


def _encode(tokenizer, texts: list[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    encoding = tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoding["input_ids"], encoding["offset_mapping"]


def _agreement(held: _Window, new: _Window) -> tuple[int, int] | None:
    """Where `new` can take over: the index of the same token in both, amid tokens that are the same in both."""
    margin = (held.end - new.start) // 4
    low, high = new.start + margin, held.end - margin
    (at_held, ours), (at_new, theirs) = held.tokens(low, high), new.tokens(low, high)
    if len(ours) < _LEAST_AGREEMENT or ours != theirs:
        return None
    return at_held + len(ours) // 2, at_new + len(ours) // 2


def _as_one(tokenizer, held: _Window, new: _Window) -> _Window:
    text = held.text + new.text[held.end - new.start :]
    [ids], [spans] = _encode(tokenizer, [text])
    if ids[: held.first] != held.ids[: held.first]:
        raise RuntimeError(f"the tokens at character {held.start} depend on the text {len(text)} characters on")
    return _Window(held.start, text, ids, spans, held.first)
