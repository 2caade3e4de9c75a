"""Final answers are found where solutions mark them, and numbers are compared as numbers."""

from __future__ import annotations

from decimal import Decimal

import pytest

from klab.tasks.answers import final_answer, number
from klab.tasks.verification import same_value

# the first training example of GSM8K, Cobbe et al. 2021
NATALIA = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72"
)


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
        ("the answer is 72", None),
        ("####", None),
        (r"\boxed{1", None),
        (r"\boxed{}", None),
    ],
)
def test_the_last_mark_counts(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [("72", "72"), (" -1,234.50 ", "-1234.50"), ("$12.", "12"), (".5", "0.5"), ("+ 3", "3")],
)
def test_plain_numbers(text: str, value: str) -> None:
    assert number(text) == Decimal(value)


@pytest.mark.parametrize("text", ["", "-", ".", "1/2", "12,34", "1e9", "x", "1 2", "9" * 41, "²"])
def test_what_is_no_plain_number(text: str) -> None:
    assert number(text) is None


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
        ("5", "\udcff \x00 [[", False),
    ],
)
def test_answers_of_the_same_value(answer: str, completion: str, same: bool) -> None:
    assert same_value(answer, completion) is same
