"""Reading YAML that people wrote: safe, with numbers such as 1e-4, without duplicate keys or aliases."""

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
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _PlainLoader(_Loader):
    """Dates stay text; 1e-4 is a number, as in YAML 1.2."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag not in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9_]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf|\.nan)$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str, file: object) -> dict[str, Any]:
    """A YAML document that is a mapping.

    Raises:
        UserError: for invalid YAML, naming the line, and for anything but a mapping.
    """
    try:
        data = yaml.load(text, Loader=_PlainLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(f"{where}{error.problem or error.context}", file=file) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"not valid YAML: {str(error).splitlines()[0]}", file=file) from None
    if not isinstance(data, dict):
        raise UserError("not a mapping of keys to values", file=file, value=data)
    return data


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
