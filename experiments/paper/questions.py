"""Streaming question answering (Table 5): multiple-choice questions, all in one stream, as in a long conversation.

Questions are in ARC's format: records with a question, choices and `answerKey`, as in ARC's own files (`question`
holds `stem` and `choices`) or as on the hub (`choices` holds `text` and `label`). The model is to name the label.
"""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.config import SetupError
from experiments.hub import hub_rows
from experiments.kept import Found
from experiments.paper.asking import Asked, answered, binned, method_sizes
from experiments.paper.setting import Experiment, Piece, Setting
from experiments.storage import hash_of

MADE = "made"
METHODS = ("one-shot", "dense", "window", "streaming")
_ASK = "Answer each question with the letter of the right choice alone."
_MARK = "@@ANSWER@@"
_KINDS = {
    "an animal": "horse rabbit tiger whale sparrow lizard donkey goat wolf beetle",
    "a fruit": "apple pear cherry grape plum lemon banana peach orange melon",
    "a colour": "red green blue yellow purple brown white black pink grey",
    "a tool": "hammer saw wrench drill chisel pliers axe shovel rake screwdriver",
    "a piece of furniture": "table chair sofa wardrobe desk bed bookcase stool cupboard bench",
    "a musical instrument": "violin piano flute trumpet drum guitar harp cello clarinet organ",
    "a part of the body": "elbow knee shoulder ankle wrist nose ear chin thumb heel",
    "a means of transport": "train bicycle lorry ferry tram bus aeroplane sledge canoe tractor",
}


@dataclass(frozen=True)
class Question:
    """A question with its choices, and the label of the right one."""

    stem: str
    choices: tuple[tuple[str, str], ...]  # label, text
    answer: str

    @property
    def text(self) -> str:
        return "\n".join([self.stem, *(f"{label}. {text}" for label, text in self.choices)])


def read_questions(name: str) -> list[Question]:
    """The questions of a file (.jsonl, .json), of a hub data set, or "made"; raises SetupError for what is none."""
    if name == MADE:
        return _of(make_records(1000, seed=0), name)
    path = Path(name)
    if path.exists() or path.suffix in (".jsonl", ".json"):
        try:
            text = path.read_text(encoding="utf-8")
            parts = [text] if path.suffix == ".json" else filter(str.strip, text.splitlines())
            records = [json.loads(part) for part in parts]
        except (OSError, ValueError) as error:
            raise SetupError(f"questions {path}: cannot be read ({error})") from None
        return _of(records[0] if path.suffix == ".json" else records, name)
    repo, _, rest = name.partition(":")
    config, _, split = rest.partition("@")
    return _of(hub_rows(name, repo, config or None, split or "test")[0], name)


