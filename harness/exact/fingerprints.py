"""Fingerprints of objectives, i.e. summaries of their gradients on the probe updates, with a cache on disk.

The cache is keyed by canonical form and version of the code, so that a second `klab plan` needs neither torch nor time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path

from klab.grid import Objective
from klab.harness.store.machine import cache_folder

Fingerprints = dict[tuple[str, bool], list[float]]
"""Fingerprints by canonical form and schedule."""

_LINES_AT_ONCE = 500
_CHUNK = 50
_BEFORE_MARK = ", ["
"""What separates the key of a line from its numbers; no canonical form contains it."""

Progress = Callable[[int, int], None]
"""Called with (fingerprints computed so far, fingerprints to compute)."""


def fingerprints(
    objectives: Mapping[tuple[str, bool], Objective],
    *,
    cache: Path | None = None,
    known: Fingerprints | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> Fingerprints:
    """The fingerprint of each objective under its schedule, from the cache or computed and added to it.

    The user's own functions are computed every time: their code is not part of the cache's version.

    Args:
        objectives: by canonical form and schedule.
        cache: the folder; `cache_folder()` when None.
        known: what `known_fingerprints` found there, to save reading it again.
        workers: processes that compute; with more than one, the numbers are the same.
        progress: called while fingerprints are computed.
    """
    file = _cache_file(cache)
    found = dict(_read(file, objectives) if known is None else known)
    missing = {key: objective for key, objective in objectives.items() if key not in found}
    if not missing:
        return found

    lines: list[str] = []
    for done, (key, mark) in enumerate(_computed(missing, workers), start=1):
        canonical, on_policy = key
        found[key] = mark
        if not objectives[key].is_custom:
            lines.append(json.dumps([canonical, on_policy, found[key]]))
        if progress is not None:
            progress(done, len(missing))
        if len(lines) == _LINES_AT_ONCE:
            _append(file, lines)
            lines.clear()
    _append(file, lines)
    return found


def _computed(
    missing: Mapping[tuple[str, bool], Objective], workers: int
) -> Iterator[tuple[tuple[str, bool], list[float]]]:
    from klab.harness.exact.probes import fingerprint

    schedules = [on_policy for _, on_policy in missing]
    if workers <= 1:
        yield from zip(missing, map(fingerprint, missing.values(), schedules), strict=True)
        return
    import torch

    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        yield from zip(missing, pool.map(fingerprint, missing.values(), schedules, chunksize=_CHUNK), strict=True)


def known_fingerprints(keys: Collection[tuple[str, bool]], *, cache: Path | None = None) -> Fingerprints:
    """The fingerprints that the cache has of these keys (needs no torch)."""
    return _read(_cache_file(cache), keys)


def code_version() -> str:
    """Hash of the sources that decide a fingerprint: the objective, the probes, and the version of torch."""
    here = Path(__file__).resolve().parent
    sources = [*sorted((here.parent / "objective").glob("*.py")), here / "probes.py", here / "estimators.py"]
    digest = hashlib.sha256(metadata.version("torch").encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _cache_file(cache: Path | None) -> Path:
    return (cache or cache_folder()) / "fingerprints" / f"{code_version()}.jsonl"


def _read(file: Path, wanted: Collection[tuple[str, bool]]) -> Fingerprints:
    """Those of the wanted fingerprints that are known; lines of others are passed over unparsed."""
    if not file.exists():
        return {}
    heads = {_head(canonical, on_policy) for canonical, on_policy in wanted}
    known: Fingerprints = {}
    for line in file.read_text().split("\n"):
        if line.partition(_BEFORE_MARK)[0] not in heads:
            continue
        try:
            canonical, on_policy, mark = json.loads(line)
        except ValueError:  # a line torn by a crash
            continue
        known[canonical, on_policy] = mark
    return known


def _head(canonical: str, on_policy: bool) -> str:
    """How the line of a fingerprint begins."""
    return json.dumps([canonical, on_policy])[:-1]


def _append(file: Path, lines: Sequence[str]) -> None:
    """Add lines in one write; a cache that cannot be written only costs time."""
    if not lines:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as stream:
            stream.write("\n" + "\n".join(lines) + "\n")
    except OSError:
        return
