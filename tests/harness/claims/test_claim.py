"""A verdict follows from the checks, and a number agrees with print to half a unit in its last place."""

from __future__ import annotations

import json

import pytest

from klab.grid import UserError
from klab.harness.claims.book import book, examine, markdown, records, selected, subject
from klab.harness.claims.claim import Check, Evidence, Number, Verdict, claim, verdict_of


@pytest.mark.parametrize(
    ("checks", "conditional", "verdict"),
    [
        ([], False, Verdict.UNDECIDED),
        ([(True, False)], False, Verdict.HOLDS),
        ([(True, False), (False, False)], False, Verdict.FAILS),
        ([(False, False), (True, True)], False, Verdict.OVERCLAIMED),
        ([(False, False), (True, True)], True, Verdict.CONDITION),
        ([(False, False), (True, True), (False, True)], True, Verdict.FAILS),
        ([(True, False), (False, True)], False, Verdict.HOLDS),
    ],
)
def test_the_verdict_follows_from_the_checks(
    checks: list[tuple[bool, bool]], conditional: bool, verdict: Verdict
) -> None:
    assert verdict_of([Check("it", holds, restricted) for holds, restricted in checks], conditional) == verdict


@pytest.mark.parametrize(
    ("value", "printed", "agrees"),
    [
        (1.41774, "1.4177", True),
        (1.41776, "1.4177", False),
        (5.555e-11, "5.6e-11", True),
        (0.55132, "0.5514", False),
        (20.4, "20", True),
        (float("nan"), "1", False),
    ],
)
def test_a_number_agrees_to_half_a_unit_in_the_last_printed_place(value: float, printed: str, agrees: bool) -> None:
    assert Number("it", value, printed).agrees is agrees


def test_a_number_that_nobody_printed_neither_agrees_nor_differs() -> None:
    assert Number("it", 1.0).agrees is None


def test_every_claim_says_who_claims_what_and_has_a_subject() -> None:
    every = book()
    assert len(every) > 60
    assert list(every) == sorted(every)
    for one in every.values():
        assert one.source
        assert one.statement.endswith((".", "?")), one.id
        assert subject(one)


def test_an_id_selects_the_claim_and_its_parts_whatever_the_case() -> None:
    assert [one.id for one in selected(["c13"])] == ["C13", "C13b"]
    assert [one.id for one in selected(["C13b"])] == ["C13b"]
    assert [one.id for one in selected(["C3d", "C01"])] == ["C01", "C3D", "C3Db", "C3Dc"]


def test_an_unknown_id_is_the_users_mistake_and_names_the_nearest() -> None:
    with pytest.raises(UserError, match="C98"):
        selected(["C98"])


def test_an_id_is_taken_once() -> None:
    book()
    with pytest.raises(ValueError, match="C01"):
        claim("C01", "T", "nobody", "nothing.")(lambda evidence: None)


def test_evidence_returns_what_it_records() -> None:
    evidence = Evidence()
    assert evidence.number("two", 2) == 2.0
    assert evidence.headline("three", 3, "3") == 3.0
    assert [number.headline for number in evidence.numbers] == [False, True]


def test_findings_survive_json_and_markdown() -> None:
    findings = examine(["C14", "C63"])
    text = json.dumps(records(findings), allow_nan=False)
    assert [one["verdict"] for one in json.loads(text)["claims"]] == ["fails", "not decided here"]
    page = markdown(findings)
    assert "## C14: fails" in page
    assert "| C63 |" in page
