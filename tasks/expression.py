"""A parser for integer expressions with + − × and parentheses, safe on anything that a policy may write.

sum     = product { ("+" | "-") product }
product = factor { "*" factor }
factor  = digits | "(" sum ")"
"""

from __future__ import annotations

MAX_LENGTH = 256
MAX_DEPTH = 32
MAX_DIGITS = 9


class Malformed(ValueError):
    """The text is not an expression, or exceeds the limits on length, depth or digits."""


def evaluate(text: str) -> tuple[int, list[int]]:
    """Value of an expression, and the numbers written in it from left to right.

    Raises:
        Malformed: not an expression, over 256 characters, nested deeper than 32, or a number of over 9 digits.
    """
    if len(text) > MAX_LENGTH:
        raise Malformed(f"longer than {MAX_LENGTH} characters")
    parser = _Parser(text)
    value = parser.sum(0)
    if parser.at != len(text):
        raise Malformed(f"unexpected {text[parser.at]!r} at {parser.at}")
    return value, parser.numbers


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.numbers: list[int] = []

    def sum(self, depth: int) -> int:
        value = self.product(depth)
        while (operator := self._accept("+-")) is not None:
            term = self.product(depth)
            value = value + term if operator == "+" else value - term
        return value

    def product(self, depth: int) -> int:
        value = self.factor(depth)
        while self._accept("*") is not None:
            value *= self.factor(depth)
        return value

    def factor(self, depth: int) -> int:
        if depth > MAX_DEPTH:
            raise Malformed(f"nested deeper than {MAX_DEPTH}")
        if self._accept("(") is not None:
            value = self.sum(depth + 1)
            if self._accept(")") is None:
                raise Malformed(f"missing ')' at {self.at}")
            return value
        start = self.at
        while self._accept("0123456789") is not None:
            pass
        digits = self.text[start : self.at]
        if not 1 <= len(digits) <= MAX_DIGITS:
            raise Malformed(f"expected a number of up to {MAX_DIGITS} digits at {start}")
        self.numbers.append(int(digits))
        return self.numbers[-1]

    def _accept(self, characters: str) -> str | None:
        if self.at < len(self.text) and self.text[self.at] in characters:
            self.at += 1
            return self.text[self.at - 1]
        return None
