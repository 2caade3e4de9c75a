"""YAML with the scalar rules of version 1.2: only `true` and `false` are booleans, and numbers are decimal.

PyYAML follows YAML 1.1, in which `yes` and `on` are booleans, `010` is eight and `1:30:00` is 5,400. Here the scalars
of the core schema (YAML 1.2.2, section 10.3.2) are read as that schema says and everything else is text; a whole
number with leading zeros, which the two versions read differently, is refused. So are duplicate keys and aliases.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from klab.grid.errors import UserError

LARGEST = 4 * 1024 * 1024
_DEEPEST = 24


def _mark(loader: Any) -> Any:
    return loader.peek_event().start_mark


class _Loader(yaml.SafeLoader):
    """Safe loader that refuses duplicate keys, aliases and very deep documents."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not supported", _mark(self))
        self.depth += 1
        if self.depth > _DEEPEST:
            raise yaml.constructor.ConstructorError(None, None, "nested too deeply", _mark(self))
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is not a word", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _CoreSchemaLoader(_Loader):
    """Scalars of the core schema of YAML 1.2.2, section 10.3.2."""

    yaml_implicit_resolvers = {}  # noqa: RUF012

    def construct_yaml_int(self, node: Any) -> int:
        written = str(self.construct_scalar(node))
        if _LEADING_ZEROS.fullmatch(written):
            problem = f"{written} has leading zeros: write it without them, or in quotes if it is text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return int(written, {"0o": 8, "0x": 16}.get(written[:2], 10))

    def construct_yaml_float(self, node: Any) -> float:
        written = str(self.construct_scalar(node)).lower()
        return float(written.replace(".inf", "inf").replace(".nan", "nan"))


_LEADING_ZEROS = re.compile(r"[-+]?0[0-9]+")
_CORE_SCHEMA = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
)
for _tag, _pattern, _first in _CORE_SCHEMA:
    _CoreSchemaLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), ["" if c == "\0" else c for c in _first]
    )
_CoreSchemaLoader.add_constructor("tag:yaml.org,2002:int", _CoreSchemaLoader.construct_yaml_int)
_CoreSchemaLoader.add_constructor("tag:yaml.org,2002:float", _CoreSchemaLoader.construct_yaml_float)


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes that YAML 1.1 or YAML 1.2 would read as something else."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, ()),
            *_CoreSchemaLoader.yaml_implicit_resolvers.get(first, ()),
        ]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_CoreSchemaLoader.yaml_implicit_resolvers}
    }


def dump_yaml(data: Any, *, sort_keys: bool = False) -> str:
    """YAML text of plain data, which `parse_yaml` reads back as it was."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=sort_keys, allow_unicode=True)


def parse_yaml(text: str, file: object) -> dict[str, Any]:
    """A YAML document that is a mapping.

    Raises:
        UserError: for invalid YAML, naming the line, and for anything but a mapping.
    """
    data = parse_value(text, file)
    if not isinstance(data, dict):
        raise UserError("not a mapping of keys to values", file=file, value=data)
    return data


def parse_value(text: str, file: object = None) -> Any:
    """What a YAML document or a single scalar means, for example the value of a `--set` flag.

    Raises:
        UserError: for invalid YAML, naming the line.
    """
    try:
        return yaml.load(text, Loader=_CoreSchemaLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(f"{where}{error.problem or error.context}", file=file) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"not valid YAML: {str(error).splitlines()[0]}", file=file) from None


def read_text(path: Path) -> str:
    """The text of a user's file.

    Raises:
        UserError: when it is missing, unreadable, not text, or larger than 4 MB.
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read(LARGEST + 1)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", file=path) from None
    if len(raw) > LARGEST:
        raise UserError("larger than 4 MB", file=path)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError("not a text file in UTF-8", file=path) from None
