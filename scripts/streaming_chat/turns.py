"""The turns of a conversation as tokens: by the model's own template, or plainly.

A stream is fed only what is new. So each turn is rendered by itself, with what closes the answer before it.
"""

from __future__ import annotations

from typing import Literal, Protocol

from experiments.config import SetupError

After = Literal["nothing", "answer", "marker"]
"""Where a turn begins: a fresh stream, an answer that is still open, or an answer that ended with the marker."""

EARLIER, ANSWER = "earlier-question", "earlier-answer-7f3a"


class Turns(Protocol):
    """How a message becomes tokens. ``marker``: text with which the model ends its own answer, or empty."""

    marker: str

    def ids(self, message: str, after: After) -> list[int]:
        """Tokens from where the stream is up to where the answer to ``message`` begins."""


class PlainTurns:
    """For models without a template: `User: ...` and `Assistant: ...`, until the model begins the user's next turn."""

    marker = "\nUser:"

    def __init__(self, tokenizer, start: list[int]) -> None:
        self._tokenizer, self._start = tokenizer, start

    def ids(self, message: str, after: After) -> list[int]:
        opening = {"nothing": "User:", "answer": self.marker, "marker": ""}[after]
        start = self._start if after == "nothing" else []
        return start + encode(self._tokenizer, f"{opening} {message}\nAssistant:")


class TemplateTurns:
    """The tokenizer's chat template.

    Raises:
        SetupError: the template cannot be rendered, or does not show earlier answers as they were.
    """

    marker = ""

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer
        try:
            self._text("a", "nothing")
            found = ANSWER in self._conversation("a")
        except Exception as error:  # templates raise errors of their own, and jinja2 may not be installed
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise SetupError(
                f"the tokenizer's chat template cannot be used ({reason}); --plain goes without"
            ) from None
        if not found:
            raise SetupError("the tokenizer's chat template leaves out earlier answers; --plain goes without it")

    def ids(self, message: str, after: After) -> list[int]:
        return encode(self._tokenizer, self._text(message, after))

    def _text(self, message: str, after: After) -> str:
        if after == "nothing":
            return self._render([{"role": "user", "content": message}])
        return self._conversation(message).partition(ANSWER)[2]

    def _conversation(self, message: str) -> str:
        earlier = [{"role": "user", "content": EARLIER}, {"role": "assistant", "content": ANSWER}]
        return self._render([*earlier, {"role": "user", "content": message}])

    def _render(self, messages: list[dict[str, str]]) -> str:
        return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode(tokenizer, text: str) -> list[int]:
    """The ids of a text, with no special tokens but those written in it."""
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def find_turns(tokenizer, start: list[int], plain: bool) -> Turns:
    """The tokenizer's template where it has one, else plain turns."""
    if plain or not getattr(tokenizer, "chat_template", None):
        return PlainTurns(tokenizer, start)
    return TemplateTurns(tokenizer)
