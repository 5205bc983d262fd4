"""Text from tokens, as they come: no half characters, nothing of the marker that ends an answer."""

from __future__ import annotations

UNDECODED = "\ufffd"
LONGEST_RUN = 64
"""Tokens after which bytes that make no character are shown as what they are."""


class PartialText:
    """Decodes a stream of tokens: what is whole is given out at once, the rest is held until it is.

    A character may take several tokens (byte-level ones, and byte fallback). A decoder may treat the first token of
    what it is given otherwise than the others (a space in front is dropped), so a few tokens before are decoded along.

    Args:
        tokenizer: a Transformers tokenizer; special tokens are not shown.
        state: of :meth:`state`, to go on with.
    """

    def __init__(self, tokenizer, state: tuple[list[int], list[int]] | None = None) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._context, self._held = ([], []) if state is None else map(list, state)

    def push(self, token: int) -> str:
        """The text that has become whole with ``token``; may be empty."""
        if token in self._special:
            return self._give_out() if self._held else ""
        self._held.append(token)
        if self._decode(self._context + self._held).endswith(UNDECODED) and len(self._held) < LONGEST_RUN:
            return ""
        return self._give_out()

    def _give_out(self) -> str:
        text = self._decode(self._context + self._held)[len(self._decode(self._context)) :]
        self._context, self._held = self._held, []
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def state(self) -> tuple[list[int], list[int]]:
        """The ids that the next text depends on."""
        return self._context, self._held


class UntilMarker:
    """Passes text on up to a marker, of which not even a beginning is given out.

    Args:
        marker: what ends an answer; an empty one never comes.
    """

    def __init__(self, marker: str) -> None:
        self._marker, self._held, self.found = marker, "", False

    def push(self, text: str) -> str:
        """The text that can be no part of the marker."""
        if not self._marker:
            return text
        self._held += text
        before, marker, _ = self._held.partition(self._marker)
        if marker:
            self.found, self._held = True, ""
            return before
        longest = min(len(self._marker) - 1, len(self._held))
        keep = next((n for n in range(longest, 0, -1) if self._marker.startswith(self._held[-n:])), 0)
        given, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return given

    def rest(self) -> str:
        """What was held, now that no more comes."""
        rest, self._held = self._held, ""
        return rest
