"""From a matplotlib figure to an SVG element that lives inside the page: themed, with tooltips, without clashes of
ids.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree

from klab.reports.figures.style import INK, MUTED, PAPER, RULE, SERIES, Drawing, styled

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper"} | {
    color: f"s{position}" for position, color in enumerate(SERIES, 1)
}
_FOCUSABLE = 80
"""Figures with more tooltips than this are not walked by the keyboard; the table says the same."""

_REFERENCE = re.compile(r"url\(#([^)]+)\)")


def svg_text(drawing: Drawing) -> str:
    """The figure as an SVG document in the colours of print."""
    buffer = io.StringIO()
    with styled():
        drawing.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return buffer.getvalue()


def inline_svg(drawing: Drawing, text: str) -> str:
    """`text`, from `svg_text`, as an `<svg>` element of the page; every id begins with the drawing's name."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(re.sub(r"<!DOCTYPE[^>]*>", "", text))
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    used = _referenced(root)
    focusable = len(drawing.tips) <= _FOCUSABLE
    for element in root.iter():
        identity = element.get("id")
        if identity in drawing.tips:
            element.insert(0, _title(drawing.tips[identity]))
            element.set("class", "tip")
            if focusable:
                element.set("tabindex", "0")
                element.set("role", "img")
                element.set("aria-label", drawing.tips[identity])
        if identity is not None:
            if identity in used:
                element.set("id", f"{drawing.name}-{identity}")
            else:
                del element.attrib["id"]
        for key, value in list(element.attrib.items()):
            element.set(key, _rewritten(key, value, drawing.name))
    root.attrib.pop("width", None)
    root.attrib.pop("height", None)
    root.set("role", "group" if focusable and drawing.tips else "img")
    root.set("aria-label", drawing.alt)
    root.set("id", f"figure-{drawing.name}")
    return ElementTree.tostring(root, encoding="unicode")


def _title(text: str) -> ElementTree.Element:
    element = ElementTree.Element(f"{{{_SVG}}}title")
    element.text = text
    return element


def _referenced(root: ElementTree.Element) -> set[str]:
    found: set[str] = set()
    for element in root.iter():
        for key, value in element.attrib.items():
            if key.endswith("href") and value.startswith("#"):
                found.add(value[1:])
            found.update(_REFERENCE.findall(value))
    return found


def _rewritten(key: str, value: str, name: str) -> str:
    if key.endswith("href") and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    value = _REFERENCE.sub(rf"url(#{name}-\1)", value)
    if key == "style":
        for color, variable in _VARIABLES.items():
            value = value.replace(color, f"var(--{variable})")
        value = re.sub(r"'DejaVu Sans'[^;]*", "inherit", value)
    return value