def _of(records: Iterable[dict], name: str) -> list[Question]:
    questions = []
    for number, record in enumerate(records, start=1):
        try:
            stem, choices = record["question"], record.get("choices")
            if isinstance(stem, dict):
                stem, choices = stem["stem"], stem["choices"]
            if isinstance(choices, dict):
                pairs = tuple(zip(choices["label"], choices["text"], strict=True))
            else:
                pairs = tuple((choice["label"], choice["text"]) for choice in choices)
            question = Question(str(stem), pairs, record["answerKey"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise SetupError(
                f"questions {name}: record {number} is not in ARC's format ({error!r}; it has: {keys}): "
                "question, choices (text and label) and answerKey are needed"
            ) from None
        if question.answer not in dict(pairs):
            raise SetupError(f"questions {name}: record {number}: no choice has the label {question.answer!r}")
        questions.append(question)
    if not questions:
        raise SetupError(f"questions {name}: there are none")
    return questions


def make_records(number: int, seed: int) -> list[dict]:
    """So many easy records in the format that ARC has on the hub, from a seeded generator."""
    numbers, records = random.Random(seed), []
    words = {kind: names.split() for kind, names in _KINDS.items()}
    for n in range(number):
        if n % 2:
            kind, *others = numbers.sample(list(words), 4)
            right, wrong = numbers.choice(words[kind]), [numbers.choice(words[other]) for other in others]
            stem = f"Which of these is {kind}?"
        else:
            a, b = numbers.randint(2, 40), numbers.randint(2, 40)
            right, wrong = str(a + b), [str(a + b + off) for off in numbers.sample((-11, -10, -3, -1, 1, 2, 10), 3)]
            stem = f"What is {a} plus {b}?"
        texts = numbers.sample([right, *wrong], 4)
        choices = {"text": texts, "label": list("ABCD")}
        records.append({"question": stem, "choices": choices, "answerKey": "ABCD"[texts.index(right)]})
    return records


def conversation(tokenizer, front: list[int], questions: list[Question]) -> Asked:
    """All questions with their answers as one conversation, by the model's chat template if it has one."""
    if tokenizer.chat_template:
        messages = [{"role": "system", "content": _ASK}]
        for question in questions:
            messages += [{"role": "user", "content": question.text}, {"role": "assistant", "content": _MARK}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    else:
        text = _ASK + "".join(f"\n\nQuestion: {question.text}\nAnswer: {_MARK}" for question in questions)
    contexts = text.split(_MARK)
    if len(contexts) != len(questions) + 1:
        raise SetupError("the model's chat template does not keep the turns of a conversation")
    encoded = tokenizer(contexts, add_special_tokens=False).input_ids
    labels = tokenizer([question.answer for question in questions], add_special_tokens=False).input_ids
    ids, answers = [*front, *encoded[0]], []
    for label, context in zip(labels, encoded[1:], strict=True):
        answers.append((len(ids), len(ids) + len(label)))
        ids += label + context
    return Asked(ids, answers, [])


class Questions(Experiment):
    """Exact match by method; `one-shot`: each question by itself."""

    name, title, reference = "questions", "Streaming question answering", "Table 5"

    def why_not(self, setting: Setting) -> str | None:
        return None if setting.questions else "it needs --questions: a file in ARC's format, ARC on the hub, or made"

    def pieces(self, setting: Setting) -> list[Piece]:
        questions = read_questions(str(setting.questions))[: setting.lengths.questions]
        data = hash_of({"questions": [[q.text, q.answer] for q in questions]})
        return [self._piece(setting, method, questions, data) for method in METHODS]

    def _piece(self, setting: Setting, method: str, questions: list[Question], data: str) -> Piece:
        cache, tokenizer, front = setting.lengths.cache, setting.info.tokenizer, list(setting.beginning.ids)

        def compute() -> Found:
            if method == "one-shot":
                streams = [conversation(tokenizer, front, [question]) for question in questions]
                sizes = method_sizes(setting, "dense", cache, max(len(stream.ids) for stream in streams))
                right = np.concatenate(answered(setting, streams, sizes, at_a_time=16))
                return Found({"accuracy": float(right.mean()), "questions": len(right)}, {"right": right})
            stream = conversation(tokenizer, front, questions)
            right = answered(setting, [stream], method_sizes(setting, method, cache, len(stream.ids)))[0]
            values = {"accuracy": float(right.mean()), "questions": len(right), "stream_tokens": len(stream.ids)}
            return Found(values, {"right": right, "places": np.array([end for _, end in stream.answers])})

        config = {"what": "questions", "method": method, "data": data, "cache": cache, "n_sink": setting.n_sink}
        kind = (setting.source.name, "questions", method)
        return Piece(method, config, compute, kind, sum(len(q.text) // 4 for q in questions))

    def result(self, setting: Setting, found: dict[str, Found]) -> dict:
        questions = read_questions(str(setting.questions))[: setting.lengths.questions]
        chance = float(np.mean([1 / len(question.choices) for question in questions]))
        rows = [{"method": method} | one.values for method, one in found.items()]
        rows.append({"method": "chance", "accuracy": chance})
        curves = {m: binned(one.arrays["places"], one.arrays["right"]) for m, one in found.items()
                  if "places" in one.arrays}  # fmt: skip
        return {"cache_size": setting.lengths.cache, "n_sink": setting.n_sink, "rows": rows, "curves": curves,
                "questions": Path(str(setting.questions)).name}  # fmt: skip
