"""The corrections for a sampler are TRL's: the gradient of its loss with its own ratios, to 1e-8."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from klab.grid import Objective
from klab.grid.schema.sections import Sampler
from tests.parity.probe import assert_same, klab_gradient, probe, relative_error

pytestmark = pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "token_truncate": ({"clip_max": 1.3}, {"correction": "tis", "cap": 1.3}),
    "token_truncate, both bounds": (
        {"clip_max": 1.3, "clip_min": 0.8},
        {"correction": "tis", "cap": 1.3, "floor": 0.8},
    ),
    "token_mask": ({"clip_max": 1.4, "clip_min": 0.7}, {"correction": "icepop", "low": 0.7, "high": 1.4}),
    "sequence_truncate": ({"clip_max": 1.3}, {"correction": "tis", "cap": 1.3, "level": "sequence"}),
    "sequence_truncate, both bounds": (
        {"clip_max": 1.3, "clip_min": 0.8},
        {"correction": "tis", "cap": 1.3, "floor": 0.8, "level": "sequence"},
    ),
    "sequence_mask": ({"clip_max": 3.0}, {"correction": "icepop", "low": 0.0, "high": 3.0, "level": "sequence"}),
    "sequence_mask, both bounds": (
        {"clip_max": 1.5, "clip_min": 0.6},
        {"correction": "icepop", "low": 0.6, "high": 1.5, "level": "sequence"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_correction_has_the_gradient_of_trl(name: str) -> None:
    from tests.parity.trl_peer import grpo_gradient

    bounds, sampler = CASES[name]
    mode = {"vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": name.partition(",")[0]}
    mode |= {f"vllm_importance_sampling_{bound}": value for bound, value in bounds.items()}
    data = probe().drawn_by_another(0.3)
    objective = Objective(
        estimator="k3",
        placement={"name": "loss_corrected", "beta": 0.1},
        advantage={"name": "group_norm", "std": "sample", "eps": 1e-4},
    )
    theirs = grpo_gradient(data, loss_type="grpo", beta=0.1, **mode)
    assert_same(f"TRL, sampler {name}", objective, data, theirs, sampler=Sampler(**sampler))
    assert relative_error(klab_gradient(objective, data), theirs) > 1e-2
