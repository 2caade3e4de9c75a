"""Equal algorithms are recognised as equal, different ones are not, and a second look needs neither torch nor time."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from klab.grid import Cell, Objective
from klab.grid.catalogue import AXES
from klab.grid.schema.sections import AdditionTask, TinyPolicy, TrainingSection
from klab.harness.exact.equivalence import contested_fingerprints, count_classes, equivalence_classes
from klab.harness.exact.fingerprints import fingerprints
from klab.harness.exact.probes import probe, probe_gradient
from tests.harness.exact.enumeration import weight_of

ON_POLICY = TrainingSection()
OFF_POLICY = TrainingSection(updates_per_rollout=2)


def cell(objective: Objective, training: TrainingSection = OFF_POLICY, seed: int = 0) -> Cell:
    return Cell(objective, AdditionTask(), TinyPolicy(), training, seed)


def same(first: Objective, second: Objective, cache: Path, training: TrainingSection = OFF_POLICY) -> bool:
    return len(equivalence_classes([cell(first, training), cell(second, training)], cache=cache)) == 1


EQUAL: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"placement": "log_ratio"}, {"placement": "none"}),
    ({"estimator": "k2"}, {"estimator": "k3_plus"}),
    ({"estimator": "k3", "placement": "loss_corrected"}, {"estimator": "k2", "placement": "loss_reweighted"}),
    (
        {"estimator": "k2", "weight": "one"},
        {"estimator": "k1", "weight": "one", "placement": "advantage", "kl_at": "current"},
    ),
    ({"ratio": "sequence_mean", "path": "ratio"}, {"ratio": "sequence_mean"}),
    ({"weight": "power", "q": 1.0}, {"weight": "ratio"}),
    ({"weight": "power", "q": 0.0}, {"weight": "one"}),
    ({"advantage": "positive", "placement": "reward"}, {"advantage": "positive", "placement": "none"}),
    ({"advantage": "positive", "weight": "dual_clip"}, {"advantage": "positive", "weight": "ppo_clip"}),
    ({"weight": "two_sided_clip", "ceiling": 3.0}, {"weight": "dual_clip", "c": 3.0}),
    ({"advantage": "term_norm", "placement": "reward"}, {"advantage": "term_norm", "placement": "none"}),
    ({"advantage": "gae", "placement": "reward_to_go"}, {"advantage": "raw", "placement": "reward_to_go"}),
]

DIFFERENT: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"beta": 0.04}, {"beta": 0.05}),
    ({"eps_high": 0.2}, {"eps_high": 0.2000001}),
    ({"weight": "truncate", "cap": 1.2}, {"weight": "truncate", "cap": 1.21}),
    ({"weight": "mask"}, {"weight": "mask", "high": 2.001}),
    ({"weight": "ppo_clip"}, {"weight": "dual_clip"}),
    ({"weight": "ppo_clip"}, {"weight": "truncate_clip"}),
    ({"weight": "ppo_clip"}, {"weight": "dual_clip", "c": 1e6}),
    ({"weight": "ppo_clip"}, {"weight": "sequence_kl_mask", "drift": 50.0}),
    ({"weight": "truncate", "cap": 1e6}, {"weight": "ratio"}),
    ({"weight": "two_sided_clip", "ceiling": 1.1}, {"weight": "dual_clip", "c": 1.1}),
    ({"weight": "adaptive"}, {"weight": "power"}),
    ({"weight": "adaptive"}, {"weight": "adaptive", "ess": 0.2}),
    ({"std": "population"}, {"std": "sample"}),
    ({"eps": 1e-6}, {"eps": 1e-5}),
    ({"ratio": "sequence_product", "path": "ratio"}, {"ratio": "sequence_product"}),
    (
        {"advantage": "gae", "gamma": 0.9, "placement": "reward_to_go"},
        {"advantage": "raw", "placement": "reward_to_go"},
    ),
    ({"advantage": "gae", "whiten": "batch"}, {"advantage": "batch_norm", "std": "sample", "eps": 0.0}),
    ({"advantage": "group_center"}, {"advantage": "leave_one_out"}),
    ({"advantage": "group_center"}, {"advantage": "length_baseline"}),
    ({"aggregation": "token_mean"}, {"aggregation": "constant"}),
    (
        {"estimator": "k2", "weight": "one"},
        {"estimator": "k1", "weight": "one", "placement": "advantage", "kl_at": "rollout"},
    ),
    ({"estimator": "full"}, {"estimator": "k2"}),
]


@pytest.mark.parametrize(("first", "second"), EQUAL)
def test_equal_algorithms_are_one_class(first: dict[str, Any], second: dict[str, Any], tmp_path: Path) -> None:
    assert same(Objective(**first), Objective(**second), tmp_path)
    assert same(Objective(**first), Objective(**second), tmp_path, ON_POLICY)


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_different_algorithms_are_two_classes(first: dict[str, Any], second: dict[str, Any], tmp_path: Path) -> None:
    assert not same(Objective(**first), Objective(**second), tmp_path)


def test_every_pair_of_weights_ratios_estimators_and_advantages_is_told_apart_off_policy(tmp_path: Path) -> None:
    """The probes are degenerate for no value: changing one axis alone is seen, but for the known equalities."""
    start = {"estimator": "k1", "placement": "reward_to_go", "ratio": "future_product", "weight": "ratio",
             "advantage": "group_center", "aggregation": "sequence_sum", "path": "ratio"}  # fmt: skip
    merged = set()
    for axis in AXES:
        values = [Objective(**(start | {axis: value})) for value in AXES[axis].values]
        for found in equivalence_classes([cell(objective) for objective in values], cache=tmp_path):
            names = tuple(getattr(member.objective, axis) for member in found.members)
            if len(names) > 1:
                merged.add(names)
    assert merged == {("k3", "k3_plus"), ("k1", "reinforce"), ("none", "log_ratio"), ("raw", "gae")}


def test_on_policy_schedules_collapse_ratios_and_weights_and_off_policy_ones_do_not(tmp_path: Path) -> None:
    objectives = [
        Objective(ratio=ratio, weight=weight, placement="none")
        for ratio, weight in itertools.product(("token", "sequence_mean", "future_mean"), AXES["weight"].values)
    ]
    assert count_classes(objectives, True, cache=tmp_path) == {"written": 78, "canonical": 2, "measured": 2}
    assert count_classes(objectives, False, cache=tmp_path) == {"written": 78, "canonical": 76, "measured": 76}


def test_a_mask_that_excludes_everything_on_policy_is_not_the_plain_algorithm(tmp_path: Path) -> None:
    nothing = Objective(weight="mask", low=1.5, high=2.0)
    assert not same(nothing, Objective(weight="one"), tmp_path, ON_POLICY)


def test_classes_keep_the_order_name_the_reason_and_never_cross_seeds_or_schedules(tmp_path: Path) -> None:
    k2, k3_plus, k1 = (Objective(estimator=name) for name in ("k2", "k3_plus", "k1"))
    cells = [
        cell(k1),
        cell(k2),
        cell(k2, seed=1),
        cell(k3_plus),
        cell(k3_plus, seed=1),
        cell(k3_plus, TrainingSection(updates_per_rollout=3)),
    ]
    classes = equivalence_classes(cells, cache=tmp_path)
    assert [found.members for found in classes] == [
        (cells[0],), (cells[1], cells[3]), (cells[2], cells[4]), (cells[5],),
    ]  # fmt: skip
    assert [found.representative for found in classes] == [cells[0], cells[1], cells[2], cells[5]]
    assert [bool(found.reason) for found in classes] == [False, True, True, False]
    assert "measured" in classes[1].reason


def test_inactive_axes_are_named(tmp_path: Path) -> None:
    spelled = replace(cell(Objective(weight="one", ratio="token")), spellings=("ratio=token", "ratio=none"))
    (found,) = equivalence_classes([spelled], cache=tmp_path)
    assert "inactive ratio: the weight is one" in found.reason


def test_fingerprints_are_cached_and_a_torn_cache_is_repaired(tmp_path: Path) -> None:
    objectives = {
        (Objective(estimator=name).canonical_text(), False): Objective(estimator=name) for name in ("k1", "k2")
    }
    computed: list[tuple[int, int]] = []
    first = fingerprints(objectives, cache=tmp_path, progress=lambda done, total: computed.append((done, total)))
    assert computed == [(1, 2), (2, 2)]
    again = fingerprints(objectives, cache=tmp_path, progress=lambda done, total: pytest.fail("computed again"))
    assert again == first
    (file,) = (tmp_path / "fingerprints").iterdir()
    file.write_text("0.25\n" + file.read_text().rstrip()[:-7])
    computed.clear()
    repaired = fingerprints(objectives, cache=tmp_path, progress=lambda done, total: computed.append((done, total)))
    assert repaired == first
    assert computed == [(1, 1)]
    assert all(json.loads(line) for line in file.read_text().splitlines()[-1:])


def test_an_unwritable_cache_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "fingerprints").write_text("a file where the folder should be")
    assert same(Objective(estimator="k2"), Objective(estimator="k3_plus"), tmp_path)


def test_known_fingerprints_need_no_torch(tmp_path: Path) -> None:
    cells = [cell(Objective(estimator=name)) for name in ("k1", "k2", "k3_plus")]
    assert len(contested_fingerprints(cells, cache=tmp_path)[1]) == 3
    equivalence_classes(cells, cache=tmp_path)
    known, unknown = contested_fingerprints(cells, cache=tmp_path)
    assert (len(known), unknown) == (3, {})
    program = f"""
