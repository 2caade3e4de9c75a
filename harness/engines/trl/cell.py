"""One cell's training on TRL, from its checkpoint to its result, in this process or in one of several."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging
from trl import GRPOConfig

from klab.grid.schema.evaluate import Evaluations
from klab.harness.engines.trl import checkpoints
from klab.harness.engines.trl.recorder import Recorder
from klab.harness.engines.trl.rollout_trainer import EXAMPLE, RolloutFunction
from klab.harness.engines.trl.settings import check_fields, grpo_arguments
from klab.harness.engines.trl.trainer import KlabTrainer
from klab.harness.engines.trl.turns import complete_turns
from klab.harness.engines.trl.update import check_inputs
from klab.harness.objective import LossCoefficients
from klab.harness.policy.hf import peft
from klab.harness.policy.preferences import starting_point
from klab.harness.policy.pretrained import (
    ADAPTER_CONFIG,
    GENERATION_CONFIG,
    read_config,
    read_generation_config,
    read_tokenizer,
    write_generation_config,
)
from klab.harness.policy.special_tokens import eos_token_ids
from klab.harness.store import CellFolder, Run
from klab.harness.training.data.overlong import check_overlong_buffer
from klab.harness.training.data.rollouts import prompt_indices
from klab.harness.training.distributed.network import collective_minutes
from klab.harness.training.distributed.rendezvous import COLLECTIVE_MINUTES
from klab.harness.training.finalize import conclude, partial_policy
from klab.harness.training.pack import device
from klab.harness.training.packed_cell import PackedCell
from klab.harness.training.runner import Progress


class StopRequested(Exception):
    """A stop was requested while the initial policy was being trained; nothing of it is kept."""


def prepare_member(run: Run, folder: CellFolder, stop: Callable[[], bool] = lambda: False) -> PackedCell:
    """Load a cell's task, and make its initial policy unless the run has it."""
    cell = folder.cell()
    check_fields(cell.training)
    check_inputs(cell.objective)

    def watch(update: int, at_most: int, accuracy: float) -> None:
        if stop():
            raise StopRequested

    task, start = starting_point(cell.task, cell.policy, cell.seed, run.policies, watch)
    member = PackedCell(cell, task, start, run.created)
    check_overlong_buffer(member)
    return member


def make_trainer(
    member: PackedCell,
    folder: Path,
    processes: int = 1,
    halved: bool = False,
    rollout_function: RolloutFunction | None = None,
    minutes: float = COLLECTIVE_MINUTES,
) -> KlabTrainer:
    """The trainer of a cell, before its first update.

    Args:
        folder: for checkpoints.
        processes: that train together.
        halved: with half of the micro-batch that the cell asks for.
        rollout_function: draws the completions instead of TRL.
        minutes: how long processes may wait for one another.
    """
    tokenizer = read_tokenizer(member.start, _trusted(member))
    tokenizer.padding_side = "left"
    vocabulary = read_config(member.start, _trusted(member)).get_text_config().vocab_size
    ends = sorted(eos_token_ids(tokenizer, read_generation_config(member.start), vocabulary))
    on_cpu = device().type == "cpu"
    arguments = grpo_arguments(member, folder, processes, ends, on_cpu=on_cpu, halved=halved, minutes=minutes)
    if rollout_function is None and getattr(member.task, "interactive", True):
        rollout_function = complete_turns
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    lora = member.cell.policy.lora
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = KlabTrainer(
            member,
            args=GRPOConfig(**arguments),
            train_dataset=prompt_dataset(member),
            processing_class=tokenizer,
            peft_config=None if lora is None else peft.lora_config(lora),
            rollout_func=rollout_function,
        )
    trainer.remove_callback(PrinterCallback)
    if lora is not None and not trainer.is_sharded:
        _draw_adapters(trainer.model, member.cell.seed)
    return trainer


