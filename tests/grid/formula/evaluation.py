"""Printed formulas evaluated on toy numbers: what stands in the LaTeX is computed, and nothing else.

Log-probabilities and logits are sympy's symbols in the loss, so that it can be differentiated; what stands in sg[·] or
in a condition is a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import sympy

from klab.grid.formula.notation import Atom, Cases, Fenced, Fraction, Node, Row, Scripts, Word, parse
from klab.grid.formula.symbols import source
from tests.harness.objective.oracle import Trajectory, hashed

Token = tuple[int, int]
"""A trajectory and an own position in it, from 0."""

_RELATIONS: dict[str, Callable[[float, float], bool]] = {
    "=": lambda a, b: a == b, r"\ne": lambda a, b: a != b, "<": lambda a, b: a < b, ">": lambda a, b: a > b,
    r"\le": lambda a, b: a <= b, r"\ge": lambda a, b: a >= b,
}  # fmt: skip
_OLD, _REF = r"^{\mathrm{old}}", r"^{\mathrm{ref}}"


@dataclass(frozen=True)
class Scope:
    """What indices mean at a place of a formula."""

    n: int | None = None
    group: int | None = None
    tokens: Mapping[str, Token] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)

    def at(self, name: str, token: Token) -> Scope:
        return replace(self, tokens={**self.tokens, name: token})

    def of(self, n: int) -> Scope:
        """The same place in another trajectory."""
        tokens = {name: (n, position) for name, (_, position) in self.tokens.items() if name == "j"}
        return replace(self, n=n, tokens=tokens)


class Evaluation:
    """The equations of one formula on one update.

    Args:
        equations: left and right sides.
        numbers: what the parameters are, by their printed symbols.
        trajectories: the update.
        max_new_tokens: T_max.
        sampled: μ of every own token, where a formula has it.
    """

    def __init__(
        self,
        equations: Sequence[tuple[str, str]],
        numbers: Mapping[str, float],
        trajectories: list[Trajectory],
        max_new_tokens: int,
        sampled: list[list[float]] | None = None,
    ) -> None:
        self.right = {_key(left): parse(right) for left, right in equations}
        self.numbers, self.all, self.budget = numbers, trajectories, max_new_tokens
        self.sampled = sampled or []
        self.symbolic = False
        self.found: dict[tuple[str, Token | int | None], Any] = {}

    def loss(self) -> tuple[float, Any, dict[Any, float]]:
        """The loss as a number and as an expression in symbols, with the numbers that the symbols stand for."""
        value = self.sum(self.right["L"], Scope())
        self.symbolic = True
        expression = sympy.sympify(self.sum(self.right["L"], Scope()))
        self.symbolic = False
        return float(value), expression, self._values()

    def gradient(self) -> Any:
        """The printed gradient, linear in symbols for ∇ℓ and ∇log π(v)."""
        return sympy.sympify(self.sum(self.right["EL"], Scope()))

    def _values(self) -> dict[Any, float]:
        found = {}
        for n, trajectory in enumerate(self.all):
            for j, value in enumerate(trajectory.now):
                found[logp(n, j)] = value
                for v, logit in enumerate((trajectory.logits or [])[j] if trajectory.logits else []):
                    found[logit_symbol(n, j, v)] = logit
        return found

    # sums, products, factors

    def sum(self, row: Row, scope: Scope) -> Any:
        """The value of a formula without relations."""
        total: Any = 0
        sign, term = 1, []
        for node in (*row, Atom("+")):
            if node in (Atom("+"), Atom("-")):
                if term:
                    total = total + sign * self.product(tuple(term), scope)
                    sign, term = 1, []
                sign = -1 if node == Atom("-") else 1
            else:
                term.append(node)
        return total

    def product(self, row: Row, scope: Scope) -> Any:
        value: Any = 1
        divide, place = False, 0
        while place < len(row):
            node = row[place]
            if node in (Atom(r"\cdot"), Atom("/")):
                divide, place = node == Atom("/"), place + 1
                continue
            factor, used = self.factor(row[place:], scope)
            value = value / factor if divide else value * factor
            divide, place = False, place + used
        return value

    def factor(self, row: Row, scope: Scope) -> tuple[Any, int]:
        """The value of the first factor of a product, and how many nodes it takes."""
        node, following = row[0], row[1] if len(row) > 1 else None
        base = node.base if isinstance(node, Scripts) else node
        sub = node.sub if isinstance(node, Scripts) else ()
        if base == Atom(r"\sum"):
            inner = [self.product(row[1:], each) for each in self.range(node, scope)]
            return sum(inner), len(row)
        if base == Atom(r"\nabla"):
            return self.nabla(row[1:], scope)
        if base == Atom(r"\log"):
            argument, used = self.factor(row[1:], scope)
            return self.apply("log", argument), used + 1
        if base == Word("mathbf", "1") and isinstance(following, Fenced):
            return (1 if self.holds(following.body, scope) else 0), 2
        if isinstance(base, Word) or base in (Atom(r"\min"), Atom(r"\max"), Atom(r"\exp"), Atom(r"\sigma")):
            name = base.text if isinstance(base, Word) else base.latex[1:]
            if isinstance(following, Fenced):
                return self.call(name, sub, following.body, scope), 2
            return self.extreme(name, sub, row[1:2], scope), 2
        if base == Atom(r"\pi") and isinstance(_unscripted(following), Fenced):
            token = self.token(source(sub), scope)
            value = self.probability(token, _label(node), int(scope.numbers["v"]))
            power = following.sup if isinstance(following, Scripts) else ()
            return (value ** self.sum(power, scope) if power else value), 2
        return self.alone(node, scope), 1

    def alone(self, node: Node, scope: Scope) -> Any:
        """The value of a node that needs no neighbour."""
        match node:
            case Fraction(top, bottom):
                if any(_is_spread(each) and self.factor(bottom[i:], scope)[0] == 0 for i, each in enumerate(bottom)):
                    return 0
                return self.sum(top, scope) / self.sum(bottom, scope)
            case Fenced("(" | "[", body, _):
                return self.sum(body, scope)
            case Fenced(r"\lvert", body, _):
                return self.size(body, scope)
            case Cases(rows):
                chosen = [value for value, condition in rows if self.holds(condition, scope)]
                return self.sum(chosen[0], scope)
            case Scripts(Atom("e"), _, sup):
                return self.apply("exp", self.sum(sup, scope))
            case Scripts(base, sub, sup) if not _label(node) and sup:
                value = self.alone(Scripts(base, sub, ()) if sub else base, scope)
                return value ** self.sum(sup, scope)
            case Atom(text) if text[0].isdigit():
                return float(text) if "." in text else int(text)
            case _:
                return self.symbol(node, scope)

    def size(self, body: Row, scope: Scope) -> Any:
        """|x| of a number or a set."""
        if source(body[:1]).startswith("G"):
            return len(self.members(body, scope))
        value = self.number(body, scope)
        return self.sum(body, scope) * (1 if value >= 0 else -1)

    # symbols

    def symbol(self, node: Node, scope: Scope) -> Any:
        full = source((node,))
        if full in self.numbers:
            return self.numbers[full]
        if full in scope.numbers:
            return scope.numbers[full]
        base = source((node.base,)) if isinstance(node, Scripts) else full
        index = source(node.sub) if isinstance(node, Scripts) else ""
        name = base + _label(node)
        if full in scope.tokens:
            return scope.tokens[full][1] + 1
        if _key(full) in self.right and not index:
            return self.defined(_key(full), scope)
        if full == "N_{+}":
            return self.defined("N_{+}", scope)
        if base in ("R", r"\omega") and index == "k":
            t, k = self.all[scope.n or 0], int(scope.numbers["k"])
            return t.terms[k] if base == "R" else t.term_weights[k]
        if name in ("H", "R", r"R^{\mathrm{greedy}}", r"R^{\mathrm{task}}", "N", "P", "T"):
            return self.constant(name, index, scope)
        token = self.token(index, scope)
        if name == "V":
            values = self.all[token[0]].values
            return 0 if values is None or token[1] >= len(values) else values[token[1]]
        if name in self.right:
            return self.defined(name, Scope(token[0], self.all[token[0]].group, {"j": token}))
        return self.given(name, token)

    def defined(self, name: str, scope: Scope) -> Any:
        """The right side of a symbol's equation."""
        key = (name, scope.tokens.get("j", scope.n))
        if self.symbolic:
            return self.sum(self.right[name], scope)
        if key not in self.found:
            self.found[key] = self.sum(self.right[name], scope)
        return self.found[key]

    def constant(self, name: str, index: str, scope: Scope) -> Any:
        if name == "N":
            return len(self.all)
        if name == "T":
            assert index == r"\max"
            return self.budget
        if name == "P":
            return len({t.group for t in self.all})
        if name == "R" and "R" in self.right:
            return self.defined("R", scope)
        assert scope.n is not None
        t = self.all[scope.n]
        return {"H": t.length, r"R^{\mathrm{greedy}}": t.greedy}.get(name, t.reward)

    def given(self, name: str, token: Token) -> Any:
        """What the update holds."""
        n, j = token
        t = self.all[n]
        if name == r"\ell":
            return logp(n, j) if self.symbolic else t.now[j]
        if name == r"\mu":
            return self.sampled[n][j]
        if name == r"\pi":
            return self.apply("exp", t.now[j])
        columns = {r"\ell" + _OLD: t.old, r"\ell" + _REF: t.ref}
        if name == r"\pi" + _OLD:
            return self.apply("exp", t.old[j])
        return columns[name][j]

    def probability(self, token: Token, label: str, v: int) -> Any:
        n, j = token
        t = self.all[n]
        logits = t.logits if not label else t.logits_ref
        assert logits is not None
        row = [logit_symbol(n, j, u) for u in range(len(logits[j]))] if self.symbolic and not label else logits[j]
        powers = [self.apply("exp", logit) for logit in row]
        return powers[v] / sum(powers)

    def token(self, index: str, scope: Scope) -> Token:
        if index in ("", "1"):
            assert scope.n is not None
            return (scope.n, 0)
        name, _, step = index.partition("+")
        if name not in scope.tokens:
            return self.extreme_token(self.right[name], scope)
        n, position = scope.tokens[name]
        return n, position + int(step or 0)

    # indices and sets

    def range(self, node: Node, scope: Scope) -> Iterator[Scope]:
        """The places that an index below a sum goes through."""
        assert isinstance(node, Scripts)
        text = source(node.sub)
        if text == "G":
            yield from (Scope(group=group) for group in sorted({t.group for t in self.all}))
        elif text.startswith(r"n\in"):
            yield from (scope.of(n) for n in self.members(node.sub[2:], scope))
        elif text == "n=1":
            yield from (scope.of(n) for n in range(len(self.all)))
        elif text in ("v", "k"):
            first = self.all[0]
            count = len(first.logits_ref[0]) if text == "v" and first.logits_ref else len(first.terms)
            for number in range(count):
                yield replace(scope, numbers={**scope.numbers, text: number})
        else:
            name = text.partition("=")[0]
            start = int(self.sum(node.sub[2:], scope))
            assert scope.n is not None
            for position in range(start - 1, int(self.sum(node.sup, scope))):
                yield scope.at(name, (scope.n, position))

    def members(self, body: Row, scope: Scope) -> list[int]:
        """The trajectories of a set."""
        text = source(body)
        if text == "B":
            return list(range(len(self.all)))
        group = self.all[scope.n].group if scope.n is not None else scope.group
        mates = [n for n, t in enumerate(self.all) if t.group == group]
        if text == "G_{j}":
            return [n for n in mates if self.all[n].length > scope.tokens["j"][1]]
        return [n for n in mates if n != scope.n] if r"\setminus" in text else mates

    def places(self, sub: Row, scope: Scope) -> list[Scope]:
        """The places over which a statistic is taken."""
        text = source(sub)
        if text == "i":
            assert scope.n is not None
            return [scope.at("i", (scope.n, j)) for j in range(self.all[scope.n].length)]
        every = [scope.at("i", (n, j)) for n, t in enumerate(self.all) for j in range(t.length)]
        if text == "B,i":
            return [scope.of(n).at("i", (n, j)) for n, t in enumerate(self.all) for j in range(t.length)]
        if text.startswith("D"):
            (fenced,) = self.right[text]
            assert isinstance(fenced, Fenced)
            condition = fenced.body[fenced.body.index(Atom(":")) + 1 :]
            return [place for place in every if self.holds(condition, place)]
        return [scope.of(n) for n in self.members(sub, scope)]

    # functions

    def call(self, name: str, sub: Row, body: Row, scope: Scope) -> Any:
        if name in ("sg", "E"):
            return self.number(body, scope) if name == "sg" else self.sum(body, scope)
        if name in ("mean", "std", "second") or (name == "max" and sub):
            values = [self.number(body, place) for place in self.places(sub, scope)]
            return self.statistic(name, values)
        if name == "white":
            every = [
                self.number(body, Scope(n, t.group, {"j": (n, j)}))
                for n, t in enumerate(self.all)
                for j in range(t.length)
            ]
            mean = sum(every) / len(every)
            variance = sum((value - mean) ** 2 for value in every) / max(len(every) - 1, 1)
            return (self.number(body, scope) - mean) / (variance + 1e-8) ** 0.5
        if name == "quantile":
            value, share = _split(body)
            ordered = sorted(self.number(value, place) for place in self.places(sub, scope))
            place = float(self.number(share, scope)) * (len(ordered) - 1)
            low = int(place)
            return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])
        if name == "rank":
            every = [(n, j) for n, t in enumerate(self.all) for j in range(t.length)]
            values = {token: self.number(body, Scope(token[0], None, {"j": token})) for token in every}
            return 1 + sorted(every, key=lambda token: (-round(values[token], 12), token)).index(scope.tokens["j"])
        if name == "draw":
            every = [(n, j) for n, t in enumerate(self.all) for j in range(t.length)]
            drawn = {token: hashed(number) for number, token in enumerate(every, start=1)}
            meet = [token for token in every if self.holds(body, Scope(token[0], None, {"j": token}))]
            order = sorted(meet, key=drawn.__getitem__)
            return order.index(scope.tokens["j"]) + 1 if scope.tokens["j"] in order else float("inf")
        if name == "max" and Atom(":") in body:
            return self.largest(body, scope)
        arguments = _split(body)
        if name in ("min", "max", "clip"):
            numbers = [float(self.number(argument, scope)) for argument in arguments]
            wanted = {"min": min(numbers), "max": max(numbers), "clip": min(max(numbers[0], numbers[1]), numbers[-1])}
            return self.sum(arguments[numbers.index(wanted[name])], scope)
        if name == "sign":
            value = self.number(body, scope)
            return (value > 0) - (value < 0)
        if name == "sigma":
            return 1 / (1 + self.apply("exp", -self.sum(body, scope)))
        assert name == "exp", name
        return self.apply("exp", self.sum(body, scope))

    def statistic(self, name: str, values: list[float]) -> float:
        if name in ("max", "second"):
            return sorted(values)[-1 if name == "max" else -2]
        mean = sum(values) / len(values)
        if name == "mean":
            return mean
        divisor = len(values) - (self.numbers["sample"] if len(values) > 1 else 0)
        return (sum((value - mean) ** 2 for value in values) / divisor) ** 0.5

    def largest(self, body: Row, scope: Scope) -> float:
        """The largest number in [0, 1] for which a condition holds that holds up to it."""
        condition = body[body.index(Atom(":")) + 1 :]
        name = source(body[:1])

        def good(number: float) -> bool:
            return self.holds(condition, replace(scope, numbers={**scope.numbers, name: number}))

        low, high = 0.0, 1.0
        if good(1.0):
            return 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if good(middle) else (low, middle)
        return low

    def extreme(self, name: str, sub: Row, body: Row, scope: Scope) -> Any:
        """min over i < j."""
        assert name == "min"
        return self.sum(body, scope.at("i", self.smallest(sub, body, scope)))

    def extreme_token(self, row: Row, scope: Scope) -> Token:
        """The token of an argmin over i < j."""
        node = row[0]
        assert isinstance(node, Scripts)
        assert node.base == Word("operatorname", "argmin")
        return self.smallest(node.sub, row[1:], scope)

    def smallest(self, sub: Row, body: Row, scope: Scope) -> Token:
        assert source(sub) == "i<j"
        n, last = scope.tokens["j"]
        return min(((n, i) for i in range(last)), key=lambda token: self.number(body, scope.at("i", token)))

    def nabla(self, row: Row, scope: Scope) -> tuple[Any, int]:
        node = row[0]
        if node == Atom(r"\log"):
            assert isinstance(row[1], Scripts)
            assert row[1].base == Atom(r"\pi")
            n, j = self.token(source(row[1].sub), scope)
            return sympy.Symbol(f"h_{n}_{j}_{int(scope.numbers['v'])}"), 4
        assert isinstance(node, Scripts)
        assert node.base == Atom(r"\ell")
        return score(*self.token(source(node.sub), scope)), 2

    def apply(self, name: str, value: Any) -> Any:
        function = getattr(sympy, name)
        return function(value) if isinstance(value, sympy.Basic) else float(function(value))

    # conditions

    def number(self, row: Row, scope: Scope) -> float:
        """The value of a formula as a number."""
        before, self.symbolic = self.symbolic, False
        try:
            return self.sum(row, scope)
        finally:
            self.symbolic = before

    def holds(self, row: Row, scope: Scope) -> bool:
        if row == (Word("text", "otherwise"),):
            return True
        for sign, combine in ((r"\lor", any), (r"\land", all)):
            if Atom(sign) in row:
                return combine(self.holds(part, scope) for part in _split(row, (sign,)))
        if len(row) == 1 and isinstance(row[0], Fenced):
            return self.holds(row[0].body, scope)
        sides = [self.number(part, scope) for part in _split(row, tuple(_RELATIONS))]
        signs = [node.latex for node in row if isinstance(node, Atom) and node.latex in _RELATIONS]
        assert signs, row
        return all(_RELATIONS[sign](a, b) for sign, (a, b) in zip(signs, pairwise(sides), strict=True))