import sys
from pathlib import Path
from klab.grid import Cell, Objective
from klab.grid.schema.sections import AdditionTask, TinyPolicy, TrainingSection
from klab.harness.exact.equivalence import equivalence_classes
cells = [Cell(Objective(estimator=name), AdditionTask(), TinyPolicy(), TrainingSection(updates_per_rollout=2), 0)
         for name in ("k1", "k2", "k3_plus")]
print(len(equivalence_classes(cells, cache=Path({str(tmp_path)!r}))), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]


def test_processes_compute_the_same_fingerprints(tmp_path: Path) -> None:
    objectives = [Objective(estimator=name) for name in ("k1", "full")]
    wanted = {(each.canonical_text(), False): each for each in objectives}
    alone = fingerprints(wanted, cache=tmp_path / "alone")
    together = fingerprints(wanted, cache=tmp_path / "together", workers=2)
    assert list(together.items()) == list(alone.items())
    assert fingerprints(wanted, cache=tmp_path / "together") == alone


def doubled(ratio, advantage):  # type: ignore[no-untyped-def]
    """A user's weight."""
    return 2 * ratio


def test_functions_of_the_user_are_measured_and_never_cached(tmp_path: Path) -> None:
    own = Objective(weight=f"{__name__}:doubled")
    assert not same(own, Objective(weight="ratio"), tmp_path)
    assert len(contested_fingerprints([cell(own), cell(Objective(weight="ratio"))], cache=tmp_path)[1]) == 1


