"""The reference of the grid file in Markdown, from the code: `python -m klab.grid.reference` rewrites grid/README.md.

What stands above the marker in the README is written by hand and left alone. Meanings of keys are the attribute
docstrings of the sections, defaults and ranges those of their fields.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from klab.grid.algorithms import algorithm_names, load_algorithm
from klab.grid.catalogue import AXES, PARAMETERS
from klab.grid.custom_values import SIGNATURES, SOLVER, VIEW, Signature
from klab.grid.glossary import GLOSSARY
from klab.grid.grid_file import KEYS
from klab.grid.parameters import TERMS
from klab.grid.schema.analysis import AnalysisPlan, Stop
from klab.grid.schema.base import Section
from klab.grid.schema.budget import Budget
from klab.grid.schema.claim import Claim
from klab.grid.schema.evaluate import Evaluations
from klab.grid.schema.kl_term import BetaControl, ReferencePolicy
from klab.grid.schema.notify import Notify
from klab.grid.schema.policy import POLICIES, Lora
from klab.grid.schema.sampler import Rejection, Sampler
from klab.grid.schema.sections import Launcher, Resources
from klab.grid.schema.task import TASKS, CustomTask, ReasoningPart, RewardTerm
from klab.grid.schema.training import (
    Critic,
    EntropyControl,
    StopBounds,
    StopRule,
    TrainingSection,
    TrlConfig,
    TrustRegion,
)
from klab.grid.sources import SOURCES

MARKER = "<!-- Everything below is written by `python -m klab.grid.reference`. -->"

_LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_TYPES = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false", "null": "null"}


def reference() -> str:
    """The generated part of grid/README.md."""
    parts = ["# Reference", "", *_table(("key", "meaning"), [(f"`{key}`", text) for key, text in KEYS.items()])]
    parts += ["", "## `objective`: axes and values", ""]
    for axis in AXES.values():
        parts += [f"### `{axis.name}`: {axis.title} {axis.symbol}", "", f"Default: `{axis.default}`.", ""]
        rows = [
            (f"`{value.name}`", value.formula, f"$`{value.latex}`$",
             ", ".join(f"`{name}`" for name in value.parameters), value.note, value.source)
            for value in axis.values.values()
        ]  # fmt: skip
        parts += [*_table(("value", "formula", "in print", "parameters", "note", "source"), rows), ""]
    parts += ["### Parameters of the values", ""]
    used = [(f"`{each.name}`", f"`{each.default}`", each.range, each.meaning) for each in PARAMETERS.values()]
    parts += [*_table(("parameter", "default", "values", "meaning"), used), ""]
    parts += [f"{' and '.join(f'`{name}`' for name in TERMS)} belong to the objective itself, beside every value.", ""]
    parts += ["### Values of your own", "", *_signatures()]
    parts += ["## Named algorithms", "", *_algorithms(), ""]
    parts += ["## `training`", "", *_section(TrainingSection), ""]
    nested: dict[str, type[Section]] = {
        "critic": Critic,
        "beta_control": BetaControl,
        "reference": ReferencePolicy,
        "trust_region": TrustRegion,
        "entropy_control": EntropyControl,
        "sampler": Sampler,
        "sampler.reject": Rejection,
        "stop": StopRule,
        "stop.unless": StopBounds,
        "trl": TrlConfig,
    }
    for key, model in nested.items():
        parts += [f"### `training.{key}`", "", *_section(model), ""]
    parts += ["## `policy`", ""]
    for name, model in POLICIES.items():
        parts += [f"### `policy: {{name: {name}}}`", "", *_section(model), ""]
    parts += ["### `policy.lora`", "", *_section(Lora), "", "## `task`", ""]
    for name, model in TASKS.items():
        parts += [f"### `task: {{name: {name}}}`", "", *_section(model), ""]
    parts += ["### `task.datasets`: one dataset of a composite", "", *_section(ReasoningPart), ""]
    parts += ["### A task of your own", "", *_section(CustomTask), ""]
    parts += ["### `task.reward`: one term", "", *_section(RewardTerm), ""]
    parts += ["## `resources`", "", *_section(Resources), ""]
    parts += ["### `resources.launcher`", "", *_section(Launcher), ""]
    parts += ["## `budget`", "", *_section(Budget), ""]
    parts += ["## `notify`", "", *_section(Notify), ""]
    parts += ["## `evaluate`", "", *_section(Evaluations), ""]
    parts += ["## `analysis`", "", *_section(AnalysisPlan), "", "### `analysis.stop`", "", *_section(Stop), ""]
    parts += ["## `claims`: one claim", "", *_section(Claim), ""]
    parts += ["## Symbols", ""]
    symbols = [(each.symbol, f"`{each.code}`" if each.code else "", each.shape, each.meaning) for each in GLOSSARY]
    parts += [*_table(("symbol", "in the code", "shape", "meaning"), symbols), "", "## Sources", ""]
    sources = [(each.label, each.authors, each.year, each.title, each.where) for each in SOURCES.values()]
    parts += _table(("cited as", "authors", "year", "title", "where"), sources)
    return "\n".join(parts) + "\n"


def attribute_docstrings(model: type[Section]) -> dict[str, str]:
    """The meaning of each field of a section: the string that follows it, also in a base class."""
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if not (issubclass(cls, Section) and cls is not Section):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[field.target.id] = inspect.cleandoc(str(text.value.value))
    return found


def _section(model: type[Section]) -> list[str]:
    schema = model.model_json_schema()
    meanings = attribute_docstrings(model)
    rows = []
    for name, field in schema["properties"].items():
        if name == "name" and "const" in field:
            continue
        default = "required" if name in schema.get("required", ()) else f"`{_plain(field.get('default', {}))}`"
        rows.append((f"`{name}`", default, _values(field), meanings.get(name, "").replace("\n", " ")))
    text = inspect.cleandoc(model.__doc__ or "").replace("``", "`")
    return [text, "", *_table(("key", "default", "values", "meaning"), rows)]


def _plain(default: Any) -> str:
    if isinstance(default, list):
        return "[" + ", ".join(map(_plain, default)) + "]"
    if isinstance(default, Mapping):
        given = {key: value for key, value in default.items() if value is not None}
        return "{" + ", ".join(f"{key}: {_plain(value)}" for key, value in given.items()) + "}"
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return str(default).replace("\n", "\\n")


def _values(field: Mapping[str, Any]) -> str:
    """The valid values of a field in words, from its JSON schema."""
    if "anyOf" in field:
        return " or ".join(_values(option) for option in field["anyOf"])
    if "enum" in field:
        return " | ".join(f"`{choice}`" for choice in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "$ref" in field:
        return "section"
    if field.get("type") == "array":
        return f"list of {_values(field['items'])}" if "$ref" not in field["items"] else "terms"
    if field.get("type") == "object":
        return "mapping"
    limits = [f"{sign} {field[limit]:g}" for limit, sign in _LIMITS.items() if limit in field]
    return " ".join((_TYPES[field["type"]], " and ".join(limits))).strip()


def _signatures() -> Iterable[str]:
    """How the user's own values are called; what most of them may ask for stands in one table at the end."""
    for axis, signature in SIGNATURES.items():
        yield from _signature(axis, signature)
    yield (
        "A weight whose parameters depend on the whole update has an attribute `solver`, a function that is called "
        "once per update; parameters of the grid file go to whichever of the two has them."
    )
    yield ""
    yield from _signature("solver", SOLVER)
    yield (
        "What a function may ask for by the names of its parameters, on each axis but for what it is called with "
        "anyway and what is not known yet:"
    )
    yield ""
    yield from _table(("name", "what it is"), [(f"`{name}`", text) for name, text in VIEW.items()])
    yield ""


