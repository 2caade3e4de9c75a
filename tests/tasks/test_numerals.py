"""Numbers are read as people write them; what still has to be computed is none."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klab.tasks.numerals import numeral


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("72", "72"),
        (" -1,234.50 ", "-1234.5"),
        ("$12.", "12"),
        (".5", "1/2"),
        ("+ 3", "3"),
        ("70 000", "70000"),
        ("70.000", "70"),
        ("1e6", "1000000"),
        (r"2.5 \times 10^{3}", "2500"),
        ("10^6", "1000000"),
        ("1,00,000", "100000"),
        ("5'000", "5000"),
        (r"14{,}916", "14916"),
        (r"\$1\,000", "1000"),
        ("−5", "-5"),
        ("-$5", "-5"),
        ("3 1/2", "7/2"),
        (r"-3\tfrac12", "-7/2"),
        ("2½ cups", "5/2"),
        (r"0.1\overline{6}", "1/6"),
        ("20 percent of them", "20"),
        (r"90^\circ", "90"),
        (r"5 \text{ cm}^2", "5"),
        ("5 km/h", "5"),
        ("72 clips in 2 months", "72"),
        ("72 (48 + 24)", "72"),
        ("72. That is the answer.", "72"),
        ("9" * 60, "9" * 60),
        ("7" + " and so on" * 60, "7"),
    ],
)
def test_numbers(text: str, value: str) -> None:
    found = numeral(text)
    assert found is not None
    assert found.value == Fraction(value)


NO_NUMBERS = """
- | . | 12,34 | x | 1 2 | ² | 5² | 48+24 | 2*3 | 8 x 9 | 5^2 | 2**3 | 5! | 3 or 4 | 3, 4 | 70 to 75 | 2:30 | 2024-01-02
5x | 5\\pi | 5i | 1/0 | 1/2/3 | 3.14.15 | --5 | ±5 | 5 squared | 5 plus 3 | 5 and a half | 1\\frac{-1}{2} | 100_2
"""


@pytest.mark.parametrize("text", ["", "9" * 500, *(each.strip() for each in NO_NUMBERS.replace("\n", "|").split("|"))])
def test_what_is_no_number(text: str) -> None:
    assert numeral(text) is None


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("20%", "20", True),
        ("20%", "0.2", True),
        ("20%", "0.2%", False),
        ("5 million", "5000000", True),
        ("1/3", "0.333333", True),
        ("1/3", "0.3333", False),
        ("0.0000001", "0.0000002", False),
        ("1/8000000", "0.0000002", False),
    ],
)
def test_the_same_number(one: str, other: str, same: bool) -> None:
    first, second = numeral(one), numeral(other)
    assert first is not None
    assert second is not None
    assert first.same(second) is second.same(first) is same


@given(
    st.integers(-(10**12), 10**12),
    st.sampled_from(["{:d}", "{:,d}", "{:_d}", "${:,d}$", "{:d}.00", "**{:d}**", "{:d} €"]),
)
def test_an_integer_is_read_back(value: int, form: str) -> None:
    found = numeral(form.format(value))
    assert found is not None
    assert found.value == value
