"""Verdicts on the claims of a study: exact numbers, error rates, and where they are shown."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from klab.grid import Cell, parse_grid
from klab.grid.tuning import launched
from klab.harness.cli.main import main
from klab.harness.dispatch.tuning import settle
from klab.harness.store import Run
from klab.harness.store.stated_claims import recorded_claims
from klab.reports import load_run, render
from klab.reports.claim_tables import claim_notes
from klab.reports.claim_words import overall
from klab.reports.claims import Judged, judged
from klab.reports.comparison import compare
from klab.reports.inference import ALPHA
from klab.reports.inference.design import read_design
from klab.reports.inference.error_rate import look_share
from klab.reports.inference.stated_claims import claims_family, differences
from klab.reports.study import load_runs
from tests.support.claimed_run import NOISE, Scores, fill, grid_of, rewards, study_of


def only(found: tuple[Judged, ...]) -> Judged:
    (one,) = found
    assert len(one.rows) == 1
    return one


def test_one_claim_about_two_cells_is_the_paired_t_test(tmp_path: Path) -> None:
    claim = {"claim": "k1 is worse", "source": "Somebody 2025", "cells": {"estimator": "k1"}}
    study = study_of(tmp_path / "run", grid_of(claim), rewards())
    found = only(judged(study))
    differences_ = np.asarray(NOISE) - 0.1
    half = stats.t.ppf(0.975, 5) * differences_.std(ddof=1) / np.sqrt(6)
    (row,) = found.rows
    assert row.estimate == pytest.approx(differences_.mean())
    assert (row.low, row.high) == pytest.approx((differences_.mean() - half, differences_.mean() + half))
    assert row.p == pytest.approx(stats.ttest_1samp(differences_, 0).pvalue)
    assert (row.n, row.compared, row.planned, row.more_seeds) == (6, 1, 1, None)
    assert (found.claim, found.source, found.expect, found.late) == ("k1 is worse", "Somebody 2025", "lower", 0)
    assert (found.score.name, found.delta) == ("reward", 0.05)
    assert (found.verdict, found.words, row.verdict) == ("holds", "holds here", "holds")
    assert row.finding == "lower by 0.100"
    # the row of the comparison that says the same
    table = compare(study, study.tasks[0]).analysis.contrasts
    assert table.loc[0, ["difference", "low", "high", "p"]].tolist() == pytest.approx(
        [row.estimate, row.low, row.high, row.p]
    )


@pytest.mark.parametrize(
    ("expect", "worse", "delta", "verdict", "finding"),
    [
        ("lower", 0.1, None, "holds", "lower by 0.100"),
        ("higher", 0.1, None, "contradicted", "lower by 0.100"),
        ("equal", 0.1, None, "contradicted", "lower by 0.100"),
        ("equal", 0.0, None, "holds", "no difference as large as 0.05"),
        ("equal", 0.02, None, "holds", "no difference as large as 0.05"),
        ("lower", 0.02, None, "holds", "lower by 0.020"),
        ("lower", 0.0, None, "contradicted", "no difference as large as 0.05"),
        ("higher", 0.0, None, "contradicted", "no difference as large as 0.05"),
        # 19 seeds: the fewest n with t(n − 1)·0.00825/√n < 0.004
        ("higher", 0.0, 0.004, "undecided", "13 more seeds per cell"),
        ("equal", 0.0, 0.004, "undecided", "13 more seeds per cell"),
        ("equal", 0.02, 0.015, "contradicted", "lower by 0.020"),
    ],
)
def test_a_verdict_is_what_the_interval_says(
    tmp_path: Path, expect: str, worse: float, delta: float | None, verdict: str, finding: str
) -> None:
    claim = {"cells": {"estimator": "k1"}, "expect": expect, **({} if delta is None else {"delta": delta})}
    found = only(judged(study_of(tmp_path / "run", grid_of(claim), rewards(worse))))
    assert (found.verdict, found.rows[0].verdict, found.rows[0].finding) == (verdict, verdict, finding)
    assert (found.rows[0].more_seeds is None) == (verdict != "undecided")


def test_claims_are_one_family_whatever_they_are_scored_by(tmp_path: Path) -> None:
    def scores(cell: Cell) -> Scores:
        return {**rewards()(cell), "reverse_kl_final": 2.0 + cell.seed + (cell.objective.estimator == "k1")}

    cells = {"estimator": "k1"}
    kl = {"cells": cells, "score": "reverse_kl_final", "expect": "higher"}
    study = study_of(tmp_path / "run", grid_of({"cells": cells}, kl, {"cells": cells, "expect": "higher"}), scores)
    first, second, third = judged(study)
    level = 1 - 0.95 ** (1 / 3)
    half = stats.t.ppf(1 - level / 2, 5) * (np.asarray(NOISE)).std(ddof=1) / np.sqrt(6)
    assert (first.rows[0].high - first.rows[0].low) / 2 == pytest.approx(half)
    assert (second.delta, second.verdict, second.rows[0].low) == (None, "holds", pytest.approx(1.0))
    assert second.score.title == "KL to the reference"
    assert (first.verdict, third.verdict) == ("holds", "contradicted")


def test_an_open_claim_says_where_it_holds() -> None:
    rows = [
        SimpleNamespace(task="sums", low=0.1, verdict="holds", more_seeds=None, depends=False),
        SimpleNamespace(task="strings", low=-0.1, verdict="undecided", more_seeds=3, depends=False),
    ]
    assert overall(rows) == ("undecided", "undecided (holds on sums; 3 more seeds per cell)")


def test_a_score_without_a_margin_is_never_called_equal(tmp_path: Path) -> None:
    def scores(cell: Cell) -> Scores:
        return {"reward": 0.5, "reverse_kl_final": 2.0 + NOISE[cell.seed] * (cell.objective.estimator == "k1")}

    claim = {"cells": {"estimator": "k1"}, "score": "reverse_kl_final", "expect": "higher"}
    study = study_of(tmp_path / "run", grid_of(claim), scores)
    found = only(judged(study))
    assert found.verdict == "undecided"
    assert found.rows[0].finding == "more than 2000 more seeds per cell"
    assert found.words == "undecided (more than 2000 more seeds per cell)"
    own = study_of(tmp_path / "own", grid_of({**claim, "delta": 0.5}), scores)
    assert only(judged(own)).words == "contradicted here"


def _product(cell: Cell) -> Scores:
    """A main effect of −0.1 of k1, of a size that depends on the other axes, which have effects of their own."""
    k1, none = cell.objective.estimator == "k1", cell.objective.placement == "reward"
    ratio = cell.objective.weight == "ratio"
    drawn = np.random.default_rng([cell.seed, k1, none, ratio]).normal() * 0.01
    return {"reward": 0.5 + 0.1 * none - 0.2 * ratio - k1 * (0.1 + 0.05 * none - 0.05 * ratio) + drawn}


def test_a_claim_in_a_product_is_the_mean_over_cells_that_differ_in_nothing_else(tmp_path: Path) -> None:
    axes = {"estimator": ["k1", "k3"], "placement": ["loss", "reward"], "weight": ["ppo_clip", "ratio"]}
    training = {"updates": 4, "updates_per_rollout": 2}
    claims = [
        {"cells": {"estimator": "k1"}},
        {"cells": {"estimator": "k1", "placement": "loss"}, "against": {"estimator": "k3", "placement": "reward"}},
        {"cells": {"estimator": "k1"}, "where": {"weight": "ratio"}},
    ]
    study = study_of(tmp_path / "run", grid_of(*claims, axes=axes, training=training), _product)
    cells = study.cells.assign(
        estimator=[study.configurations[group].objective.estimator for group in study.cells["group"]],
        placement=[study.configurations[group].objective.placement for group in study.cells["group"]],
        weight=[study.configurations[group].objective.weight for group in study.cells["group"]],
    ).pivot_table(index="seed", columns=["estimator", "placement", "weight"], values="reward_final")
    levels = [(placement, weight) for placement in axes["placement"] for weight in axes["weight"]]
    each = {level: (cells["k1"][level] - cells["k3"][level]).mean() for level in levels}
    main_effect, crossed, where = (found.rows[0] for found in judged(study))
    assert main_effect.estimate == pytest.approx(np.mean(list(each.values())))
    # the same estimate, standard error and degrees of freedom as the effect that the report shows
    shown = compare(study, study.tasks[0]).analysis.effects.set_index("axis").loc["estimator"]
    assert main_effect.estimate == pytest.approx(shown["difference"])
    by_weight = [(cells["k1"]["loss"][w] - cells["k3"]["reward"][w]).mean() for w in axes["weight"]]
    assert crossed.estimate == pytest.approx(np.mean(by_weight))
    assert where.estimate == pytest.approx(np.mean([each["loss", "ratio"], each["reward", "ratio"]]))
    assert (main_effect.planned, crossed.planned, where.planned) == (4, 2, 2)


def test_lost_and_diverged_runs_count_as_everywhere(tmp_path: Path) -> None:
    axes = {"estimator": ["k1", "k3"], "placement": ["loss", "reward"]}
    claims = [{"cells": {"estimator": "k1"}}]

    def scores(cell: Cell) -> Scores | None:
        if cell.objective.placement == "reward" and cell.objective.estimator == "k1":
            return None
        return {
            **rewards()(cell),
            **({"state": "diverged"} if cell.objective.estimator == "k1" and not cell.seed else {}),
        }

    study = study_of(tmp_path / "run", grid_of(*claims, axes=axes), scores)
    found = only(judged(study)).rows[0]
    assert (found.compared, found.planned) == (1, 2)
    assert "from 1 of 2 comparisons, the others have no runs" in found.finding
    worst = min(0.5 + 0.02 * seed + NOISE[seed] for seed in range(1, 6))
    others = [0.6 + 0.02 * seed for seed in range(6)]
    own = [worst, *(0.5 + 0.02 * seed + NOISE[seed] for seed in range(1, 6))]
    assert found.estimate == pytest.approx(np.mean(np.asarray(own) - others))


@pytest.mark.parametrize(("stopped", "depends"), [(1, False), (4, True)])
def test_a_verdict_that_depends_on_stopped_runs_is_marked(tmp_path: Path, stopped: int, depends: bool) -> None:
    own = np.asarray([0.6 + noise for noise in NOISE])
    other = 0.8 - 0.001 * np.arange(6)

    def scores(cell: Cell) -> Scores:
        if cell.objective.estimator == "k3":
            return {"reward": float(other[cell.seed])}
        return {"reward": float(own[cell.seed]), "state": "stopped" if cell.seed < stopped else "finished"}

    training = {"updates": 4, "evaluate_every": 1, "stop": {"after": 2, "unless": {"reward": 0.1}}}
    study = study_of(tmp_path / "run", grid_of({"cells": {"estimator": "k1"}}, training=training), scores)
    found = only(judged(study))
    (row,) = found.rows
    ends = [np.concatenate([np.full(stopped, end), own[stopped:]]) for end in (own.min(), other.max())]
    assert row.estimate == pytest.approx((own - other).mean())
    assert (row.bound_low, row.bound_high) == pytest.approx([(end - other).mean() for end in ends])
    high = stats.ttest_1samp(ends[1] - other, 0)
    assert (high.pvalue > 0.05) == depends  # the verdict at that end
    assert (found.verdict, row.depends) == ("holds", depends)
    assert found.words == ("holds here †" if depends else "holds here")
    assert ("depends on what stopped runs would have reached (†)" in row.finding) == depends
    assert found.delta == 0.05


def test_tasks_are_judged_one_by_one(tmp_path: Path) -> None:
    tasks = {"task.digits": [1, 2], "estimator": ["k1", "k3"]}

    def scores(cell: Cell) -> Scores:
        return rewards(0.1 if cell.task.digits == 1 else -0.1)(cell)  # type: ignore[union-attr]

    claims = [
        {"cells": {"estimator": "k1"}},
        {"cells": {"estimator": "k1"}, "where": {"task.digits": 2}, "expect": "higher"},
        {"cells": {"estimator": "k1"}, "expect": "equal"},
    ]
    both, one, equal = judged(study_of(tmp_path / "run", grid_of(*claims, axes=tasks), scores))
    assert [row.task for row in both.rows] == ["addition(digits=1)", "addition(digits=2)"]
    assert [row.verdict for row in both.rows] == ["holds", "contradicted"]
    assert both.verdict == "depends on the task"
    assert both.words == "depends on the task (holds on addition(digits=1); contradicted on addition(digits=2))"
    assert ([row.task for row in one.rows], one.words) == (["addition(digits=2)"], "holds here")
    assert equal.words == "contradicted here"
    # five rows of one family, in designs of two cells each
    half = stats.t.ppf(1 - (1 - 0.95**0.2) / 2, 5) * np.asarray(NOISE).std(ddof=1) / np.sqrt(6)
    assert (both.rows[1].high - both.rows[1].low) / 2 == pytest.approx(half)


def test_a_contradiction_beside_an_open_task_is_one(tmp_path: Path) -> None:
    def scores(cell: Cell) -> Scores | None:
        return rewards(-0.1)(cell) if cell.task.digits == 1 or cell.seed < 1 else None  # type: ignore[union-attr]

    claims = [{"cells": {"estimator": "k1"}}, {"cells": {"estimator": "k1"}, "expect": "higher"}]
    axes = {"task.digits": [1, 2], "estimator": ["k1", "k3"]}
    against, holds = judged(study_of(tmp_path / "run", grid_of(*claims, axes=axes), scores))
    assert against.words == "contradicted here (undecided on addition(digits=2))"
    assert against.rows[1].finding.startswith("no interval: it takes two seeds of both sides")
    assert (holds.verdict, holds.words) == ("undecided", "undecided (no interval yet)")


def test_listed_and_fractional_studies_answer_claims(tmp_path: Path) -> None:
    cells = [{}, {"estimator": "k1"}, {"weight": {"name": "power", "q": 0.5}, "estimator": "k1"}]
    training = {"updates": 4, "updates_per_rollout": 2}
    listed = grid_of(
        {"cells": {"estimator": "k1"}, "where": {"weight": "ppo_clip"}}, axes=None, cells=cells, training=training
    )
    assert only(judged(study_of(tmp_path / "list", listed, rewards()))).rows[0].estimate == pytest.approx(-0.1)
    axes = {"estimator": ["k1", "k3"], "weight": ["ppo_clip", "truncate", "ratio"], "beta": [0.01, 0.05, 0.1]}
    design = {"name": "fractional", "cells": 12, "holdout": 2}
    fractional = grid_of({"cells": {"estimator": "k1"}}, axes=axes, design=design, training=training)
    found = only(judged(study_of(tmp_path / "fraction", fractional, rewards())))
    assert found.rows[0].estimate == pytest.approx(-0.1)
    assert found.verdict == "holds"


def test_tuned_configurations_are_judged_with_what_they_kept(tmp_path: Path) -> None:
    def scores(cell: Cell) -> Scores:
        best = 1e-4 if cell.objective.estimator == "k1" else 3e-4
        return {"reward": rewards(0.0)(cell)["reward"] - 0.2 * (cell.training.lr != best)}

    training = {"updates": 4, "lr": 3.0e-4}
    grid = grid_of({"cells": {"estimator": "k1"}}, training=training, tune={"training.lr": [1e-4, 3e-4], "seeds": 2})
    run = Run.create(tmp_path / "run", launched(grid))
    assert judged(load_run(run.path)) == ()
    fill(run, scores)
    with run.lock():
        settle(run)
    fill(run, scores)
    found = only(judged(load_run(run.path)))
    assert (found.verdict, found.rows[0].finding) == ("contradicted", "no difference as large as 0.05")
    assert found.cells[0] != recorded_claims(run.manifest, run.path)[0].stated.cells[0]
    written = only(judged(load_runs([run.path], stage="untuned")))
    assert written.verdict == "holds"


def test_looks_share_the_error_rate(tmp_path: Path) -> None:
    claim = {"cells": {"estimator": "k1"}}
    study = study_of(tmp_path / "run", grid_of(claim, analysis={"stop": {"seeds": 12}}), rewards())
    (row,) = only(judged(study)).rows
    half = stats.t.ppf(1 - ALPHA * look_share((6,), 12) / 2, 5) * np.asarray(NOISE).std(ddof=1) / np.sqrt(6)
    assert (row.high - row.low) / 2 == pytest.approx(half)
    plain = judged(study, share=1.0)[0].rows[0]
    assert plain.high - plain.low < row.high - row.low


def test_claims_that_come_after_results_or_go_are_marked(tmp_path: Path) -> None:
    first, second = ({"claim": name, "cells": {"estimator": "k1"}} for name in ("first", "second"))
    study_of(tmp_path / "run", grid_of(first), rewards())
    Run.create(tmp_path / "run", grid_of(second))
    study = load_run(tmp_path / "run")
    assert [(each.claim, each.late) for each in judged(study)] == [("second", 12)]
    assert claim_notes(study) == ("Withdrawn from the grid file after 12 runs had results: first",)
    manifest = (tmp_path / "run/manifest.json").read_bytes()
    Run.create(tmp_path / "run", grid_of(second))
    assert (tmp_path / "run/manifest.json").read_bytes() == manifest
    Run.create(tmp_path / "run", grid_of(first))
    assert [(each.claim, each.late) for each in judged(load_run(tmp_path / "run"))] == [("first", 0)]
    Run.create(tmp_path / "fresh", grid_of(first))
    Run.create(tmp_path / "fresh", grid_of(second))
    fresh = load_run(tmp_path / "fresh")
    assert [(each.claim, each.late) for each in judged(fresh)] == [("second", 0)]
    assert claim_notes(fresh) == ()


def test_a_claim_without_its_cells_is_left_out_and_said_to_be(tmp_path: Path) -> None:
    grid = grid_of({"claim": "k1 is worse", "cells": {"estimator": "k1"}})
    run = fill(Run.create(tmp_path / "run", grid), rewards())
    k3 = [cell.id for cell in grid.cells if cell.objective.estimator == "k3"]
    study = load_runs([run.path], only=k3)
    assert judged(study) == ()
    assert claim_notes(study) == ("Not judged, because its cells are not in this report: k1 is worse",)


def test_runs_together_judge_a_claim_once(tmp_path: Path) -> None:
    claim = {"cells": {"estimator": "k1"}}
    paths = []
    for name, seeds in (("a", [0, 1, 2]), ("b", [3, 4, 5])):
        paths.append(fill(Run.create(tmp_path / name, grid_of(claim, seeds=seeds)), rewards()).path)
    found = only(judged(load_runs(paths)))
    assert (found.rows[0].n, found.rows[0].estimate) == (6, pytest.approx(-0.1))


def test_the_page_the_tables_and_the_terminal_show_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = grid_of(
        {"claim": "k1 <is> worse", "source": "Somebody & 2025", "cells": {"estimator": "k1"}},
        {"claim": "k1 is better", "cells": {"estimator": "k1"}, "expect": "higher"},
    )
    run = fill(Run.create(tmp_path / "run", grid), rewards())
    page = render(run.path, tmp_path / "page", figures=False).read_text()
    section = page[page.index('<section id="claims">') : page.index("</section>", page.index('<section id="claims">'))]
    for words in ("k1 &lt;is&gt; worse", "Somebody &amp; 2025", "holds here", "contradicted here", "lower by 0.100"):
        assert words in section
    assert page.index('<section id="claims">') < page.index('<section id="methods">')
    half = stats.t.ppf(1 - (1 - 0.95**0.5) / 2, 5) * np.asarray(NOISE).std(ddof=1) / np.sqrt(6)
    assert f"−0.100 [−{0.1 + half:.3f}, −{0.1 - half:.3f}]" in section
    rows = list(csv.DictReader((tmp_path / "page/tables/claims.csv").open()))
    assert [(row["claim"], row["overall"], row["verdict"]) for row in rows] == [
        ("k1 <is> worse", "holds", "holds"),
        ("k1 is better", "contradicted", "contradicted"),
    ]
    assert r"k1 \<is\> worse (Somebody & 2025): holds here" in (tmp_path / "page/tables/claims.md").read_text()
    assert r"Somebody \& 2025" in (tmp_path / "page/tables/claims.tex").read_text()
    assert main(["report", str(run.path), "--format", "json"]) == 0
    (first, second) = json.loads(capsys.readouterr().out)["claims"]
    assert (first["verdict"], first["rows"][0]["estimate"]) == ("holds", pytest.approx(-0.1))
    assert (second["score"], second["delta"], second["words"]) == ("reward", 0.05, "contradicted here")
    assert main(["report", str(run.path), "--no-figures", "--no-gradients"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "claim: k1 <is> worse: holds here" in text
    assert "claim: k1 is better: contradicted here" in text


def test_a_study_without_claims_says_nothing_of_them(tmp_path: Path) -> None:
    grid = parse_grid(
        "name: a\ntask: addition\ntraining: {updates: 4}\naxes: {estimator: [k1, k3]}\nseeds: 2\n", "a.yaml"
    )
    run = fill(Run.create(tmp_path / "run", grid), rewards())
    assert judged(load_run(run.path)) == ()
    assert 'id="claims"' not in render(run.path, tmp_path / "page", figures=False).read_text()
    assert not (tmp_path / "page/tables/claims.csv").exists()
    assert "claims" not in run.manifest


def test_false_verdicts_are_as_rare_as_they_should_be() -> None:
    """200 studies in which nothing differs: six cells of unequal noise, four claims on two scores."""
    generator = np.random.default_rng(7)
    claims = [[[(0, 1)]], [[(2, 1), (3, 1)]], [[(4, 5)], [(2, 3)]], [[(5, 1)]]]
    false = unadjusted = covered = 0
    for _ in range(200):
        parts = []
        for _ in range(2):
            spread = np.exp(generator.normal(0, 0.3, 6))
            scores = generator.normal(0, 1, 5) + spread[:, None] * generator.normal(0, 1, (6, 5))
            rows = [(f"c{cell}", seed, scores[cell, seed]) for cell in range(6) for seed in range(5)]
            frame = pd.DataFrame(rows, columns=["axis", "seed", "score"]).assign(state="finished")
            parts.append(differences(read_design(frame, {"axis": "c1"}), claims))
        found = claims_family(parts, np.zeros(8), ALPHA)
        false += bool((found.verdict == "differs").any())
        covered += bool(((found.low < 0) & (found.high > 0)).all())
        t = np.concatenate([part.estimate / part.error for part in parts])
        freedom = np.concatenate([part.freedom for part in parts])
        unadjusted += bool((2 * stats.t.sf(np.abs(t), freedom) < ALPHA).any())
    assert false <= 0.05 * 200
    assert covered == 200 - false
    assert unadjusted > 0.15 * 200  # what the family is for
