r"""Numbers as people write them: `1,234.50`, `70 000`, `1e6`, `3 1/2`, `\frac{1}{2}`, `20%`, `-$5`, `72 clips`.

What stands around a number (currency, unit, LaTeX, words) is not part of it. An expression that still has to be
computed (`48+24`, `2^3`) is no number, nor are two of them (`12 or 13`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction

LONGEST_TEXT = 400
"""Characters that are looked at."""

DECIMALS = 6
"""A decimal number is that of a fraction, or of a percentage, when both agree so far; as math-verify compares them."""

_WORDS = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_GLYPHS = {
    **dict.fromkeys("\u00a0\u2002\u2003\u2007\u2009\u200a\u202f", " "),
    **dict.fromkeys("\u200b\u2060\ufeff", ""),
    **dict.fromkeys("−﹣－", "-"),
    **dict.fromkeys("⁄∕", "/"),
    "°": r"\circ ",
    "½": r" \frac{1}{2} ",
    "⅓": r" \frac{1}{3} ",
    "⅔": r" \frac{2}{3} ",
    "¼": r" \frac{1}{4} ",
    "¾": r" \frac{3}{4} ",
}
_LATEX = [
    (re.compile(r"\\(?:left|right|displaystyle|textstyle|bigl?|bigr?|Bigl?|Bigr?)(?![A-Za-z])"), ""),
    (re.compile(r"\\!|(?<!\\)\\\(|(?<!\\)\\\)|(?<!\\)\\\[|(?<!\\)\\\]|\\?[$€£¥₹]"), ""),
    (re.compile(r"\{\s*,\s*\}|\\mathord\{,\}"), ","),
    (re.compile(r"\\[,;: ]|\\q?quad(?![A-Za-z])|~"), " "),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:text\w*|math\w+|mbox|operatorname|rm|bf|it)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\^?\s*\{?\s*\\(?:circ|degree)(?![A-Za-z])\s*\}?"), " degrees "),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])|·|⋅"), "×"),
    (re.compile(r"\\(?:approx|simeq|sim)(?![A-Za-z])"), "≈"),
    (re.compile(r"(?<![\w)*])\*\*(?=\S)([^*]+)\*\*(?![\w(*])|`([^`]+)`"), r"\1\2"),
]
_HEDGE = r"(?:[≈~]|about|approximately|approx\.?|roughly|around|exactly|only|just|USD|EUR|GBP|US|Rs\.?)"
_PREFIX = re.compile(rf"\s*(?:{_HEDGE}\s*)*", re.IGNORECASE)
_WHOLE = (
    r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d?(?:,\d{2})+,\d{3}|[1-9]\d{0,2}(?: \d{3})+"
    r"|[1-9]\d{0,2}(?:['’]\d{3})+|[1-9]\d{0,2}(?:_\d{3})+|\d+)"
)
_RATIO = r"\\frac\s*(?:\{\s*(?P<n>[+-]?\d+)\s*\}|(?P<n1>\d))\s*(?:\{\s*(?P<d>[+-]?\d+)\s*\}|(?P<d1>\d))"
_SLASH = rf"(?P<n2>{_WHOLE})\s*/\s*(?P<d2>\d+)"
_FRACTION = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<whole>\d+)(?:\s+|\s*(?=\\)))?(?:{_RATIO}|{_SLASH})(?![\d.,]*\d)", re.ASCII
)
_EXPONENT = (
    r"(?:[eE](?P<e>[+-]?\d{1,3})(?![\w.])|\s*[×x*]\s*10\s*(?:\^|\*\*)\s*\{?\s*(?P<power>[+-]?\d{1,3})\s*\}?(?![\w.]))"
)
_DECIMAL = re.compile(
    rf"(?P<sign>[+-]?)\s*(?P<digits>{_WHOLE}(?:\.\d+)?|\.\d+)(?:{_EXPONENT})?(?![\d]|[.,]\d)", re.ASCII
)
_POWER = re.compile(
    r"(?P<sign>[+-]?)\s*10\s*(?:\^|\*\*)\s*(?:\{\s*(?P<braced>[+-]?\d{1,3})\s*\}|(?P<bare>\d{1,3})(?![\d.]))"
)
_REPEATING = re.compile(r"(?P<sign>[+-]?)\s*(?P<once>\d*\.\d*)\\(?:overline|bar)\s*\{\s*(?P<again>\d+)\s*\}", re.ASCII)
_PERCENT = re.compile(r"\s*(?:%|per\s?cent(?:age)?\b|pct\b)", re.IGNORECASE)
_SCALE = re.compile(rf"\s*({'|'.join(_WORDS)})\b", re.IGNORECASE)
_CLOSING = r"""[\s.,;:?"'”’)\]}*_]*"""
_QUANTITY = r"(?:[+-]?\s*(?:\.?\d|\\frac))"
_JOINED = re.compile(
    rf"\s*(?:[,;:/&|]|or\b|and\b|to\b|through\b|versus\b|vs\b|plus\b|minus\b|times\b|over\b|by\b|x\b|divided\s+by\b|"
    rf"multiplied\s+by\b)\s*(?:or\b|and\b|maybe\b|perhaps\b|possibly\b|else\b|even\b)?\s*{_QUANTITY}",
    re.IGNORECASE | re.ASCII,
)
_CHANGED = re.compile(
    r"\s*(?:squared|cubed|factorial|point|(?:and\s+)?(?:an?|one)\s+(?:half|third|quarter|fourth|fifth))\b", re.I
)
_UNITS = "mglLshdWVAJNKCFBTΩ"
_AFTER = re.compile(
    rf"{_CLOSING}$"  # nothing
    r"|[.,;:?\"'”’)\]}]+(?=\s)"  # the end of a sentence, and more
    r"|\s*[-–—/]?\s*[A-Za-zµμΩ]{2,}"  # words or a unit: km, -year, /hour
    rf"|\s*/?\s*[{_UNITS}](?![A-Za-z(])"  # a unit of one letter
    r"|\s+[(\[–—]\s*|\s+-\s+(?=[A-Za-z]{2})"  # a remark
    r"|\s+(?:a|A|I)\s",
)


@dataclass(frozen=True, slots=True)
class Numeral:
    """A number as it was written.

    Attributes:
        value: without percent sign and without the word of a scale.
        percent: whether a percent sign follows.
        scale: what the word after it stands for: 10⁶ for `5 million`.
        ratio: whether it is written as a fraction.
        text: as it stands, without what is around it.
    """

    value: Fraction
    percent: bool = False
    scale: int = 1
    ratio: bool = False
    text: str = field(default="", compare=False)

    @property
    def readings(self) -> set[Fraction]:
        """What it may mean: 20% is 20 and 0.2, as a truth leaves the sign to the question; likewise `5 million`."""
        return {self.value, self.value / 100} if self.percent else {self.value, self.value * self.scale}

    def same(self, other: Numeral) -> bool:
        """Whether both are the same number.

        >>> numeral("1,234").same(numeral("1234.0"))
        True
        """
        if self.percent and other.percent:
            return self.value == other.value
        if self.readings & other.readings:
            return True
        inexact = self.ratio is not other.ratio or self.percent is not other.percent
        return inexact and any(_close(a, b) for a in self.readings for b in other.readings)

    def computes(self, truth: Numeral) -> bool:
        """Whether it leaves nothing to compute where the truth is this: `144/2` is no way to write 72."""
        return not self.ratio or truth.ratio or truth.value.denominator > 1 or self.value.denominator > 1


def numeral(text: str) -> Numeral | None:
    """The number that a text begins with, if what follows is no more than words about it; None for anything else.

    >>> numeral("72 clips, altogether").value
    Fraction(72, 1)
    """
    plain = _plain(text[:LONGEST_TEXT])
    start = _PREFIX.match(plain)
    begin = start.end() if start else 0
    for pattern, read in _FORMS:
        match = pattern.match(plain, begin)
        if match is None:
            continue
        value = read(match)
        if value is None or (len(text) > LONGEST_TEXT and match.end() == len(plain)):
            return None
        percent = _PERCENT.match(plain, match.end())
        scale = None if percent else _SCALE.match(plain, match.end())
        end = (percent or scale or match).end()
        if not _only_words(plain[end:]):
            return None
        factor = _WORDS[scale.group(1).lower()] if scale else 1
        return Numeral(value, percent is not None, factor, pattern in (_FRACTION, _REPEATING), plain[begin:end].strip())
    return None


def _plain(text: str) -> str:
    """Without LaTeX, currency and emphasis."""
    plain = "".join(_GLYPHS.get(character, character) for character in text)
    for pattern, replacement in _LATEX:
        plain = pattern.sub(replacement, plain)
    plain = plain.strip()
    while plain[:1] + plain[-1:] in ("()", "{}") and not set(plain[1:-1]) & set("(){},"):
        plain = plain[1:-1].strip()
    return plain


def _only_words(rest: str) -> bool:
    if _JOINED.match(rest) or _CHANGED.match(rest):
        return False
    return _AFTER.match(rest) is not None


def _ratio(match: re.Match[str]) -> Fraction | None:
    parts = match.groupdict()
    above = parts["n"] or parts["n1"] or parts["n2"].translate(_SEPARATORS)
    below = int(parts["d"] or parts["d1"] or parts["d2"])
    if below == 0 or (parts["whole"] and Fraction(int(above), below) < 0):
        return None
    value = int(parts["whole"] or 0) + Fraction(int(above), below)
    return -value if parts["sign"] == "-" else value


def _decimal(match: re.Match[str]) -> Fraction | None:
    value = Fraction(match["digits"].translate(_SEPARATORS))
    value *= Fraction(10) ** int(match["e"] or match["power"] or 0)
    return -value if match["sign"] == "-" else value


def _power(match: re.Match[str]) -> Fraction | None:
    value = Fraction(10) ** int(match["braced"] or match["bare"])
    return -value if match["sign"] == "-" else value


def _repeating(match: re.Match[str]) -> Fraction | None:
    once, again = match["once"], match["again"]
    decimals = len(once.partition(".")[2])
    value = Fraction(f"0{once}0") + Fraction(int(again), (10 ** len(again) - 1) * 10**decimals)
    return -value if match["sign"] == "-" else value


_FORMS = ((_FRACTION, _ratio), (_POWER, _power), (_REPEATING, _repeating), (_DECIMAL, _decimal))


def _close(one: Fraction, other: Fraction) -> bool:
    return round(one, DECIMALS) == round(other, DECIMALS) and abs(one - other) <= abs(one) / 10_000


_SEPARATORS = str.maketrans("", "", ",_'’ ")
