"""Word problems that are made here, in GSM8K's manner: a short story, one sentence of working per step, `#### n`.

They are text, so that a tokenizer of word pieces has something to merge, and a solution is as long as a short answer of
a real model; what there is to compute is small, so that a model of a few million parameters learns it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from klab.grid.errors import UserError
from klab.tasks.answers import final_answer
from klab.tasks.splits import Drawn
from klab.tasks.task import Example, Score, SplitName

TRAIN_LENGTH, HELD_OUT_LENGTH = 1_000_000, 4_096
LEAST = 2

_NAMES = (
    "Ada", "Amir", "Anna", "Ben", "Boris", "Carla", "Chen", "Clara", "David", "Elena", "Emil", "Eva", "Felix",
    "Fatima", "Greta", "Hana", "Hugo", "Ida", "Ivan", "Jan", "Julia", "Kai", "Kofi", "Lara", "Leo", "Lin", "Luis",
    "Maja", "Marta", "Mia", "Nadia", "Nils", "Noah", "Olga", "Omar", "Paul", "Petra", "Rosa", "Sami", "Tara", "Tom",
    "Uma", "Vera", "Yusuf", "Zoe",
)  # fmt: skip
_THINGS = (
    "apples", "balls", "beads", "books", "bottles", "buttons", "cards", "candles", "carrots", "coins", "cookies",
    "cups", "eggs", "feathers", "flowers", "forks", "jars", "keys", "lemons", "letters", "marbles", "melons",
    "nuts", "olives", "oranges", "paintings", "pears", "pencils", "plates", "plums", "ribbons", "ropes", "shells",
    "spoons", "stamps", "stickers", "stones", "tickets", "tomatoes", "toys",
)  # fmt: skip
_GAINS = ("buys {n} more", "finds {n} more", "is given {n} more", "gets {n} from a friend", "wins {n} in a game")
_LOSSES = ("gives away {n}", "loses {n}", "sells {n}", "sends {n} to a friend", "drops {n} on the way")


class WordProblems:
    """Prompt `Mia has 14 pears. Then Mia buys 9 more. How many pears does Mia have now?`, solution ` Mia starts with 14
    pears. After that Mia has 14 + 9 = 23 pears. #### 23`. Reward 1 for the right number after the last `####`, else 0.

    No story is in both splits; the sums that it takes may be, as there are few.

    Args:
        steps: how often something is added or taken away.
        largest: the largest number that a problem names; the least is 2. Results are not negative.
    """

    name = "word_problems"
    interactive = False
    alphabet = (
        "".join(
            sorted(
                set("".join([*_NAMES, *_THINGS, *_GAINS, *_LOSSES, "Then has starts with. After How many? does now"]))
            )
        ).translate({ord("{"): None, ord("}"): None})
        + "#+-=0123456789"
    )

    def __init__(self, steps: int = 1, largest: int = 20) -> None:
        if not 1 <= steps <= 6:
            raise UserError("must be between 1 and 6", key="task.steps", value=steps)
        if not 5 <= largest <= 99:
            raise UserError("must be between 5 and 99", key="task.largest", value=largest)
        self.steps, self.largest = steps, largest
        self.max_new_tokens = 45 + 50 * steps

    def split(self, name: SplitName) -> Sequence[Example]:
        length = HELD_OUT_LENGTH if name == "held_out" else TRAIN_LENGTH
        return Drawn(f"word_problems/{self.steps}/{self.largest}", name, length, self._draw)

    def score(self, example: Example, completion: str) -> Score:
        """Part: `format`, whether the completion marks an answer, right or wrong."""
        answer = final_answer(completion)
        correct = answer == example.answer
        return Score(float(correct), correct, {"format": float(answer is not None)})

    def respond(self, example: Example, transcript: str) -> str | None:
        return None

    def _draw(self, generator: random.Random) -> tuple[str, Example]:
        name, things = generator.choice(_NAMES), generator.choice(_THINGS)
        total = generator.randint(LEAST, self.largest)
        story, working = [f"{name} has {total} {things}."], [f" {name} starts with {total} {things}."]
        for _ in range(self.steps):
            change = generator.randint(LEAST, self.largest)
            loses = change <= total and generator.random() < 0.5
            phrase = generator.choice(_LOSSES if loses else _GAINS).format(n=change)
            after = total - change if loses else total + change
            story.append(f"Then {name} {phrase}.")
            working.append(f"After that {name} has {total} {'-' if loses else '+'} {change} = {after} {things}.")
            total = after
        prompt = " ".join([*story, f"How many {things} does {name} have now?"])
        return prompt, Example(prompt, str(total), " ".join([*working, f"#### {total}"]))
