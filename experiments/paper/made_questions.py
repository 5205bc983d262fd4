"""Easy multiple-choice questions, made by a seeded generator: a stand-in for ARC where there is no network."""

import random

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


def make_records(number: int, seed: int) -> list[dict]:
    """So many records in the format that ARC has on the hub."""
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
