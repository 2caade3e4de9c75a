"""Which line of a stored error says what went wrong."""

from __future__ import annotations


def explaining_line(text: str) -> str:
    """The line of a stored error that says what went wrong.

    That is the first line of the exception's message, below the frames of the last traceback; lines that follow belong
    to the same message. A text without a traceback is a message as a whole.
    """
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    begin = max((number for number, line in enumerate(lines) if line.startswith("Traceback")), default=-1) + 1
    message = (line.strip() for line in lines[begin:] if begin == 0 or not line.startswith(" "))
    return next(message, lines[-1].strip() if lines else "")
