"""The versions of the libraries that cells were trained with, and whether they are the same for all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from klab.grid.libraries import LIBRARIES, TITLES

Software = Mapping[str, Mapping[str, int]]
"""Library -> version -> how many cells were trained with it."""

_ALWAYS = ("klab", "torch")
_LONGEST = 40


def encoded(result: Mapping[str, Any] | None) -> str:
    """The versions that a cell's result has, as text for a column of a frame."""
    found = (result or {}).get("versions")
    if not isinstance(found, Mapping):
        return ""
    kept = {str(name)[:_LONGEST]: str(version)[:_LONGEST] for name, version in found.items() if version is not None}
    return json.dumps(kept, sort_keys=True)


def software(column: Iterable[str]) -> Software:
    """What cells were trained with, from the column that `encoded` filled."""
    found: dict[str, Counter[str]] = {}
    for text, cells in Counter(text for text in column if isinstance(text, str) and text).items():
        for name, version in json.loads(text).items():
            found.setdefault(name, Counter())[version] += cells
    return found


def differences(used: Software) -> Iterator[str]:
    """A note for each library of which cells had different versions."""
    for name, versions in used.items():
        if len(versions) > 1:
            shown = ", ".join(f"{version}: {count} cells" for version, count in sorted(versions.items()))
            yield f"Cells were trained with different versions of {name} ({shown})."


def are_alike(manifests: Sequence[Mapping[str, Any]]) -> bool:
    """Whether runs were made with the same versions of whatever more than one of them recorded."""
    first: dict[str, object] = {}
    return all(first.setdefault(name, value) == value for each in manifests for name, value in each["versions"].items())


def words(used: Software, manifest: Mapping[str, Any], transformers: bool) -> str:
    """The libraries and their versions for a methods paragraph, those of the run itself where no cell has ended.

    Args:
        transformers: whether models of the library Transformers were trained.
    """
    known: dict[str, Sequence[str]] = {
        str(name): [str(version)] for name, version in manifest["versions"].items() if version is not None
    }
    known |= {name: sorted(versions) for name, versions in used.items()}
    names = [*_ALWAYS, *(["transformers"] if transformers else []), *LIBRARIES]
    each = [f"{TITLES.get(name, name)} {' and '.join(known[name])}" for name in names if name in known]
    return f"{', '.join(each[:-1])} and {each[-1]}" if len(each) > 1 else "".join(each)
