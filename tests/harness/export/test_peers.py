"""Exports say what the peer's code does, or why it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from klab.grid import Objective, UserError, parse_grid
from klab.grid.algorithms import algorithm_names, load_algorithm
from klab.grid.parameters import TERMS
from klab.grid.schema.sections import Critic, Rejection, Sampler, TrainingSection
from klab.harness.cli.main import main
from klab.harness.export import PEERS, Export, Setting, trl, verl
from klab.harness.export.family import Family
from klab.harness.store import Run

OFF_POLICY = TrainingSection(updates_per_rollout=2)


def exported(peer: str, training: TrainingSection = OFF_POLICY, **axes: Any) -> dict[str, Any]:
    return PEERS[peer](Setting(Objective(**axes), training)).settings


def test_grpo_in_trl() -> None:
    found = exported("trl", estimator="k3", placement="loss", beta=0.05, std="sample", eps=1e-4)
    wanted = {
        "beta": 0.05,
        "use_bias_correction_kl": False,
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "epsilon": 0.2,
        "scale_rewards": "group",
        "num_iterations": 2,
        "per_device_train_batch_size": 128,
    }
    assert {key: found[key] for key in wanted} == wanted


def test_grpo_in_verl_has_no_dual_clip() -> None:
    found = exported("verl", estimator="k3", placement="loss", beta=0.05, std="sample")
    assert found["actor_rollout_ref.actor.clip_ratio_c"] == 1e9
    assert found["actor_rollout_ref.actor.kl_loss_type"] == "k3"
    assert found["actor_rollout_ref.actor.loss_agg_mode"] == "seq-mean-token-mean"
    assert found["algorithm.norm_adv_by_std_in_grpo"] is True


def test_the_cap_is_absolute_in_trl_and_relative_in_verl() -> None:
    axes = {
        "placement": "none",
        "weight": "truncate",
        "cap": 5.0,
        "aggregation": "token_mean",
        "advantage": "group_center",
    }
    assert exported("trl", **axes)["epsilon_high"] == 5.0
    assert exported("verl", **axes)["actor_rollout_ref.actor.clip_ratio_high"] == 4.0


@pytest.mark.parametrize(
    ("peer", "axes", "said"),
    [
        ("trl", {"estimator": "k1"}, "has only k3 on this axis"),
        ("trl", {"weight": "power"}, "power"),
        ("trl", {"weight": "one"}, "one"),
        ("verl", {"weight": "ratio"}, "ratio"),
        ("trl", {"ratio": "future_mean"}, "future_mean"),
        ("trl", {"placement": "reward"}, "placement"),
        ("trl", {"divergence": "forward"}, "only reverse on this axis"),
        ("verl", {"divergence": "alpha"}, "only reverse on this axis"),
        ("verl", {"weight": "adaptive"}, "adaptive"),
        ("verl", {"estimator": "full"}, "full"),
        ("verl", {"placement": "reward"}, "kl_scale"),
        ("trl", {"weight": "dual_clip", "c": 1.1}, "must not be below 1 \\+ eps_high"),
        ("trl", {"weight": "truncate", "aggregation": "sequence_mean"}, "only token_mean on this axis"),
        ("trl", {"advantage": "leave_one_out", "placement": "none"}, "leave_one_out"),
        ("verl", {"advantage": "group_center_batch_norm"}, "group_center_batch_norm"),
        ("verl", {"ratio": "sequence_mean", "path": "ratio", "advantage": "batch_norm", "placement": "none"}, "path"),
    ],
)
def test_what_a_peer_cannot_say_is_refused_with_the_reason(peer: str, axes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        exported(peer, **axes)


@pytest.mark.parametrize(
    "training",
    [
        {"lag": 1},
        {"behaviour": "reference"},
        {"equal_groups": "drop"},
        {"sampler": {"correction": "ratio"}},
        {"sampler": {"temperature": 0.5}},
        {"trust_region": {}},
        {"beta_control": {"target": 0.1}},
        {"beta_control": {"schedule": "linear"}},
        {"reference": "rollout"},
    ],
)
@pytest.mark.parametrize("peer", PEERS)
def test_schedules_that_peers_do_not_have_are_refused(peer: str, training: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(training))):
        exported(peer, TrainingSection(**training), advantage="group_center")


def test_a_reference_that_moves_is_trls_and_refused_for_verl() -> None:
    training = TrainingSection(reference={"ema": 0.75, "update_every": 8})
    found = exported("trl", training, std="sample")
    names = ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps")
    assert [found[name] for name in names] == [True, 0.25, 8]
    with pytest.raises(
        UserError, match=r"its reference policy stays where it is.*training\.reference|training\.reference"
    ):
        exported("verl", training, advantage="group_center")


def test_what_was_answered_wrongly() -> None:
    """TRL's delta is a dual clip, its RLOOTrainer is RLOO on policy, verl's REINFORCE++ is the paper's."""

    def named(algorithm: str, peer: str) -> Export:
        return PEERS[peer](Setting(Objective(**load_algorithm(algorithm).objective)))

    assert named("intellect_2", "trl").settings["delta"] == 4.0
    rloo = named("rloo", "trl")
    assert (rloo.target, rloo.settings["beta"]) == ("arguments of trl.RLOOConfig", 0.03)
    assert any("one update per rollout" in line for line in rloo.differences)
    with pytest.raises(UserError, match=r"TRL cannot express this cell: .* has only .* \(got 'none'\)"):
        exported("trl", **load_algorithm("rloo").objective)
    assert exported("trl", TrainingSection(), **load_algorithm("rloo").objective)["num_iterations"] == 1
    found = named("reinforce_pp", "verl")
    assert found.settings["algorithm.adv_estimator"] == "reinforce_plus_plus"
    assert (found.objective.std, found.objective.eps) == ("sample", 0.0)
    assert any("1e-8 to the variance" in line for line in found.differences)


