r"""Final answers: where a solution marks its answer.

Marks are GSM8K's `#### n` and the `\boxed{…}` of MATH; the last one that holds an answer counts. `####` is a heading of
Markdown as well, so a line of words after it (`#### Explanation`) is an answer only where nothing else is marked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from klab.tasks.numerals import LONGEST_TEXT, numeral

Kind = Literal["words", "text", "box"]

_SPECIAL = re.compile(r"<[|｜][^<>|｜\n]{1,40}[|｜]>|</?s>|<(?:eos|bos|pad|end_of_turn|start_of_turn)>")
_HASHES = re.compile(r"#{4,}((?:(?!####)[^\n])*)")
_EMPHASIS = re.compile(
    r"(?<![\w)*])(?P<mark>\*{1,3}|`)(?=[^\s*`])(?P<inner>[^*`]+)(?P=mark)(?![\w(*])|^[*_`]+\s|[*_`]+$|</?[A-Za-z][^<>\n]{0,40}>"
)
_LABEL = re.compile(
    r"(?:(?:so|thus|therefore|hence|and|the|my|our|your|this|final|correct|right|numerical|overall)\b[\s,]*){0,6}"
    r"\b(?:answers?|results?|ans)\b\**\s*(?:to (?:the|this|your) (?:question|problem)\s*)?"
    r"(?P<stated>(?:is|are|was|equals|[:=])?[\s:=*]*)",
    re.IGNORECASE,
)
_PHRASE = re.compile(r"[^\d\\$=:\n]{1,120}?(?:\b(?:is|are|was|were|equals|gives|makes)\b|[:=])[\s:*=]*", re.IGNORECASE)
_SECTION = re.compile(
    r"(?:steps?|parts?|cases?|sections?|methods?|approach(?:es)?|phases?|stages?|problems?|questions?|tasks?|examples?|"
    r"scenarios?|exercises?|proofs?|explanations?|reasoning|verif\w*|check\w*|notes?|calculat\w*|comput\w*|given|analysis|"
    r"summary|conclusions?|solutions?|introduction|background|details|understand\w*|set-?up|remarks?|justification|derivation|"
    r"work(?:ing)?s?|overview|discussion|thoughts?|thinking|references?|hints?|double[- ]check\w*)\b",
    re.IGNORECASE,
)
_CONCLUDING = re.compile(r"(?:conclusions?|summary|solutions?)\b[^\d\n]*[:=]", re.IGNORECASE)
_NUMBERED = re.compile(r"\(?\d{1,2}[.):]\s+\**[A-Z][a-z]")
_CONCLUDES = re.compile(r"final answer\b[^\n]{0,100}?\bis\b[\s:*]*(?!\\f?box|\$+\\f?box)[-+$€£\\(\[\d.]", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]{3,}")
_MATHEMATICAL = re.compile(r"\\[A-Za-z]+|[=$]")
_BOX = re.compile(r"\\f?box(?:ed)?(?![A-Za-z])\s*")
_SHORT_BOX = re.compile(r"\\[A-Za-z]+(?:\{[^{}]*\})*|[^\s{}$\\.,;]+")
_DELIMITERS = re.compile(r"\\[()\[\],;:! ]|\\q?quad(?![A-Za-z])|\\(?:text\w*|math\w+|mbox)\s*\{([^{}]*)\}|[$*&~]")
_AND = re.compile(r"\b(?:and|or)\b|[,;]", re.IGNORECASE)
_SENTENCE = re.compile(r"[.?!](?:\s|$)|\n\s*\n")
_REPLACES = re.compile(
    r"\b(?:but|no|not|nope|wait|hmm|actually|rather|instead|sorry|oops|correct\w*|wrong\w*|incorrect\w*|mistak\w*|error|"
    r"check\w*|again|must|should|better|revis\w*|chang\w*|fix\w*|updat\w*|simplif\w*|reduc\w*|so|thus|hence|therefore|"
    r"then|which|that|where|i\.?e|equal\w*|approx\w*|finally|final)\b|→|⇒|=>|\\(?:long)?(?:right|Right|left|Left)+arrow|"
    r"\\(?:implies|to|approx|neq?|ne|iff|therefore)(?![A-Za-z])|^\s*(?:=|≈|~)",
    re.IGNORECASE,
)
LONGEST_JOIN = 70
"""Most characters between two boxes that belong together (as in latex2sympy2_extended)."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A marked answer.

    Attributes:
        text: what is marked, without the mark; several boxes that belong together with `, ` between them.
        kind: how: in a box, after `####`, or after `####` in words that may be a heading.
        end: where the mark ends, in the text without special tokens.
    """

    text: str
    kind: Kind
    end: int = 0


def final_answer(text: str) -> str | None:
    r"""The text of the last `#### …` or `\boxed{…}` that has one; None without one.

    Of `#### 18 dollars` or `#### **18**` the number is taken.

    >>> final_answer("6 * 7 = 42\n#### 42")
    '42'
    """
    answer = marked_answer(text)
    return None if answer is None else answer.text


def marked_answer(text: str) -> Answer | None:
    """The last mark that holds an answer, with how it was marked; None without one."""
    text = without_special_tokens(text)
    marks: list[tuple[int, Answer]] = []
    for match in _HASHES.finditer(text):
        answer = _stated(match.group(1), text[match.end() :])
        if answer is not None:
            marks.append((match.start(), replace(answer, end=match.end())))
    marks += _boxes(text)
    marks.sort(key=lambda mark: (mark[1].kind != "words", mark[0]))
    return marks[-1][1] if marks else None


def conclusion(text: str, answer: Answer) -> str | None:
    """What follows a marked answer, where it states another: `The final answer is $10,455$. I hope it is correct.`"""
    tail = text[answer.end :]
    return tail if _CONCLUDES.search(tail) else None


def without_special_tokens(text: str) -> str:
    """The text without a tokenizer's special tokens, such as `<|im_end|>`."""
    return _SPECIAL.sub("", text)