def _signature(axis: str, signature: Signature) -> Iterable[str]:
    yield f"`{signature.call(axis)}`"
    yield ""
    rows = [(f"`{name}`", text) for name, text in signature.inputs.items()]
    yield from (*_table(("input", "what it is"), rows), "") if rows else ()
    yield from ("```python", *signature.example.splitlines(), "```", "", "```yaml", signature.written, "```", "")


def _algorithms() -> list[str]:
    rows = []
    for name in algorithm_names():
        algorithm = load_algorithm(name)
        settings = {**algorithm.objective, **{f"training.{key}": value for key, value in algorithm.training.items()}}
        written = ", ".join(f"{key}: {_plain(value)}" for key, value in settings.items())
        notes = "; ".join(filter(None, (algorithm.constants, algorithm.note)))
        rows.append((f"`{name}`", algorithm.title, algorithm.source, f"`{written}`", notes))
    return _table(("name", "title", "source", "settings", "constants and notes"), rows)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def main() -> None:
    """Rewrite the generated part of grid/README.md."""
    file = Path(__file__).with_name("README.md")
    written, marker, _ = file.read_text().partition(MARKER)
    assert marker, f"{file} has no line {MARKER}"
    file.write_text(f"{written}{MARKER}\n\n{reference()}")


if __name__ == "__main__":
    main()