def test_corrections_for_a_sampler_are_exported() -> None:
    def both(**sampler: Any) -> list[dict[str, Any]]:
        training = TrainingSection(sampler=Sampler(engine="vllm", **sampler))
        axes = {"placement": "none", "std": "sample"}
        return [
            {
                key: value
                for key, value in exported(peer, training, **axes).items()
                if "rollout_correction" in key or "vllm" in key or "calculate" in key
            }
            for peer in ("trl", "verl")
        ]

    corrected = "algorithm.rollout_correction"
    kept = {"actor_rollout_ref.rollout.calculate_log_probs": True}
    assert both() == [{"use_vllm": True, "vllm_importance_sampling_correction": False}, {}]
    trl, verl = both(correction="icepop", low=0.4, high=3.0, level="sequence")
    assert (trl["vllm_importance_sampling_mode"], trl["vllm_importance_sampling_clip_min"]) == ("sequence_mask", 0.4)
    assert verl == {f"{corrected}.rollout_is": "sequence", f"{corrected}.rollout_is_threshold": "0.4_3.0", **kept}
    rejecting = TrainingSection(sampler=Sampler(reject=Rejection(high=2.0)))
    found = exported("verl", rejecting, placement="none")
    assert found[f"{corrected}.rollout_rs"] == "seq_mean_k1"
    assert found[f"{corrected}.rollout_rs_threshold"] == "0.5_2.0"
    for peer, sampler, axes in [
        ("trl", {"reject": Rejection(high=2.0)}, {}),
        ("verl", {"reject": Rejection(high=2.0)}, {"placement": "loss"}),
        ("verl", {"reject": Rejection(high=2.0)}, {"placement": "none", "aggregation": "token_mean"}),
        ("verl", {"correction": "tis", "floor": 0.5}, {}),
        ("trl", {"correction": "tis"}, load_algorithm("rloo").objective),
    ]:
        with pytest.raises(UserError, match=r"training\.sampler"):
            exported(peer, TrainingSection(sampler=Sampler(**sampler)), **axes)
    again = TrainingSection(sampler=Sampler(correction="tis"), updates_per_rollout=2)
    with pytest.raises(UserError, match="VESPO takes the correction into the kernel"):
        exported("trl", again, **load_algorithm("vespo").objective)


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"placement": "reward", "kl_scale": "mean"}, "kl_scale"),
        ({"placement": "reward_to_go", "kl_scale": "sum", "kl_at": "current"}, "kl_at"),
        ({"placement": "reward", "kl_scale": "sum", "estimator": "full"}, "no logits"),
        ({"placement": "reward", "kl_scale": "sum", "estimator": "k1", "divergence": "forward"}, "reverse KL there"),
        ({"weight": "adaptive"}, "a whole update at once"),
        ({"weight": "second_moment_mask"}, "a whole update at once"),
        ({"advantage": "optimal_token_baseline"}, "no parts of rewards"),
        ({"aggregation": "prompt_mean"}, "denominators"),
        ({"advantage": "gae"}, "estimators of its own"),
        ({"aggregation": "own.module:function"}, "denominators"),
        ({"placement": "reward", "kl_scale": "sum", "advantage": "own.module:function"}, "not the task's"),
    ],
)
def test_what_the_plugin_cannot_is_refused_with_the_reason(axes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"verl with klab's plugin cannot express this cell: .*{said}|{said}"):
        exported("verl-plugin", **axes)


def test_the_plugin_trains_what_verl_has_no_words_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        "name: one\ntask: {name: addition}\npolicy: {name: tiny}\ntraining: {updates_per_rollout: 2}\n"
        "objective: {ratio: future_mean, weight: power, advantage: position_norm, estimator: k2}\n"
    )
    run = Run.create(tmp_path / "one", parse_grid(text, "one.yaml"))
    command = ["export", run.cells[0], "--runs", str(tmp_path), "--json", "--to"]
    assert main([*command, "verl"]) == 2
    capsys.readouterr()
    assert main([*command, "verl-plugin"]) == 0
    found = json.loads(capsys.readouterr().out)["settings"]
    actor = "actor_rollout_ref.actor"
    assert found["+ray_kwargs.ray_init.runtime_env.env_vars.KLAB_CELL"] == str(run.cell(run.cells[0]).path.absolute())
    assert (found["algorithm.adv_estimator"], found[f"{actor}.policy_loss.loss_mode"]) == ("klab", "klab")
    assert (found[f"{actor}.use_kl_loss"], found[f"{actor}.kl_loss_coef"]) == (True, 0.0)
    assert found[f"{actor}.ppo_epochs"] == 2
    positive = {"placement": "reward", "kl_scale": "mean", "advantage": "positive"}  # has no KL at all
    assert exported("verl-plugin", **positive)["algorithm.use_kl_in_reward"] is False


