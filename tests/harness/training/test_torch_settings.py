"""A training process computes with zeros in place of numbers below the normal range, in every thread and direction."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

TINY = """
import sys
import torch
from klab.harness.training.runtime.torch_settings import configure_torch
small = torch.full((2**21,), 1e-30, requires_grad=True)
with configure_torch(int(sys.argv[1])):
    assert torch.get_num_threads() == int(sys.argv[1])
    with configure_torch(int(sys.argv[1])):
        pass
    product = small * 1e-9
    product.backward(torch.full_like(small, 1e-30))
print(int(product.count_nonzero()), int(small.grad.count_nonzero()), int((small[:1] * 1e-9).count_nonzero()))
"""

PRECISION = """
import torch
from klab.harness.training.runtime.torch_settings import configure_torch
torch.set_float32_matmul_precision("medium")
with configure_torch(1):
    print(torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32)
print(torch.get_float32_matmul_precision())
"""


def test_float32_products_are_of_float32_numbers_while_a_process_trains() -> None:
    done = subprocess.run([sys.executable, "-c", PRECISION], capture_output=True, text=True)
    assert done.stdout.split() == ["highest", "False", "medium"], done.stderr


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor keeps numbers below the normal range")
@pytest.mark.parametrize("threads", [1, 2])
def test_numbers_below_the_normal_range_are_zero_while_a_process_trains(threads: int) -> None:
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # no other thread before the settings
    done = subprocess.run([sys.executable, "-c", TINY, str(threads)], capture_output=True, text=True, env=alone)
    assert done.stdout.split() == ["0", "0", "1"], done.stderr
