"""Many cells at once: surveys of a study, and the sweep over the product of the axes with its resumable file."""

from __future__ import annotations

import json
import math
from itertools import islice, product
from pathlib import Path

import pytest

from klab.grid import Objective, UserError
from klab.grid.catalogue import AXES
from klab.harness.exact import estimator_report
from klab.harness.exact.gradient_table import gradient_table
from klab.harness.exact.instance import Instance, SharedUpdates
from klab.harness.exact.product_sweep import MAIN_AXES, SweepPlan, main_axes_product, sweep

PLAN = SweepPlan(groups=50)
CELLS = [
    Objective(placement="none", estimator="k1"),
    Objective(placement="none", estimator="k2"),
    Objective(advantage="raw", weight="one"),
    Objective(advantage="batch_norm"),
    Objective(weight="adaptive", estimator="full"),
]


def test_the_product_of_the_main_axes_has_324324_combinations() -> None:
    sizes = [len(AXES[axis].values) for axis in MAIN_AXES]
    assert sizes == [7, 11, 9, 26, 18]
    assert math.prod(sizes) == 324_324
    assert list(islice(main_axes_product("token_mean"), 13)) == [
        Objective(
            estimator="k1", placement="none", ratio="none", weight=weight, advantage=advantage, aggregation="token_mean"
        )
        for weight, advantage in islice(product(AXES["weight"].values, AXES["advantage"].values), 13)
    ]


def test_every_objective_gets_a_row_and_every_canonical_form_one_line(tmp_path: Path) -> None:
    file = tmp_path / "sweep.jsonl"
    rows = sweep(file, CELLS, PLAN)
    assert [(row["estimator"], row["placement"]) for row in rows] == [(o.estimator, o.placement) for o in CELLS]
    assert rows[0]["bias"] == rows[1]["bias"]  # the estimator is inactive
    lines = file.read_text().splitlines()
    assert json.loads(lines[0])["schema"] == 1
    assert len(lines) == 1 + 4
    assert {row["method"] for row in rows} == {"trajectories", "monte carlo"}


def test_a_sweep_is_resumed_and_a_torn_line_is_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "sweep.jsonl"
    whole = sweep(file, CELLS, PLAN)
    complete = file.read_bytes()
    file.write_bytes(complete[:-25])
    measured: list[tuple[int, int]] = []
    assert sweep(file, CELLS, PLAN, progress=lambda done, total: measured.append((done, total))) == whole
    assert file.read_bytes() == complete
    assert measured == [(4, 4)]
    sweep(file, CELLS, PLAN, progress=lambda done, total: pytest.fail("measured again"))
    file.write_bytes(complete[:20])
    assert sweep(file, CELLS[:1], PLAN) == whole[:1]


def test_workers_give_the_same_numbers(tmp_path: Path) -> None:
    many = [Objective(weight="power", advantage="raw", q=step / 100) for step in range(60)]
    assert sweep(tmp_path / "two.jsonl", many, PLAN, workers=2) == sweep(tmp_path / "one.jsonl", many, PLAN)


def test_another_plan_needs_another_file(tmp_path: Path) -> None:
    file = tmp_path / "sweep.jsonl"
    sweep(file, CELLS[:1], PLAN)
    with pytest.raises(UserError, match="another plan"):
        sweep(file, CELLS[:1], SweepPlan(groups=60))


def test_shared_draws_measure_what_estimator_report_measures() -> None:
    lab = Instance()
    setting = lab.perturbed(0.3)
    draws = SharedUpdates(lab.behaviour, samples=4_000, largest=500)
    for objective, size in ((CELLS[2], 4), (CELLS[0], 2), (CELLS[0], 4)):
        shared = draws.report(objective, setting, size)
        alone = estimator_report(
            objective, setting.policy, setting.behaviour, setting.reference, setting.reward, size,
            samples=4_000 if shared.method == "monte carlo" else None,
        )  # fmt: skip
        assert shared.numbers() == alone.numbers()


def test_a_survey_measures_on_policy_random_drift_and_inner_updates_and_names_the_drift() -> None:
    exact = Objective(placement="none", ratio="sequence_product", weight="ratio", advantage="raw")
    cells = {"grpo": (Objective(placement="none"), 4), "again": (Objective(placement="none"), 4), "product": (exact, 4)}
    entries = gradient_table(cells, random_drifts=(0.3,), inner_updates=(1, 3), samples=400)
    assert [(entry.group, entry.drift) for entry in entries] == [
        (group, drift) for group in cells for drift in ("on-policy", "random 0.3", "1 updates", "3 updates")
    ]
    by_name = {(entry.group, entry.drift): entry for entry in entries}
    assert by_name["grpo", "on-policy"].kl == 0.0
    assert by_name["grpo", "3 updates"].kl > by_name["grpo", "1 updates"].kl > 0.0
    assert by_name["again", "random 0.3"].report is by_name["grpo", "random 0.3"].report
    for drift in ("on-policy", "random 0.3", "1 updates", "3 updates"):
        assert by_name["product", drift].report.bias < 1e-12
        assert by_name["grpo", drift].report.bias > 0.05
        row = by_name["grpo", drift].row()
        assert {"group", "drift", "kl", "bias", "cosine", "variance", "ess", "mse"} <= set(row)
        json.dumps(row, allow_nan=False)
