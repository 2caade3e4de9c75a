"""Telling somebody of a study's events: its end, and cells that failed, diverged or ended (`notify` in a grid file).

Every event is told by whichever process sees it first, and once: a lock in the run folder, then a marker there with how
it went. A process that is killed between telling and marking tells a second time; one that is killed before lets
another one tell.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klab.grid import UserError
from klab.grid.schema.notify import Notify
from klab.harness.dispatch.tuning import pending
from klab.harness.store import Lock, LockHeld, Run, Snapshot, files, scan
from klab.harness.store.error_text import explaining_line

FOLDER = "notifications"
"""Of a run folder: a marker for every event that was told."""

TRIES = 3
"""How often the web is asked, and a command that could not be started."""

_PAUSE_SECONDS = 1.0
_PLACEHOLDER = re.compile(r"\{(text|event|run|cell)\}")


@dataclass(frozen=True)
class Message:
    """An event to tell of.

    Attributes:
        event: as the section `notify` names it.
        key: differs for every event of a run, and is the same for all processes that see it.
        record: what is told.
    """

    event: str
    key: str
    record: Mapping[str, Any]


def tell_of_cells(run: Run, cells: Iterable[str]) -> None:
    """Tell of those of the cells that have ended, if the run asks for that and nobody has told it; never raises."""
    wanted = _wanted(run)
    if wanted is None:
        return
    for identity in cells:
        try:
            message = _of_cell(run, identity)
        except (UserError, OSError):
            continue
        if message is not None:
            events = {message.event, "cell"} & set(wanted.on)
            if events:
                _tell(run, wanted, message)


def tell_of_end(run: Run) -> None:
    """Tell that the study has ended, if it has: no cell waits, runs or may be launched by itself; never raises."""
    wanted = _wanted(run)
    if wanted is None or "end" not in wanted.on:
        return
    try:
        message = _of_study(run)
    except (UserError, OSError):
        return
    if message is not None:
        _tell(run, wanted, message)


def _wanted(run: Run) -> Notify | None:
    try:
        return run.notify
    except UserError as error:
        _say(str(error))
        return None


def _of_cell(run: Run, identity: str) -> Message | None:
    """What to tell of a cell; None where it has not ended, or was cancelled."""
    folder = run.cell(identity)
    result, error = folder.result(), folder.error()
    if result is None and error is None:
        return None
    attempt = sum(event["event"] == "started" for event in folder.attempts())
    if result is not None:
        state, reason, update = str(result["state"]), str(result.get("reason") or ""), result.get("updates")
        event = "divergence" if state == "diverged" else "cell"
        reward = result.get("reward_final")
    else:
        state, reason, event, reward = "failed", explaining_line(error or ""), "failure", None
        update = (folder.last_metrics() or {}).get("update", 0)
    text = f"{run.name}: {identity} {state}" + (f": {reason}" if reason else "")
    more = {"cell": identity, "state": state, "reason": reason, "update": update, "reward": reward}
    return Message(event, f"{identity} {state} {attempt}", _record(run, event, text, more))


def _of_study(run: Run) -> Message | None:
    run.refresh()
    if pending(run):
        return None
    states = {identity: _ended(snapshot) for identity, snapshot in scan(run).items()}
    if any(state is None for state in states.values()):
        return None
    counts: dict[str, int] = {}
    for state in states.values():
        word = str(state).split()[0]
        counts[word] = counts.get(word, 0) + 1
    shown = ", ".join(f"{number} {word}" for word, number in sorted(counts.items()))
    text = f"{run.name} has ended: {shown}"
    return Message("end", json.dumps(states, sort_keys=True), _record(run, "end", text, {"states": counts}))


def _ended(snapshot: Snapshot) -> str | None:
    """How a cell ended, other words every time that it does; None where it has not."""
    if snapshot.alive:
        return None
    if snapshot.result is not None:
        return str(snapshot.result["state"])
    at = (snapshot.event or {}).get("at")
    if snapshot.cancelled:
        return f"cancelled {at}"
    if snapshot.held:
        return f"held {at}"
    return f"failed {at}" if snapshot.failed or snapshot.problem is not None else None


def _record(run: Run, event: str, text: str, more: Mapping[str, Any]) -> dict[str, Any]:
    return {"schema": files.SCHEMA, "event": event, "run": run.name, "text": text, "at": time.time(), **more}


def _tell(run: Run, wanted: Notify, message: Message) -> None:
    """Tell once, whoever else wants to."""
    name = hashlib.sha256(f"{message.event} {message.key}".encode()).hexdigest()[:24]
    try:
        folder = run.output_folder(FOLDER)
        marker = folder / f"{name}.json"
        if marker.exists():
            return
        folder.mkdir(exist_ok=True)
        with Lock(folder / name, purpose="telling of an event"):
            if marker.exists():
                return
            problems = _send(wanted, message.record)
            record = {"event": message.event, "text": message.record["text"], "at": time.time(), "problems": problems}
            files.replace(marker, files.encode_record(record))
    except LockHeld:
        return
    except (OSError, UserError) as error:
        _say(str(error))


def _send(wanted: Notify, record: Mapping[str, Any]) -> list[str]:
    """Tell everybody; what went wrong, without any secret."""
    body = json.dumps(record).encode()
    problems = []
    if wanted.command:
        problems += _run(wanted, record, body)
    if wanted.webhook is not None:
        problems += _post(wanted, body)
    for problem in problems:
        _say(problem)
    return problems


def _run(wanted: Notify, record: Mapping[str, Any], body: bytes) -> list[str]:
    words = [_filled(word, record) for word in wanted.command]
    try:
        done = subprocess.run(
            words,
            input=body,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=wanted.seconds,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        return [f"notify.command: {words[0]} took more than {wanted.seconds:g} s, and was ended"]
    except OSError as error:
        return [f"notify.command: {words[0]}: {error.strerror}"]
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return [f"notify.command: {words[0]} ended with code {done.returncode}{''.join(f': {line}' for line in said)}"]
    return []


def _filled(word: str, record: Mapping[str, Any]) -> str:
    """A word of the command with what its placeholders stand for."""
    return _PLACEHOLDER.sub(lambda found: str(record.get(found[1], "")).replace("\0", " "), word)


def _post(wanted: Notify, body: bytes) -> list[str]:
    """Ask the web, which may be away for a moment; the address is never part of what is said."""
    address = os.environ.get(wanted.variable or "", "")
    if not address.startswith(("http://", "https://")):
        what = "is not set" if not address else "holds no http:// or https:// address"
        return [f"notify.webhook: the environment variable {wanted.variable} {what} where this job runs"]
    problem = ""
    for number in range(TRIES):
        if number:
            time.sleep(_PAUSE_SECONDS)
        try:
            request = urllib.request.Request(address, body, {"Content-Type": "application/json"}, method="POST")
            with urllib.request.urlopen(request, timeout=wanted.seconds) as answer:
                answer.read(1)
            return []
        except urllib.error.HTTPError as error:
            problem = f"answered {error.code}"
            if error.code < 500:
                break
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            problem = reason.strerror or type(reason).__name__ if isinstance(reason, OSError) else type(reason).__name__
    return [f"notify.webhook: {wanted.webhook} {problem}"]


def _say(problem: str) -> None:
    print(f"klab: {problem}", file=sys.stderr, flush=True)


def markers(run: Run) -> list[Path]:
    """Of every event that was told, the file that says how it went."""
    return sorted(run.output_folder(FOLDER).glob("*.json"))