def test_a_critic_is_exported_where_it_is_verls() -> None:
    algorithm = load_algorithm("ppo_rlhf")
    critic = {"critic": Critic(lr=1e-3, clip=None, warmup_updates=3)}
    found = exported("verl", TrainingSection(updates_per_rollout=2, **critic), **algorithm.objective)
    assert found["algorithm.adv_estimator"] == "gae"
    assert (found["critic.optim.lr"], found["critic.cliprange_value"]) == (1e-3, 1e9)
    assert found["trainer.critic_warmup"] == 2
    with pytest.raises(UserError, match=r"training\.critic: .* a model of their own"):
        exported("verl", OFF_POLICY, **algorithm.objective)
    with pytest.raises(UserError, match="whiten"):
        exported("verl", TrainingSection(**critic), **{**algorithm.objective, "whiten": "none"})


@pytest.mark.parametrize("families", [trl.FAMILIES, verl.FAMILIES], ids=["trl", "verl"])
def test_every_point_of_the_table_is_exported_with_its_own_settings(families: tuple[Family, ...]) -> None:
    """So that what `tests/parity` compares is what is exported."""
    peer = PEERS["trl" if families is trl.FAMILIES else "verl"]
    count = 0
    for family in families:
        for objective in family.points(beta=0.3, eps_low=0.1, eps_high=0.15, c=1.6, cap=1.3):
            found = peer(Setting(objective))
            assert found.target == family.target
            assert found.objective.canonical() == objective.canonical()
            assert found.settings.items() >= family.settings(found.objective).items()
            count += 1
    assert count > 200


def test_selection_is_exported_where_a_peer_has_it() -> None:
    selecting = TrainingSection(equal_groups="refill", refill_rounds=4, overlong_buffer=3)
    found = PEERS["verl"](Setting(Objective(advantage="group_center"), selecting))
    assert found.settings["algorithm.filter_groups.max_num_gen_batches"] == 5
    assert any("up to 1 over the last 3 tokens" in line for line in found.differences)
    assert exported("trl", TrainingSection(truncated="mask"), std="sample")["mask_truncated_completions"] is True
    for peer, training in (("trl", selecting), ("verl", TrainingSection(truncated="mask"))):
        with pytest.raises(UserError, match=r"training\.(equal_groups|truncated)"):
            PEERS[peer](Setting(Objective(std="sample"), training))


def test_an_algorithm_that_is_more_than_its_loss_says_what_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "dapo", "--to", "verl", "--json"]) == 0
    (said,) = [line for line in json.loads(capsys.readouterr().out)["differences"] if "left out" in line]
    assert "'equal_groups': 'refill'" in said


@pytest.mark.parametrize("peer", PEERS)
def test_every_named_algorithm_is_exported_or_explained(peer: str) -> None:
    done = []
    for name in algorithm_names():
        try:
            PEERS[peer](Setting(Objective(**load_algorithm(name).objective)))
        except UserError as error:
            assert error.key in (*Objective().settings(), *TERMS, "kl_scale", "kl_at")  # noqa: PT017
        else:
            done.append(name)
    assert {"grpo", "dapo", "dr_grpo", "gspo"} <= set(done)


def test_what_stays_different_is_said() -> None:
    said = PEERS["trl"](Setting(Objective(std="population", eps=1e-6))).differences
    assert ["sample standard deviation" in line for line in said] == [True, False]
    assert "0.0001" in said[1]
    assert not PEERS["trl"](Setting(Objective(std="sample", eps=1e-4))).differences


def test_on_policy_the_weight_does_not_matter() -> None:
    on_policy = TrainingSection()
    assert exported("trl", on_policy, weight="power") == exported("trl", on_policy, weight="ppo_clip")


def test_a_cell_of_a_run_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        "name: one\ntask: {name: addition}\npolicy: {name: tiny}\n"
        "training: {updates_per_rollout: 2, lr: 0.003}\nobjective: {algorithm: dr_grpo}\n"
    )
    run = Run.create(tmp_path / "one", parse_grid(text, "one.yaml"))
    assert main(["export", run.cells[0], "--to", "trl", "--runs", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["learning_rate"] == 0.003
    assert main(["export", "grpoo", "--to", "trl", "--runs", str(tmp_path)]) == 2
    assert "did you mean 'grpo'" in capsys.readouterr().err