def prompt_dataset(member: PackedCell) -> Dataset:
    """The prompts of all rollouts of a cell in order: those that klab's own engine draws."""
    split, training = member.split("train"), member.cell.training
    numbers = range(member.schedule.rollouts)
    indices = [index for number in numbers for index in prompt_indices(member, number, len(split))]

    def with_prompts(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {EXAMPLE: rows[EXAMPLE], "prompt": [split[index].prompt for index in rows[EXAMPLE]]}

    assert len(indices) == len(numbers) * training.prompts
    return Dataset.from_dict({EXAMPLE: indices}).with_transform(with_prompts)


def train(
    run: Run,
    folder: CellFolder,
    *,
    processes: int = 1,
    progress: Callable[[Progress], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    halved: bool = False,
) -> str:
    """Train a cell from where it is to its end, or until it is asked to stop.

    Args:
        processes: that train it together, of which this is one.
        stop: asked by process 0 where a rollout is used up.
        halved: with half of the micro-batch that the cell asks for, which changes no gradient.

    Returns:
        `finished`, `diverged`, `stopped` (its result is written), or `interrupted` (a checkpoint is there if there was
        a rollout).
    """
    try:
        member = prepare_member(run, folder, stop)
    except StopRequested:
        return "interrupted"
    try:
        trainer = make_trainer(member, folder.checkpoint, processes, halved, minutes=collective_minutes(run))
        state = _resumed(folder, trainer)
        if state is not None:
            trainer.coefficients = state.coefficients
            if trainer.moves_reference:
                checkpoints.read_reference(state, trainer.reference_weights())
        recorder = Recorder(folder, trainer, progress, stop, state)
        trainer.add_callback(recorder)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # of TRL's own calls
            trainer.train(resume_from_checkpoint=None if state is None else str(state.path))
        if recorder.state != "interrupted":
            libraries = run.libraries(folder.id)
            ended, hopeless = recorder.state == "diverged", recorder.hopeless
            return finalize(folder, trainer, libraries, ended, hopeless, run.evaluations, stop)
        return recorder.state
    finally:
        reset_accelerate()


def _resumed(folder: CellFolder, trainer: KlabTrainer) -> checkpoints.TrainerState | None:
    """The state that process 0 finds, in all processes."""

    def found() -> list[Any] | None:
        state = checkpoints.resume(folder) if trainer.group.is_main else None
        if state is None:
            return None
        return [str(state.path), state.update, state.streak, asdict(state.coefficients)]

    plain = trainer.group.all_gather_object("where to go on", found)[0]
    if plain is None:
        return None
    path, update, streak, coefficients = plain
    return checkpoints.TrainerState(Path(path), update, streak, LossCoefficients(**coefficients))


def finalize(
    folder: CellFolder,
    trainer: KlabTrainer,
    libraries: Sequence[str],
    diverged: bool,
    hopeless: str | None = None,
    evaluations: Evaluations | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> str:
    """Save the policy, evaluate it and write the result. All processes call it, process 0 writes.

    Args:
        libraries: optional ones that the cell uses.
        diverged, hopeless, evaluations, stop: see `conclude`.

    Returns:
        the cell's state, in all processes.
    """
    group = trainer.group

    def emptied() -> str | None:
        return str(partial_policy(folder)) if group.is_main else None

    partial = Path(group.all_gather_object("where the policy is saved", emptied)[0] or "")
    save_policy(trainer, partial)
    state = ""
    if group.is_main:
        state = conclude(
            folder,
            partial,
            trainer.member.cell.training.updates,
            group.size,
            trainer.accelerator.device,
            diverged,
            hopeless,
            libraries,
            evaluations,
            stop,
        )
    return group.all_gather_object("the end", lambda: state)[0]


def save_policy(trainer: KlabTrainer, path: Path) -> None:
    """Write the policy in training as a folder that transformers (or PEFT, if it has adapters) loads."""
    policy = trainer.member.cell.policy
    if policy.lora is not None:
        config = trainer.model.peft_config["default"]
        config.base_model_name_or_path, config.revision = str(trainer.member.start.absolute()), None
        if policy.name == "hf" and not Path(policy.model).expanduser().is_dir():
            config.base_model_name_or_path, config.revision = policy.model, policy.revision
    trainer.save_model(str(path), _internal_call=True)
    if not trainer.group.is_main:
        return
    for name in ("training_args.bin", "README.md", GENERATION_CONFIG):
        (path / name).unlink(missing_ok=True)
    if not (path / ADAPTER_CONFIG).exists():
        write_generation_config(path, read_generation_config(trainer.member.start))


def reset_accelerate() -> None:
    """Forget the accelerator of the last trainer, so that the next one of this process may have another precision."""
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    GradientState._reset_state()
    gc.collect()


def _draw_adapters(model: Any, seed: int) -> None:
    """Start the adapters where klab's own engine starts them: a function of the cell's seed."""
    adapters = {name: weight for name, weight in model.named_parameters() if peft.is_adapter(name)}
    drawn = peft.initial_weights({name: weight.detach() for name, weight in adapters.items()}, [seed])
    with torch.no_grad():
        for name, weight in adapters.items():
            weight.copy_(drawn[name][0])


def _trusted(member: PackedCell) -> bool:
    return bool(getattr(member.cell.policy, "trust_remote_code", False))
