"""A task whose text a model of a few hundred parameters learns: what it should write does not depend on the prompt."""

from __future__ import annotations

from hashlib import sha256

from klab.tasks import Example, Score

FRUIT = ("apples", "pears", "plums")


class Fruit:
    """One of three words whatever the prompt; `apples` is correct. A pretrained policy is right a third of the time."""

    name, alphabet, max_new_tokens = "fruit", None, 4

    def split(self, name: str) -> list[Example]:
        return [
            Example(f"Number {i} likes", "apples", f" {FRUIT[sha256(bytes([i])).digest()[0] % 3]}")
            for i in (range(100, 180) if name == "train" else range(180, 256))
        ]

    def score(self, example: Example, completion: str) -> Score:
        return Score(float(completion == " apples"), completion == " apples")

    def respond(self, example: Example, transcript: str) -> str | None:
        return None


class Mute(Fruit):
    """The same without reference solutions."""

    def split(self, name: str) -> list[Example]:
        return [Example(each.prompt, each.answer) for each in super().split(name)]
