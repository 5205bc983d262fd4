"""From texts to token ids: what stands in front of a text, its first tokens, and all of them as one stream."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor

from experiments.config import SetupError
from experiments.texts import Text
from experiments.token_windows import token_ids

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
