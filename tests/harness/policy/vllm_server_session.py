"""What a cell does with a server, as a program: `test_vllm_server.py` runs it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm.distributed.weight_transfer import nccl_common
from vllm_server import Server

from klab.grid.errors import UserError
from klab.grid.schema.policy import Lora
from klab.grid.schema.sampler import Sampler
from klab.harness.policy.sampling.engine import EngineSettings
from klab.harness.policy.sampling.sampler import SamplingOptions
from klab.harness.policy.sampling.server_engine import ServerEngine
from klab.harness.policy.sampling.vllm import VllmSampler
from klab.harness.policy.scores import token_scores
from klab.harness.policy.stacked.policy import StackedPolicy
from tests.harness.policy.test_rollout import PROMPTS
from tests.support.tiny_policy import decoder, generators


def answering(cell: int, trajectory: int, transcript: str) -> str | None:
    return None if trajectory % 2 or len(transcript) >= 5 else transcript + "="


def refused(settings: EngineSettings, said: str) -> None:
    with pytest.raises(UserError, match=said):
        ServerEngine(settings)


def main(folder: Path) -> None:
    decoder(1).save(folder / "start")
    policy = StackedPolicy.from_pretrained(folder / "start").with_lora(Lora(rank=2), [0])
    with torch.no_grad():
        for at, value in enumerate(policy.parameters.values()):
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(at)))
    server = Server(str(folder / "start"), max_model_len=512)
    nccl_common.servers.append(server)
    settings = EngineSettings(
        Sampler(engine="vllm", url=server.url), str(folder / "start"), None, "float32", 512, "processed_logprobs"
    )
    sampler = VllmSampler(ServerEngine(settings))

    np.random.seed(3)  # the server's own draws

    def drawn(**changes: Any) -> bool:
        """Whether the environment answered."""
        temperature = changes.get("temperature", 1.0)
        options = SamplingOptions(group_size=4, max_new_tokens=9, **changes)
        (rollout,) = sampler(policy, [PROMPTS], generators([1]), options, environment=answering)
        scores = token_scores(policy, [rollout], temperature=temperature)[0].logp.detach()
        torch.testing.assert_close(rollout.logp, scores, rtol=0, atol=1e-4)
        assert len(set(rollout.texts)) > 4
        assert int(rollout.mask.sum(1).max()) <= 9
        return bool((rollout.present & ~rollout.mask).any())

    assert drawn()
    paths = [path for path, _ in server.asked]
    update = ["/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache"]
    assert paths[:6] == ["/init_weight_transfer_engine", *update, "/v1/completions"]
    assert set(paths[6:]) == {"/v1/completions"}
    sent = server.asked[2][1]["update_info"]
    expected = [(name, list(value.shape)) for name, value in policy.named_weights(0)]
    assert list(zip(sent["names"], sent["shapes"], strict=True)) == expected
    first = server.asked[5][1]
    assert len(first["prompt"]) == 4 * len(PROMPTS)
    assert "seed" not in first
    with torch.no_grad():
        for value in policy.parameters.values():
            value.mul_(0.5)
    drawn(temperature=0.7)
    assert [path for path, _ in server.asked].count("/update_weights") == 2

    refused(replace(settings, context=600), "the server must be started with --max-model-len 600")
    refused(replace(settings, logprobs_mode="raw_logprobs"), "started with --logprobs-mode raw_logprobs")
    sampler.engine.close()
    print("drawn, refused, drawn again")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
