"""What `policy.sharding` goes with, and that it is no part of a cell's identity."""

from __future__ import annotations

import json
from typing import Any

import pytest

from klab.grid import Grid, UserError, parse_grid
from klab.grid.schema.sections import load_section
from klab.harness.cli.memory import JobMemory, refuse_lone_shares

HF = {"name": "hf", "model": "some/model"}


def grid(policy: dict[str, Any], training: dict[str, Any] | None = None, **more: Any) -> Grid:
    sections = {"task": {"name": "gsm8k"}, "policy": {**HF, **policy}, "training": training or {}, **more}
    return parse_grid(json.dumps({"name": "mine", **sections}), "mine.yaml")


def test_cells_keep_their_ids_whatever_is_shared_out() -> None:
    plain, sharded = grid({}), grid({"sharding": "full", "offload": "cpu"})
    assert plain.cells[0].id == sharded.cells[0].id
    assert sharded.cells[0].resolved()["policy"]["sharding"] == "full"


@pytest.mark.parametrize(
    ("policy", "training", "message"),
    [
        ({"sharding": "ful"}, {}, r"policy\.sharding: unknown value \(got 'ful'\); did you mean 'full'\?"),
        ({"sharding": "full", "engine": "stacked"}, {}, r"policy\.sharding: .* on the transformers engine only"),
        ({"offload": "cpu"}, {}, r"policy\.offload: has no effect without policy\.sharding: full"),
        ({"sharding": "full"}, {"critic": {"kind": "head"}}, r"training\.critic: critics are not shared out"),
        ({"sharding": "full"}, {"engine": "trl"}, r"policy\.sharding: .* training\.engine: trl leaves that"),
        ({"sharding": "full"}, {"sampler": {"engine": "vllm"}}, r"training\.sampler\.engine: is given whole models"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(policy: dict[str, Any], training: dict[str, Any], message: str) -> None:
    objective = {"advantage": "gae", "placement": "none"} if "critic" in training else {}
    with pytest.raises(UserError, match=message):
        grid(policy, training, objective=objective)


@pytest.mark.parametrize(
    ("policy", "resources", "refused"),
    [
        ({"sharding": "full"}, {}, True),
        ({"sharding": "full"}, {"gpus": 1}, True),
        ({"sharding": "full"}, {"gpus": 1, "nodes": 2}, False),
        ({"sharding": "full"}, {"processes": 2}, False),
        ({"sharding": "full", "offload": "cpu"}, {}, False),
        ({}, {}, False),
    ],
)
def test_one_process_has_nobody_to_share_with(policy: dict[str, Any], resources: dict[str, Any], refused: bool) -> None:
    study = grid(policy, resources=resources)
    job = JobMemory.planned(load_section("resources", resources), None, None)  # type: ignore[arg-type]
    if refused:
        with pytest.raises(UserError, match=r"mine\.yaml: policy\.sharding: .* resources give it one .*gpus"):
            refuse_lone_shares(study, job)
    else:
        refuse_lone_shares(study, job)
