"""The turns of a conversation as token ids, by a chat template, where it ends an answer; and text from tokens, as they
come.

A stream is fed only what is new. So each turn is rendered by itself, with what closes the answer before it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from experiments.config import SetupError, first_line

UNDECODED = "\ufffd"
LONGEST_RUN = 64
"""Tokens after which bytes that make no character are shown as what they are."""


class ShownText(BaseStreamer):
    """Shows tokens as text: a character once it is whole, and nothing of the marker that ends an answer.

    A character may take several tokens. A decoder may treat the first token of what it is given otherwise than the
    others (Llama's drops a space in front), so a few tokens before are decoded along. Transformers' own streamer
    begins anew with each line, and decodes the whole line at every token.

    Args:
        tokenizer: a Transformers tokenizer.
        show: takes the text.
        instead: what is shown instead of tokens that are no text.
        marker: text that ends an answer, of which not even a beginning is shown. An empty one never comes.
        strip: leave out white space before the first text.
        state: of :meth:`state`, to go on with.

    Attributes:
        ended: whether the marker has come.
    """

    def __init__(
        self,
        tokenizer,
        show: Callable[[str], None],
        instead: Mapping[int, str],
        marker: str = "",
        strip: bool = False,
        state: Sequence[Sequence[int]] = ((), ()),
    ) -> None:
        self._tokenizer, self._show, self._instead, self._marker = tokenizer, show, instead, marker
        self._context, self._partial = map(list, state)
        self._strip, self._held, self.ended = strip, "", False

    def put(self, value: Tensor) -> None:
        """Take new tokens of one row."""
        for token in value.flatten().tolist():
            self._pass_on(self._text(token))

    def end(self) -> None:
        """The end of one call of `generate`, which need not be that of the text."""

    def rest(self) -> None:
        """Show what was held, now that no more comes."""
        self._show(self._held)
        self._held = ""

    def state(self) -> tuple[list[int], list[int]]:
        """The ids that the next text depends on."""
        return self._context, self._partial

    def _text(self, token: int) -> str:
        """The text that has become whole."""
        if token not in self._instead:
            self._partial.append(token)
            if self._decode(self._context + self._partial).endswith(UNDECODED) and len(self._partial) < LONGEST_RUN:
                return ""
        text = ""
        if self._partial:
            text = self._decode(self._context + self._partial)[len(self._decode(self._context)) :]
            self._context, self._partial = self._partial, []
        return text + self._instead.get(token, "")

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _pass_on(self, text: str) -> None:
        """Show what can be no part of the marker."""
        text, begun = self._held + text, 0
        if self._marker:
            text, found, _ = text.partition(self._marker)
            self.ended = self.ended or bool(found)
            if not found:
                begun = max((n for n in range(len(self._marker)) if text.endswith(self._marker[:n])), default=0)
        text, self._held = text[: len(text) - begun], text[len(text) - begun :]
        text = text.lstrip() if self._strip else text
        self._strip = self._strip and not text
        self._show(text)


PLAIN = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n"
    "{% else %}{{ m.role.title() }}: {{ m.content }}\n{% endif %}{% endfor %}Assistant:"
)
"""The template of models that have none."""

SYSTEM, EARLIER, ANSWER, MESSAGE = "system7f3a", "earlier7f3a", "answer7f3a", "message7f3a"
"""What stands in a rendered template for what people and the model write."""

Place = Literal["beginning", "answer", "end", "marker"]
"""Where a stream is: at its beginning, in an answer, behind the template's end of one, or behind the marker's."""


def special_ids(tokenizer) -> set[int]:
    """Tokens that are no text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(token for token, about in added.items() if about.special)}


class Turns:
    """How messages become tokens. What people write is text: special tokens typed in it are none.

    Args:
        tokenizer: one that tells which characters a token stands for (a "fast" one).
        start: ids in front of a conversation without a template.
        plain: leave the tokenizer's template aside.
        system: what the model is told before the first message.

    Attributes:
        end_id: the token with which the template ends an answer, or ``None``.
        marker: where there is no such token, the text that begins the next turn.

    Raises:
        SetupError: the template cannot be rendered, or does not show what it is given.
    """

    def __init__(self, tokenizer, start: list[int], plain: bool = False, system: str | None = None) -> None:
        self._tokenizer, self._system = tokenizer, (system or "").strip()
        has_own = bool(getattr(tokenizer, "chat_template", None)) and not plain
        self._template, self._start = (None, []) if has_own else (PLAIN, start)
        if not getattr(tokenizer, "is_fast", False):
            kind = type(tokenizer).__name__
            raise SetupError(f"{kind} does not tell which characters a token stands for: use a fast tokenizer")
        first = [("system", SYSTEM)] * bool(self._system) + [("user", MESSAGE)]
        try:
            self._opening = self._render(*first)
            conversation = self._render(("user", EARLIER), ("assistant", ANSWER), ("user", MESSAGE))
        except Exception as error:  # templates raise errors of their own, and jinja2 may not be installed
            raise self._unfit(f"cannot be used ({first_line(error)})") from None
        self._next = conversation.partition(ANSWER)[2]
        if MESSAGE not in self._next:
            raise self._unfit("leaves out earlier answers")
        if not all(written in self._opening for _, written in first):
            raise self._unfit("leaves out what it is given")
        self._reserved = special_ids(tokenizer)
        own = {*self._encode(self._opening, ""), *self._encode(self._next, "")}
        own &= set(getattr(tokenizer, "added_tokens_decoder", {}))
        self._reserved |= {token for token in own if tokenizer.decode([token]).strip()}  # not spaces in a row
        self.end_id, self.marker = self._end_of_answers()

    def _unfit(self, why: str) -> SetupError:
        with_system = " with --system" if self._system else ""
        return SetupError(f"the tokenizer's chat template {why}{with_system}; --plain goes without it")

    def _render(self, *turns: tuple[str, str]) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        render = self._tokenizer.apply_chat_template
        return render(messages, chat_template=self._template, tokenize=False, add_generation_prompt=True)

    def _end_of_answers(self) -> tuple[int | None, str]:
        """The special token behind an answer, or the text that stands between it and the next message."""
        between = self._next.partition(MESSAGE)[0]
        for token in self._encode(between, ""):
            if self._tokenizer.decode([token]).strip():
                if token in self._reserved:
                    return token, ""
                break
        return None, between.rstrip()

    def ids(self, message: str, place: Place) -> list[int]:
        """Tokens from where the stream is up to where the answer to ``message`` begins."""
        if place == "beginning":
            return self._start + self._encode(self._opening, message)
        ids = self._encode(self._next.removeprefix(self.marker if place == "marker" else ""), message)
        return ids[ids.index(self.end_id) + 1 :] if place == "end" else ids

    def _encode(self, template: str, message: str) -> list[int]:
        """A rendered template with what people wrote, in which nothing is a special token."""
        text, written = "", []
        for part in re.split(f"({SYSTEM}|{MESSAGE})", template):
            if part in (SYSTEM, MESSAGE):
                part = self._system if part == SYSTEM else message
                written.append((len(text), len(text) + len(part)))
            text += part
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids: list[int] = []
        for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            typed = token in self._reserved and any(start < high and end > low for low, high in written)
            ids += self._as_text(text[start:end]) if typed else [token]
        return ids

    def _as_text(self, text: str) -> list[int]:
        """The ids of a special token's name as those of any other text."""
        ids = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
        if self._reserved.isdisjoint(ids):
            return ids
        parts = [self._tokenizer(character, add_special_tokens=False).input_ids for character in text]
        return [token for part in parts for token in part if token not in self._reserved]
