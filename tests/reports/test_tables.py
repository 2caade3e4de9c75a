"""Tables: the same numbers in four formats, each readable by what reads that format."""

from __future__ import annotations

import csv
import io
import json
import re

import pandas as pd
import pytest

from klab.grid import UserError
from klab.reports import Study
from klab.reports.comparison import Comparison, compare
from klab.reports.schema import SUMMARY
from klab.reports.tables import csv as safe_csv
from klab.reports.tables import formatted


@pytest.fixture(scope="module")
def comparison(study: Study) -> Comparison:
    return compare(study, study.tasks[0])


def test_csv_has_every_column_at_full_precision(comparison: Comparison) -> None:
    rows = list(csv.DictReader(io.StringIO(formatted([comparison], "csv"))))
    assert list(rows[0]) == ["group", *SUMMARY]
    assert [float(row["mean"]) for row in rows] == comparison.table["mean"].tolist()


@pytest.mark.parametrize("text", ["=1+1", "+A1", "-A1", "@SUM(A1)", "\t=1", "\r=1"])
def test_no_text_in_a_csv_is_a_formula(text: str) -> None:
    frame = pd.DataFrame({"label": [text, "plain"], "difference": [-0.5, 0.25]})
    rows = list(csv.DictReader(io.StringIO(safe_csv(frame), newline="")))
    assert [row["label"] for row in rows] == ["'" + text.replace("\r", "\n"), "plain"]
    assert [float(row["difference"]) for row in rows] == [-0.5, 0.25]


def test_json_is_strict_and_has_null_for_what_is_missing(comparison: Comparison) -> None:
    data = json.loads(formatted([comparison], "json"), parse_constant=lambda name: pytest.fail(name))
    (found,) = data["comparisons"]
    baseline = next(row for row in found["table"] if row["label"] == "baseline")
    assert baseline["p"] is None
    assert {effect["axis"] for effect in found["effects"]} == {
        "estimator",
        "placement",
        "weight",
        "training.lr",
    }


def test_markdown_is_one_table(comparison: Comparison) -> None:
    lines = [line for line in formatted([comparison], "md").splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(comparison.table)
    assert len({line.count("|") for line in lines}) == 1


def _rows(text: str) -> list[list[str]]:
    """A small LaTeX parser: balanced groups and environments, and a table's rows, split where TeX would."""
    depth, stack = 0, []
    for token in re.findall(r"\\begin\{(\w+)\}|\\end\{(\w+)\}|\\.|[{}]", re.sub(r"(?<!\\)%.*", "", text)):
        begun, ended = token
        if begun:
            stack.append(begun)
        elif ended:
            assert stack.pop() == ended
    for token in re.findall(r"\\.|[{}]", re.sub(r"(?<!\\)%.*", "", text)):
        depth += (token == "{") - (token == "}")
        assert depth >= 0
    assert (depth, stack) == (0, [])
    body = text.partition(r"\midrule")[2].partition(r"\bottomrule")[0]
    assert not re.search(r"(?<!\\)[#_^$~]", re.sub(r"\$-\$|\$\\\w+\$", "", body))
    return [re.split(r"(?<!\\)&", row) for row in re.split(r"\\\\\s*\n", body.strip() + "\n") if row.strip()]


def test_latex_is_balanced_and_every_row_has_every_column(comparison: Comparison) -> None:
    text = formatted([comparison], "latex")
    columns = re.search(r"\\begin\{tabular\}\{(l?r*)\}", text)
    assert columns is not None
    rows = _rows(text)
    assert len(rows) == len(comparison.table)
    assert {len(row) for row in rows} == {len(columns[1])}
    assert [row[0].strip() for row in rows] == [label.replace("_", r"\_") for label in comparison.table["label"]]


def test_latex_escapes_what_a_name_may_hold(comparison: Comparison) -> None:
    nasty = r"[a] 50% of $x_1^2$ & {b} \input{c} ~ # <d> | β"
    table = comparison.table.assign(label=nasty)
    from dataclasses import replace

    rows = _rows(formatted([replace(comparison, table=table)], "latex"))
    assert {len(row) for row in rows} == {8}
    assert rows[0][0].startswith("{[}a]")
    assert r"\input" not in rows[0][0]


def test_an_unknown_format(comparison: Comparison) -> None:
    with pytest.raises(UserError, match="latex"):
        formatted([comparison], "latec")


def test_a_long_table_goes_over_pages_with_its_head_repeated(comparison: Comparison) -> None:
    from dataclasses import replace

    long = replace(comparison, table=pd.concat([comparison.table] * 10, ignore_index=True))
    text = formatted([long], "latex")
    assert "\\usepackage{booktabs,longtable}" in text
    head, _, rest = text.partition(r"\endfirsthead")
    repeated, _, body = rest.partition(r"\endfoot")
    assert head.count(r"\toprule") == repeated.count(r"\toprule") == 1
    rows = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert len(rows) == len(long.table) > 40
    assert {len(re.split(r"(?<!\\)&", row)) for row in rows} == {8}
    assert body.rstrip().endswith(r"\end{longtable}")
    assert "−" not in text
    assert "$-$" in text


def test_the_baseline_says_what_it_is(comparison: Comparison) -> None:
    assert comparison.baseline_words == "k3, loss, ppo_clip, lr 0.0003"
    assert r"(k3, loss, ppo\_clip, lr 0.0003)" in formatted([comparison], "latex")