def test_probes_hold_what_they_promise() -> None:
    off, on = probe(False).batch, probe(True).batch
    lengths = off.mask.sum(1)
    assert {0, 1, 6} <= set(lengths.tolist())
    gaps = (~off.mask[:, 1:-1]) & (off.mask.cumsum(1)[:, 1:-1] > 0) & (off.mask.flip(1).cumsum(1).flip(1)[:, 1:-1] > 0)
    assert int(gaps.any(1).sum()) > 10
    rewards = off.rewards.view(-1, 4)
    assert any(len(set(group.tolist())) == 1 for group in rewards)
    assert any((group < 0).all() for group in rewards)
    drift = (off.logp - off.logp_behaviour)[off.mask].abs()
    assert torch.equal(on.logp, on.logp_behaviour)
    assert (drift == 0).any()
    assert ((drift > 0) & (drift < 0.2)).any()
    assert (drift > 2).any()


def test_no_weight_is_zero_or_one_on_all_probes_and_each_threshold_is_straddled() -> None:
    batch = probe(False).batch
    comb = slice(72, None)
    ratios = (batch.logp - batch.logp_behaviour)[comb, 0].exp()
    for threshold in (0.5, 0.8, 1.0, 1.2, 2.0, 3.0):
        assert float((ratios - threshold).clamp(min=0).max()) > 0 > float((ratios - threshold).min())
        assert float((ratios / threshold).log().abs().min()) < 0.04
    for weight in AXES["weight"].values:
        gradient = probe_gradient(
            Objective(
                weight={"name": weight, **({"band_penalty": 0.0} if weight == "tv_band" else {})},
                advantage="raw",
                placement="none",
                aggregation="sequence_sum",
            ),
            False,
        )[comb, 0]
        scores = probe(False).scores[comb, 0]
        weights = (-gradient * scores).sum(-1) / scores.square().sum(-1) / batch.rewards[comb] * 168
        assert int((weights.abs() > 1e-9).sum()) > 5
        if AXES["weight"].values[weight].statistics == "update":
            continue
        before = batch.logp_behaviour[comb, 0].exp().tolist()
        expected = [
            weight_of(weight, ratio, reward, [math.log(ratio)], 0, [probability])
            for ratio, reward, probability in zip(ratios.tolist(), batch.rewards[comb].tolist(), before, strict=True)
        ]
        assert weights.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12), weight
