"""Final answers are found where solutions mark them, and have the value that they were given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klab.tasks import Example, Score, verification
from klab.tasks.answers import final_answer, marked_answer
from klab.tasks.rewards import Rewards
from klab.tasks.verification import compared, same_value

ROWS = [json.loads(line) for line in (Path(__file__).parent / "answers.jsonl").read_text("utf-8").splitlines()]

# the first training example of GSM8K, Cobbe et al. 2021
NATALIA = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72"
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['truth']} | {row['completion']}"[:60])
def test_the_score_of_an_answer(row: dict[str, object]) -> None:
    comparison = compared(str(row["truth"]), str(row["completion"]))
    assert (int(comparison.same), comparison.overdue) == (row["score"], False)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (NATALIA, "72"),
        ("#### 1,234", "1,234"),
        ("#### 1\n#### 2\nand more", "2"),
        ("#### 18 dollars", "18"),
        ("#### **5**.", "5"),
        ("#### 1/2", "1/2"),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"\boxed{1} #### 2", "2"),
        (r"#### 2, \boxed{\{3\}}", r"\{3\}"),
        (r"\boxed{1} and $\boxed{2}$", "1, 2"),
        (r"\boxed{1}. In truth it is \boxed{2}", "2"),
        (r"\boxed{\boxed{1}}", r"\boxed{1}"),
        ("#### Evelyn\n#### Explanation", "Evelyn"),
        ("#### Final answer\n**7**", "7"),
        ("the answer is 72", None),
        ("####", None),
        ("#### Step 1: add 70 and 3", None),
        (r"\boxed{1", None),
        (r"\boxed{}", None),
    ],
)
def test_the_last_mark_with_an_answer_counts(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("answer", "completion", "same"),
    [
        (NATALIA, "48 + 24\n#### 72", True),
        (NATALIA, "#### 72.0", True),
        (NATALIA, "#### 73", False),
        (NATALIA, "She sold 72 clips.", True),
        (NATALIA, "#### 72\nno, #### 71", False),
        (NATALIA, "", False),
        (r"\boxed{\frac{1}{2}}", r"thus \boxed{0.5}", True),
        (r"\boxed{p - q}", r"\boxed{-q + p}", True),
        (r"\boxed{p - q}", r"\boxed{q - p}", False),
        (r"\boxed{\left(3,\frac{\pi}{2}\right)}", r"\boxed{(3, \pi/2)}", True),
        (r"\boxed{\text{Evelyn}}", r"\boxed{Evelyn}", True),
        (r"\boxed{\text{Evelyn}}", r"\boxed{Angela}", False),
        (r"\boxed{10{,}455}", r"it earned \boxed{255}. Final Answer: The final answer is $10,455$. I hope so.", True),
        ("5", "\udcff \x00 [[", False),
    ],
)
def test_answers_of_the_same_value(answer: str, completion: str, same: bool) -> None:
    assert same_value(answer, completion) is same


# facts that math-verify's own tests hold as well: answers in several boxes, sets, tuples, intervals, units, decimals
@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        (r"$\boxed{1}\boxed{2}$", r"$\boxed{1,2}$", True),
        (r"\(\boxed{1}\) and \(\boxed{-2}\).", r"$\boxed{-2,1}$.", True),
        (r"$(2,1),(1,2)$", "solutions:\n\\[\n\\boxed{(1, 2)}, \\boxed{(2, 1)}\n\\]", True),
        (r"$(3, 3), (1, 1)$", r"$\boxed{(3, 3)} \text{ for part (a) and } \boxed{(1, 1)}$", True),
        (r"$k = 45, n = 2$", r"$\boxed{k = 45} \quad \text{and} \quad \boxed{n = 2}$", True),
        (r"$2, 3, 5$", r"$\boxed{2}, \boxed{3}, \boxed{5}$", True),
        (r"\boxed{1} papers and \boxed{2} bins", r"$\boxed{1,2}$", True),
        ("1,22", "1.22", True),
        ("0,111", "0.111", True),
        ("1000", "1 000", True),
        ("1000.99", "the number is not 10 which is 1,000.99€", True),
        (r"$28\%$", "28 pct", True),
        (r"$[0,9)$", "$[0,1)$", False),
        (r"$4$", r"$4\sqrt{2}$", False),
        ("$12:00$", "$1:00$", False),
        ("$19, 46, and 82$", r"$19, 46, \text{ and } 82$", True),
        (r"$-2 \le x \le 7$", r"$x \in [-2,7]$", True),
    ],
)
def test_what_math_verify_decides(gold: str, answer: str, same: bool) -> None:
    assert same_value(gold, answer) is same


def test_a_mark_knows_how_it_was_made() -> None:
    found = {text: marked_answer(text) for text in ("#### 5", "#### Natalia sold 5", r"\boxed{5}")}
    assert [answer and answer.kind for answer in found.values()] == ["text", "words", "box"]


WORDS = st.sampled_from(["", "so", "we add them", "as asked", "clips", "(checked)", "that is all", "because 2 + 3 = 5"])
NUMBERS = st.one_of(
    st.integers(-(10**9), 10**9),
    st.decimals(-(10**6), 10**6, places=3, allow_nan=False, allow_infinity=False).map(lambda value: f"{value:f}"),
    st.tuples(st.integers(-99, 99), st.integers(2, 99))
    .filter(lambda pair: pair[0] % pair[1])  # else it is a division that was not computed
    .map(lambda pair: rf"\frac{{{pair[0]}}}{{{pair[1]}}}"),
)
MARKS = st.sampled_from(["#### {}", "#### **{}**", "#### Answer: {}", "#### ${}$", r"\boxed{{{}}}", r"$\boxed{{{}}}$"])


@settings(max_examples=150, deadline=None)
@given(NUMBERS, NUMBERS, MARKS, WORDS, WORDS, st.sampled_from(["", ". ", "\n", ", ", " "]))
def test_text_around_an_answer_changes_nothing(
    truth: object, answer: object, mark: str, before: str, after: str, between: str
) -> None:
    """math-verify's verdict on the bare pair is klab's on a completion with words around the mark."""
    from math_verify import parse, verify

    exact = verify(parse(rf"\boxed{{{truth}}}"), parse(rf"\boxed{{{answer}}}"))
    joint = between if between != "" or not after else " "
    for given_answer, same in ((answer, exact), (truth, True)):
        completion = f"{before}\n{mark.format(given_answer)}{joint}{after}"
        assert same_value(rf"\boxed{{{truth}}}", completion) is same
        assert same_value(f"#### {truth}", completion) is same


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.text("#\\boxed{}$*`<>|/ 0123456789.,=-and\n", max_size=60))
def test_any_text_is_read(text: str) -> None:
    answer = marked_answer(text)
    assert answer is None or answer.text


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{" * 20_000, None),
        ("#### " + "* " * 40_000 + "\n#### 5", "5"),
        ("#### answer" + " " * 80_000 + "5", "5"),
        (r"\boxed{1} and \boxed{2} and " * 5_000, "1, 2, " * 4_999 + "1, 2"),
    ],
    ids=["boxes", "stars", "spaces", "joined"],
)
def test_long_texts_are_read(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer  # in time that is quadratic in the length this would hang


def test_math_verify_has_a_limit_of_processor_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "STEP_SECONDS", 1e-4)
    score = verification.verified(r"\boxed{x^2}", rf"\boxed{{{'x+' * 400}x}}", "")
    assert (score.correct, score.parts["overdue"]) == (False, 1.0)
    monkeypatch.undo()
    assert verification.verified(r"\boxed{x^2}", r"\boxed{x \cdot x}", "") == Score(1.0, True, {"overdue": 0.0})


def test_an_answer_that_a_limit_decided_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "CALL_SECONDS", 1e-3)  # not enough to import math-verify
    verification._worker.cache_clear()
    example = Example("?", r"\boxed{y^2 + \pi}")
    score = Rewards(["math", "format"]).score(example, r"\boxed{\pi + y \cdot y}")
    verification._worker.cache_clear()
    assert (score.reward, score.correct, score.timeouts) == (1.0, False, 1)
    assert Rewards(["math", "format"]).has_timeouts
    assert not Rewards("format").has_timeouts
