"""Messages between processes: what arrives is what was sent, and what was not sent is refused."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klab.harness.policy.rollout import Rollout
from klab.harness.training.data.generate import generate
from klab.harness.training.distributed.commands import Command
from klab.harness.training.distributed.messages import ForgedMessage, decode, encode
from klab.harness.training.evaluation import held_out
from klab.harness.training.forward import ForwardPass
from klab.harness.training.pack import Pack
from klab.harness.training.runner import prepare_cell
from klab.tasks import Score
from tests.support.training_records import MakeRun

SECRET = b"of the job"

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
keys = st.integers() | st.text()
nested = st.recursive(
    plain, lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner), max_leaves=20
)


def sent(value: Any) -> Any:
    return decode(encode(value, SECRET, 1, 7), SECRET, 1, 7)


@given(nested)
def test_plain_values_arrive_as_they_were(value: Any) -> None:
    found = sent(value)
    assert found == value
    assert repr(found) == repr(value)  # also the types: (1,) is not [1], True is not 1, −0.0 is not 0.0


def test_numbers_of_other_libraries_and_without_end_arrive() -> None:
    found = sent([numpy.float32(0.5), numpy.int64(3), math.inf, math.nan])
    assert found[:3] == [0.5, 3, math.inf]
    assert math.isnan(found[3])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_arrive_bit_by_bit_with_type_and_shape(dtype: torch.dtype) -> None:
    base = torch.arange(12).view(3, 4).to(dtype)
    value = [base, base, base.T, base[:, 1], base[:0], base.sum().to(dtype), base.double().requires_grad_()]
    for mine, theirs in zip(value, sent(value), strict=True):
        assert (theirs.dtype, theirs.shape, theirs.requires_grad) == (mine.dtype, mine.shape, False)
        assert torch.equal(theirs, mine)


def test_what_training_exchanges_arrives(make_run: MakeRun) -> None:
    run = make_run()
    pack = Pack([prepare_cell(run, run.cell(run.cells[0]))[0]])
    examples = [held_out(pack.members[0])]
    (rollout,) = generate(pack.policy, pack.members, examples, 2, ("test",), pack.settings.max_new_tokens)
    score = Score(0.5, True, {"format": 1.0})
    value = [rollout, ForwardPass(rollout.logp, rollout.logp, values=rollout.logp), [score], Command("advance", 2)]
    there, passed, scores, command = sent(value)
    assert isinstance(there, Rollout)
    assert (there.prompts, there.texts, there.group_size) == (rollout.prompts, rollout.texts, 2)
    assert torch.equal(there.tokens, rollout.tokens)
    assert torch.equal(there.logp, rollout.logp)
    assert isinstance(passed, ForwardPass)
    assert passed.logits is None
    assert (scores, command) == ([score], Command("advance", 2))


class Foreign:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_other_objects_are_not_sent_and_pickles_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="values of type Foreign cannot be sent"):
        encode([Foreign(tmp_path / "seen")], SECRET, 0, 0)
    with pytest.raises(ForgedMessage):
        decode(pickle.dumps(Foreign(tmp_path / "seen")), SECRET, 0, 0)
    assert not (tmp_path / "seen").exists()


@pytest.mark.parametrize("place", [0, 9, 40, -1])
def test_a_message_that_was_changed_is_refused(place: int) -> None:
    message = bytearray(encode({"step": torch.ones(3)}, SECRET, 0, 0))
    message[place] ^= 1
    with pytest.raises(ForgedMessage, match="message 0 of process 0 does not carry the secret"):
        decode(bytes(message), SECRET, 0, 0)


@pytest.mark.parametrize(("secret", "sender", "number"), [(b"guessed", 1, 7), (SECRET, 2, 7), (SECRET, 1, 8)])
def test_a_message_of_somebody_else_or_of_another_moment_is_refused(secret: bytes, sender: int, number: int) -> None:
    with pytest.raises(ForgedMessage):
        decode(encode("stop", SECRET, 1, 7), secret, sender, number)
