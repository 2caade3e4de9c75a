"""A vLLM server as the sampler: TRL's own client, and a server that is played (`engine/vllm_server.py`).

In a process of its own: TRL looks for vLLM once, when it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ENGINE = Path(__file__).parent / "engine"
REPOSITORY = Path(__file__).parents[3]


@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")
def test_a_server_draws_from_the_weights_that_it_was_sent(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ENGINE), str(REPOSITORY)])}
    command = [sys.executable, "-m", "tests.harness.policy.vllm_server_session", str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "drawn, refused, drawn again"
