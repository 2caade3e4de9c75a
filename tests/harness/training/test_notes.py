"""What is said beforehand of a cell's data and of the distribution that its tokens come from."""

from __future__ import annotations

import pytest
import torch

from klab.grid import Objective, UserError
from klab.grid.schema.sections import Sampler, TrainingSection, load_section
from klab.harness.policy.scores import token_scores
from klab.harness.training.data.notes import divergence_notes, precision_notes, sampling_notes, small_set_notes
from klab.harness.training.pack import Pack
from klab.harness.training.runner import prepare_cell
from tests.support.training_records import MakeRun


def test_small_sets_are_named_with_both_numbers() -> None:
    training = TrainingSection(prompts=64, evaluation_prompts=640)
    assert list(small_set_notes(training, 64, 640)) == []
    held_out, train = small_set_notes(training, 36, 4)
    assert held_out.startswith("training.evaluation_prompts: 640, but 4 prompts are held out")
    assert train.startswith("training.prompts: 64, but there are 36 to train on")


def test_tokens_of_another_distribution_are_named() -> None:
    assert list(sampling_notes(TrainingSection(temperature=0.7))) == []
    (note,) = sampling_notes(TrainingSection(top_p=0.9))
    assert note.startswith("training.top_p: 0.9: tokens are drawn from the most likely ones")
    (note,) = sampling_notes(TrainingSection(sampler=Sampler(temperature=0.5)))
    assert note.startswith("training.sampler.temperature: 0.5")
    assert list(sampling_notes(TrainingSection(sampler=Sampler(temperature=0.5, correction="tis")))) == []
    (note,) = sampling_notes(TrainingSection(sampler=Sampler(engine="vllm", url="http://a:1")))
    assert note.endswith("the cell's numbers are not repeatable")


def test_divergences_that_do_not_lower_what_they_measure_are_named() -> None:
    charged = {"placement": "reward_to_go", "divergence": "forward"}
    (note,) = divergence_notes(Objective(estimator="k3", **charged))
    assert note.startswith("placement: reward_to_go with divergence: forward: a k3 that is not differentiated")
    assert list(divergence_notes(Objective(estimator="reinforce", **charged))) == []
    (note,) = divergence_notes(Objective(estimator="reinforce", placement="loss", divergence="jeffreys"))
    assert "whose estimators are k1, k3 and full" in note
    for quiet in ({"estimator": "k3", "placement": "loss", "divergence": "forward"}, {"placement": "reward"},
                  {"estimator": "k2", **charged}, {"placement": "none", "divergence": "forward"}):  # fmt: skip
        assert list(divergence_notes(Objective(**quiet))) == []


@pytest.mark.parametrize("correction", ["ratio", "tis", "icepop"])
def test_corrections_to_the_whole_softmax_are_refused_beside_top_p(correction: str) -> None:
    section = {"sampler": {"correction": correction}, "top_p": 0.9}
    with pytest.raises(UserError, match=r"training\.sampler\.correction.*over the whole vocabulary"):
        load_section("training", section)
    load_section("training", {**section, "top_p": 1.0})


def test_log_probabilities_are_of_the_whole_tempered_softmax_whatever_top_p(make_run: MakeRun) -> None:
    """Behaviour, trainer and reference alike; the policy is the reference before the first update."""
    run = make_run(training={"temperature": 0.7, "top_p": 0.4})
    pack = Pack([prepare_cell(run, run.cell(run.cells[0]))[0]])
    pack.collect_due_rollouts()
    (experience,) = pack.pending[0]
    with torch.no_grad():
        logits = token_scores(pack.policy, [experience.rollout], logits=True, plain=True)[0].logits
        assert logits is not None
        whole = (logits.double() / 0.7).log_softmax(-1)
    mask = experience.rollout.mask
    expected = whole.gather(-1, experience.rollout.tokens[:, -whole.shape[1] :, None]).squeeze(-1)
    for found in (experience.rollout.logp, experience.reference_logprobs):
        torch.testing.assert_close(found[mask].double(), expected[mask], rtol=0, atol=1e-5)


def test_a_precision_that_does_not_suit_the_device_is_said() -> None:
    narrow, wide = (load_section("policy", {"name": "hf", "model": "m", "dtype": d}) for d in ("bfloat16", "float32"))
    tiny = load_section("policy", {"name": "tiny"})
    said = {(p, gpu): list(precision_notes(p, gpu)) for p in (narrow, wide, tiny) for gpu in (True, False)}  # type: ignore[arg-type]
    assert {key for key, notes in said.items() if notes} == {(wide, True), (narrow, False)}
    assert "resources.gpus: 1" in said[wide, True][0]
