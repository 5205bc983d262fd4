"""Text from tokens, as they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

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