def _stated(line: str, following: str) -> Answer | None:
    """What a line after `####` states, if anything."""
    content = _bare(line)
    if _BOX.search(content):
        return None  # a mark of its own
    label = _LABEL.match(content, 0, LONGEST_TEXT)
    if label:
        content = _bare(content[label.end() :])
        if not content:  # `#### Final answer` over the answer
            below = following.lstrip().partition("\n")[0]
            content = "" if below.startswith("#") or _BOX.search(below) else _bare(below)
            return Answer(_shortened(content), "text") if _mathematical(content) else None
    elif not content or (_SECTION.match(content) and not _CONCLUDING.match(content)):
        return None
    elif _NUMBERED.match(content) and following.strip():
        return Answer(_shortened(content), "words")  # `#### 2. Check` over a text
    phrase = _PHRASE.match(content)
    if phrase and numeral(content[phrase.end() :]) and not numeral(content):
        content = content[phrase.end() :]
    certain = _mathematical(content) or (label is not None and bool(label["stated"].strip(" *")))
    return Answer(_shortened(content), "text" if certain else "words")


def _bare(line: str) -> str:
    """A line without emphasis and tags, and without an exclamation mark at its end."""
    line = line.strip()
    before, head = None, line[:LONGEST_TEXT]
    while head != before:
        before, head = head, _EMPHASIS.sub(lambda match: match["inner"] or "", head).strip()
    return (head + line[LONGEST_TEXT:]).rstrip("!")


def _mathematical(content: str) -> bool:
    """Whether it is a number or an expression rather than words."""
    if not content:
        return False
    return bool(numeral(content) or _MATHEMATICAL.search(content) or not _WORD.search(content))


def _shortened(content: str) -> str:
    """Of a number with words behind it, the number."""
    found = numeral(content)
    return content if found is None else found.text


def _boxes(text: str) -> list[tuple[int, Answer]]:
    """The answers in boxes, each where its last box begins; boxes that belong together are one."""
    groups: list[list[tuple[int, int, str]]] = []
    for start, end, content in _each_box(text):
        if not content:
            continue
        if groups and _belong_together(text[groups[-1][-1][1] : start]):
            if content != groups[-1][-1][2]:
                groups[-1].append((start, end, content))
            else:
                groups[-1][-1] = (start, end, content)
        else:
            groups.append([(start, end, content)])
    return [(group[-1][0], Answer(", ".join(each[2] for each in group), "box", group[-1][1])) for group in groups]


def _each_box(text: str) -> list[tuple[int, int, str]]:
    """Beginning, end and content of every outermost box that is closed."""
    found: list[tuple[int, int, str]] = []
    closing = _braces(text)
    for match in _BOX.finditer(text):
        opening = match.end()
        if found and match.start() < found[-1][1]:
            continue
        if opening in closing:
            found.append((match.start(), closing[opening] + 1, text[opening + 1 : closing[opening]].strip()))
        elif short := _SHORT_BOX.match(text, opening):  # \boxed 3, \boxed\frac{1}{2}
            found.append((match.start(), short.end(), short.group()))
    return found


def _braces(text: str) -> dict[int, int]:
    """Where each brace closes that is closed."""
    opened: list[int] = []
    closing: dict[int, int] = {}
    for match in re.finditer(r"[{}]", text):
        if match.group() == "{":
            opened.append(match.start())
        elif opened:
            closing[opened.pop()] = match.start()
    return closing


def _belong_together(between: str) -> bool:
    r"""Whether two boxes with this text between them are one answer: `\boxed{1} and \boxed{2}`, `\boxed{1}, \boxed{2}`.

    As in latex2sympy2_extended (mode "last"), but a box that corrects, concludes or restates an earlier one replaces
    it.
    """
    words = _DELIMITERS.sub(lambda match: f" {match.group(1) or ''} ", between)
    if len(between) > LONGEST_JOIN or _REPLACES.search(words) or _SENTENCE.search(words.strip(" ")):
        return False
    return bool(_AND.search(words)) or not re.search(r"[A-Za-z]{2}", words)
