"""From texts to token ids: what stands in front of a text, its first tokens, and all of them as one stream.

A text of any length is tokenised a few windows of characters at a time, in memory that does not grow. A window's ids
are those of the whole text except near its ends. So windows overlap, and one takes over from the other in the middle
of a stretch in which both gave the same tokens at the same characters. Where they never agree (a run of a thousand
equal characters, say), the two are tokenised as one.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor

from experiments.config import SetupError
from experiments.texts import Text

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


# What stands in front of a text


@dataclass(frozen=True)
class Beginning:
    """What a stream begins with: `ids` in front of the text, and why.

    `bos_id` is the tokenizer's beginning-of-sequence token, whether it stands there or not (None: there is none).
    `is_doubtful`: the tokenizer has one that it does not put in front by itself, and nobody said what is wanted.
    """

    option: str
    ids: tuple[int, ...]
    reason: str
    token: str | None = None
    bos_id: int | None = None
    is_doubtful: bool = False

    @property
    def start(self) -> tuple[int, ...]:
        """What a text begins with that is not a given one, a generated or a fresh one: there is a token if any is."""
        return self.ids or (() if self.bos_id is None or self.option == "never" else (self.bos_id,))

    def record(self) -> dict:
        """What result files say about it, as JSON values."""
        return {"option": self.option, "token": self.token, "in_front": bool(self.ids), "reason": self.reason}

    @property
    def warning(self) -> str:
        """What a person should know before trusting a perplexity; "" if nothing is in doubt."""
        if not self.is_doubtful:
            return ""
        what = "it is put there" if self.ids else "texts begin without it"
        return (
            f"the tokenizer has a beginning-of-sequence token, {self.token!r}, and does not put it in front of texts: "
            f"{what} ({self.reason}); --bos always and --bos never decide it, and perplexities tell which is right"
        )


NO_TOKENIZER = Beginning("auto", (), "random tokens have no beginning")


def beginning_of(tokenizer, option: str = "auto", model_bos_id: int | None = None, stated: bool | None = None):
    """What a stream of this tokenizer's model begins with, as a `Beginning`.

    "always" and "never" are about the beginning-of-sequence token (BOS). "auto" asks what the model was trained on:
    what the tokenizer itself puts in front; else what its configuration says (`stated`: the `add_bos_token` of
    tokenizer_config.json); else a token that only begins texts, in the model's configuration too (`model_bos_id`),
    is taken to have begun them in training. One that also ends texts, or that opens the turns of a chat, is not.

    Raises SetupError for "always" where there is no such token.
    """
    own, bos_id, token = put_in_front(tokenizer), tokenizer.bos_token_id, tokenizer.bos_token

    def beginning(ids: Iterable[int], reason: str, doubtful: bool = False) -> Beginning:
        return Beginning(option, tuple(ids), reason, token, bos_id, doubtful)

    if option == "never":
        return beginning((), "--bos never")
    if option == "always":
        if bos_id is None:
            raise SetupError("--bos always: the tokenizer has no beginning-of-sequence token")
        return beginning(own if bos_id in own else [bos_id, *own], "--bos always")
    if own:
        return beginning(own, "the tokenizer puts it there")
    if bos_id is None:
        return beginning((), "the tokenizer has no beginning-of-sequence token")
    if stated is not None:
        return beginning([bos_id] if stated else (), f"tokenizer_config.json says add_bos_token: {stated}", True)
    if bos_id == tokenizer.eos_token_id:
        return beginning((), "it also ends texts", True)
    if token in str(getattr(tokenizer, "chat_template", None) or ""):
        return beginning((), "it opens the turns of a chat", True)
    if bos_id != model_bos_id:
        return beginning((), "the model's configuration does not name it", True)
    return beginning([bos_id], "it does nothing but begin texts, and the model's configuration names it", True)


def put_in_front(tokenizer) -> list[int]:
    """The ids that a tokenizer puts in front of a text by itself."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    places = [i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain]
    if not places:
        raise SetupError(f"{type(tokenizer).__name__} gives other ids for a text with special tokens than without")
    return whole[: places[0]]


# The ids of a text


def first_tokens(text: Text, tokenizer, front: Iterable[int], limit: int) -> Tensor:
    """The first `limit` tokens of a text whose documents are joined by blank lines: int64 [1, n], n <= limit.

    `front` stands before them. Raises SetupError for a text of fewer than two tokens, those in front not counted.
    """
    parts = (f"\n\n{document}" if number else document for number, document in enumerate(text.documents()))
    ids: list[int] = []
    for found, _ in token_ids(tokenizer, parts):
        ids += found
        if len(ids) >= max(limit, 2):
            break
    require_two_tokens(text, ids)
    return torch.tensor([[*front, *ids][:limit]], dtype=torch.int64)


def require_two_tokens(text: Text, ids: Iterable[int]) -> None:
    """Raise SetupError for a text of fewer."""
    if len(list(islice(ids, 2))) < 2:
        raise SetupError(f"data set {text.dataset}: the text has fewer than two tokens, there is nothing to predict")


def random_tokens(text: Text, vocab_size: int, limit: int, seed: int) -> Tensor:
    """Token ids in place of a text, for a model without a tokenizer: int64 [1, limit], a function of seed and text."""
    mixed = hashlib.sha256(f"{seed}:{text.sha256}".encode()).hexdigest()
    generator = torch.Generator().manual_seed(int(mixed[:15], 16))
    return torch.randint(vocab_size, (1, limit), generator=generator, dtype=torch.int64)


class DocumentStream:
    """A text as one stream of token ids: its documents joined as they come, with nothing between them.

    `front` stands at the very start, `between` (if any) before each document instead. `limit`: tokens of the stream,
    None for all. Raises SetupError for a text of fewer than two tokens, those in front not counted.
    """

    def __init__(self, text: Text, tokenizer, front: Iterable[int], limit: int | None, between: Iterable[int] = ()):
        self.text, self.tokenizer, self.limit = text, tokenizer, limit
        self.front, self.between = list(front), list(between)
        self._counts = (0, 0)  # tokens given out, and the characters they stand for, for the estimate of a length
        found = (ids for document in text.documents() for ids, _ in token_ids(tokenizer, [document]))
        require_two_tokens(text, chain.from_iterable(found))

    def chunks(self, start: int = 0) -> Iterator[Tensor]:
        """The stream from token `start` on, in chunks int64 [1, n] of whatever length comes."""
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
        for document in self.text.documents():
            front = self.between or ([] if tokens else self.front)
            for ids, end in token_ids(self.tokenizer, [document]):
                if ids:
                    ids, front = front + ids, []
                    tokens += len(ids)
                    self._counts = (tokens, characters + end)
                    yield ids
            characters += len(document)

    def expected_tokens(self) -> int | None:
        """The stream's length as far as can be told from the tokens a character had so far."""
        tokens, characters = self._counts
        if not characters:
            return self.limit
        expected = round(tokens / characters * self.text.num_characters)
        return expected if self.limit is None else min(expected, self.limit)