def logp(n: int, j: int) -> Any:
    """The symbol for ℓ of a token."""
    return sympy.Symbol(f"l_{n}_{j}", real=True)


def logit_symbol(n: int, j: int, v: int) -> Any:
    """The symbol for a logit."""
    return sympy.Symbol(f"z_{n}_{j}_{v}", real=True)


def score(n: int, j: int) -> Any:
    """The symbol for ∇ℓ of a token."""
    return sympy.Symbol(f"g_{n}_{j}")


def _split(row: Row, signs: tuple[str, ...] = (",",)) -> list[Row]:
    parts: list[list[Node]] = [[]]
    for node in row:
        if isinstance(node, Atom) and node.latex in signs:
            parts.append([])
        else:
            parts[-1].append(node)
    return [tuple(part) for part in parts]


def _label(node: Node) -> str:
    sup = node.sup if isinstance(node, Scripts) else ()
    return f"^{{{source(sup)}}}" if sup and isinstance(sup[0], Word) else ""


def _unscripted(node: Node | None) -> Node | None:
    return node.base if isinstance(node, Scripts) else node


def _is_spread(node: Node) -> bool:
    return isinstance(node, Scripts) and node.base == Word("operatorname", "std")


def _key(left: str) -> str:
    """The name of a left side, without the token's index."""
    if left.startswith(r"\mathbb{E}"):
        return "EL"
    (node,) = parse(left)
    if not isinstance(node, Scripts):
        return source((node,))
    if source(node.sub) != "j" or left.startswith("D_"):
        return source((node,))
    return source((node.base,)) + _label(node)
