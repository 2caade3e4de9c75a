"""One language model whose weights are shared out among the processes of a job, by FSDP2 (`torch.distributed.fsdp`).

Passes with gradient go through `fully_shard`: each layer's weights are gathered for the layer, and every process ends
with its share of the summed gradient. All processes must make the same number of such passes. Everything else
(sampling, scoring without gradient, evaluation, saving) is done on an ordinary `TransformersPolicy` with gathered
weights, by each process at its own pace: between `gather` and `release` each of them holds all weights once, in the
precision of the computation.

A share of a trained weight is float32 where the computation has 16 bits: it is the master weight. Each process reads
the checkpoint itself, and holds all of its weights in host memory until they are shared out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from klab.harness.policy.categorical import Draw
from klab.harness.policy.hf.functional_model import FunctionalModel
from klab.harness.policy.hf.policy import TransformersPolicy
from klab.harness.policy.policy import BlockDecoder, IncrementalDecoder, Policy
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.scores import ScoreOptions, TokenScores

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

Shares = Mapping[str, "DTensor"]
"""Parameters by name, of which each process has some rows."""


class ShardedWeights:
    """Weights that are shared out, and, while somebody needs them, gathered.

    Attributes:
        shares: by name.
        dtype: of the gathered tensors.
        whole: the gathered tensors by name; empty while nobody has asked for them.
    """

    def __init__(self, shares: Shares, dtype: torch.dtype, device: torch.device) -> None:
        self.shares, self.dtype, self.device = shares, dtype, device
        self.whole: dict[str, Tensor] = {}
        self._users = 0

    def gather(self) -> None:
        """Collective: gather all of them, unless they are."""
        self._users += 1
        if self._users == 1:
            self.whole = {name: self._gathered(share) for name, share in self.shares.items()}

    def release(self) -> None:
        self._users -= 1
        if not self._users:
            self.whole = {}

    @torch.no_grad()
    def _gathered(self, share: DTensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        own = share.to_local().to(self.device, self.dtype)
        placed = DTensor.from_local(
            own, share.device_mesh, share.placements, run_check=False, shape=share.shape, stride=share.stride()
        )
        return placed.full_tensor()

    def frozen_copy(self) -> ShardedWeights:
        """A copy in the precision of the computation, where the shares lie."""
        with torch.no_grad():
            copies: Any = {name: share.detach().clone().to(self.dtype) for name, share in self.shares.items()}
        return ShardedWeights(copies, self.dtype, self.device)


class ShardedPolicy:
    """A `Policy` of one cell. Only `score` with gradients enabled, and `frozen_copy` as it is, work without `gather`.

    Attributes:
        parameters: the shares that are trained, without a leading axis of cells.
        trained: the same, to be gathered; with adapters, only these.
        frozen: all other weights.
    """

    cells = 1

    def __init__(
        self,
        template: TransformersPolicy,
        model: FunctionalModel | None,
        trained: ShardedWeights,
        frozen: ShardedWeights,
    ) -> None:
        self._template, self._model = template, model
        self.trained, self.frozen = trained, frozen
        self.parameters: dict[str, Tensor] = {} if model is None else dict(trained.shares)
        self.tokenizer, self.encode_prompt = template.tokenizer, template.encode_prompt
        self.vocab_size, self.hidden_size = template.vocab_size, template.hidden_size
        self.context_length, self.eos_token_ids = template.context_length, template.eos_token_ids
        self.config, self.origin, self.revision = template.config, template.origin, template.revision

    @classmethod
    def shared_out(
        cls,
        policy: TransformersPolicy,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        offload: Literal["none", "cpu"] = "none",
        gradient_checkpointing: bool = False,
    ) -> ShardedPolicy:
        """Share out the weights of a policy of one cell, which all processes have read from the same checkpoint.

        Args:
            policy: on the CPU; it gives its weights away.
            device: where this process computes.
            group: the processes, over the device's own connections; None: all of the job.
            offload: where the shares lie between uses: on the device, or in host memory.
        """
        from torch.distributed.tensor import DTensor

        dtype = next(iter(policy.parameters.values())).dtype
        frozen = next(iter(policy.shared.values())).dtype if policy.shared else dtype
        wide = torch.promote_types(dtype, torch.float32)
        model = copy.deepcopy(policy.model)
        trained = {name: value.detach()[0].to(wide) for name, value in policy.parameters.items()}
        names = set(trained)
        model.put_parameters(policy.shared, requires_grad=False)
        model.put_parameters(trained, requires_grad=True)
        policy.parameters, policy.shared = {}, {}
        del trained
        if gradient_checkpointing:
            model.enable_gradient_checkpointing()
        _fully_shard(model, _mesh(device, group), dtype, wide, offload)
        shares: dict[str, DTensor] = {}
        for name, value in model.parameters().items():
            assert isinstance(value, DTensor)
            shares[name] = value
        policy.model.move_buffers(device)
        return cls(
            policy,
            model,
            ShardedWeights({name: share for name, share in shares.items() if name in names}, dtype, device),
            ShardedWeights({name: share for name, share in shares.items() if name not in names}, frozen, device),
        )

    @property
    def device(self) -> torch.device:
        return self.trained.device

    @property
    def dtype(self) -> torch.dtype:
        return self.frozen.dtype

    def gather(self) -> None:
        """Collective: let every process hold all weights, until each has called `release` as often."""
        self.frozen.gather()
        self.trained.gather()

    def release(self) -> None:
        self.frozen.release()
        self.trained.release()

    def whole(self) -> TransformersPolicy:
        """An ordinary policy without gradient on the gathered weights."""
        if len(self.trained.whole) + len(self.frozen.whole) < len(self.trained.shares) + len(self.frozen.shares):
            raise RuntimeError("the weights are shared out among processes: gather them first")
        parameters = {name: value.unsqueeze(0) for name, value in self.trained.whole.items()}
        found = self._template.with_weights(parameters, self.frozen.whole, 1)
        found.origin, found.revision = self.origin, self.revision
        return found

    def score(self, rollouts: Sequence[Rollout], options: ScoreOptions) -> list[TokenScores]:
        """As `TransformersPolicy.score`; with gradient enabled it is collective."""
        if not torch.is_grad_enabled():
            return self.whole().score(rollouts, options)
        if self._model is None:
            raise RuntimeError("a frozen policy has no gradient")
        return self._template.scores_of_model(self._model, rollouts, options)

    def decoder(
        self,
        prompts: Sequence[Sequence[Sequence[int]]],
        group_size: int,
        plain: bool = False,
        kept_tokens: int = 0,
    ) -> IncrementalDecoder:
        return self.whole().decoder(prompts, group_size, plain)

    def block_decoder(
        self, prompts: Sequence[Sequence[Sequence[int]]], group_size: int, max_new_tokens: int, draw: Draw
    ) -> BlockDecoder | None:
        return self.whole().block_decoder(prompts, group_size, max_new_tokens, draw)

    def frozen_copy(self, dtype: torch.dtype | None = None) -> Policy:
        """See `Policy`: shared out as well, or, in another precision, a whole copy of gathered weights. Of a policy
        with adapters it is the model without them, as before the first update, when they add nothing."""
        if dtype is not None:
            return self.whole().frozen_copy(dtype)
        if self.frozen.shares:
            return ShardedPolicy(self._template, None, ShardedWeights({}, self.dtype, self.device), self.frozen)
        return ShardedPolicy(self._template, None, self.trained.frozen_copy(), self.frozen)

    def trailing_copy(self) -> Policy:
        """References of weights that are shared out stay where they are (`grid/kl_settings.py`)."""
        raise RuntimeError("the reference of a sharded policy does not move")

    def sampling_copy(self, dtype: torch.dtype, earlier: Policy | None) -> Policy:
        """See `Policy`; a new one."""
        return self.whole().sampling_copy(dtype, earlier)

    def select(self, cells: Sequence[int]) -> Policy:
        return self.whole().select(cells)

    def save(self, path: str | Path, cell: int) -> None:
        self.whole().save(path, cell)

    def named_weights(self, cell: int) -> Iterator[tuple[str, Tensor]]:
        return self.whole().named_weights(cell)

    def load(self, path: str | Path, cell: int) -> None:
        """Packs of sharded policies have one cell, which is read from its own checkpoint."""
        raise RuntimeError("weights that are shared out cannot be replaced")

    def release_memory(self) -> None:
        """Nothing is kept between calls."""


def _fully_shard(
    model: FunctionalModel,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    wide: torch.dtype,
    offload: Literal["none", "cpu"],
) -> None:
    """Apply FSDP2 to every decoder layer and to the rest. Gradients are summed over the processes, not averaged: each
    of them has a part of the loss, which is divided by the denominators of all of it."""
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    narrow = dtype != wide
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(dtype, wide) if narrow else MixedPrecisionPolicy(),
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
        if offload == "cpu"
        else OffloadPolicy(),
    }
    for layer in _layers(model.base):
        fully_shard(layer, **options)
    fully_shard(model.model, **options)
    for module in model.model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _layers(base: Any) -> list[nn.Module]:
    """The decoder layers: the modules that transformers keeps on one device where it spreads a model over several."""
    names: Iterable[str] = getattr(base, "_no_split_modules", None) or ()
    return [module for module in base.modules() if type(module).__name__ in set(names)]


def _mesh(device: torch.device, group: dist.ProcessGroup | None) -> DeviceMesh:
    """The processes of a group, or this process alone where it trains alone."""
    from torch.distributed import HashStore  # type: ignore[attr-defined]
    from torch.distributed.device_mesh import DeviceMesh

    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    everyone = group or dist.group.WORLD
    assert everyone is not None
    return DeviceMesh.from_group(everyone, device.type)
