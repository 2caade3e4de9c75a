"""Citations and symbols: every one that a text uses is explained in one table, and nothing in the tables is unused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from klab.grid.algorithms import algorithm_names, load_algorithm
from klab.grid.catalogue import AXES, PARAMETERS
from klab.grid.glossary import GLOSSARY
from klab.grid.sources import SOURCES, cited
from klab.harness.claims.book import book

ROOT = Path(__file__).parents[2]
TEXTS = [
    *(path.read_text() for path in (ROOT / "grid").rglob("*.py") if path.name != "sources.py"),
    *(path.read_text() for path in (ROOT / "grid/algorithms").glob("*.yaml")),
    *(path.read_text() for path in (ROOT / "harness").rglob("*.py")),
]
AUTHOR_YEAR = re.compile(r"[A-Z][\w-]+(?: & [A-Z][\w-]+| et al\.| Team)? (?:19|20)\d\d[a-z]?\b")


def test_labels_are_unique_and_in_alphabetical_order() -> None:
    labels = [label.lower() for label in SOURCES]
    assert labels == sorted(labels)
    assert not any(one != other and one in other for one in SOURCES for other in SOURCES)


@pytest.mark.parametrize("axis", AXES)
def test_every_source_of_an_axis_value_is_in_the_table(axis: str) -> None:
    for value in AXES[axis].values.values():
        for citation in filter(None, value.source.split("; ")):
            assert cited(citation), f"{axis} {value.name}: {citation}"


def test_every_algorithm_cites_a_source_of_the_table() -> None:
    for name in algorithm_names():
        for citation in load_algorithm(name).source.split("; "):
            assert cited(citation), f"{name}: {citation}"


def test_every_claim_cites_a_source_of_the_table_or_the_book_itself() -> None:
    for claim in book().values():
        for citation in claim.source.split("; "):
            assert cited(citation) or "this book" in citation, f"{claim.id}: {citation}"


@pytest.mark.parametrize("label", SOURCES)
def test_every_source_is_cited(label: str) -> None:
    assert any(label in text for text in TEXTS)


def test_authors_and_years_in_formulas_parameters_and_docstrings_are_those_of_the_table() -> None:
    unknown = {
        found for text in TEXTS for found in AUTHOR_YEAR.findall(text) if not any(found in label for label in SOURCES)
    }
    assert not unknown


def test_every_greek_letter_of_a_formula_is_a_symbol_of_the_glossary_or_a_parameter() -> None:
    explained = "".join(symbol.symbol for symbol in GLOSSARY) + "".join(each.meaning for each in PARAMETERS.values())
    formulas = "".join(value.formula for axis in AXES.values() for value in axis.values.values())
    letters = {letter for letter in formulas if "α" <= letter <= "ω"} | {"ℓ", "∇"}
    assert letters - {"τ"} <= set(explained)
    assert "τ_pos" in formulas
    assert "tau_pos" in PARAMETERS
