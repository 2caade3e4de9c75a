"""The first ten minutes on a GPU: `make gpu-proof`, or `python -m tests.benchmarks.gpu_proof`.

Everything of klab that is written for GPUs is tried once on a model of 0.5 billion parameters with random weights:
what cannot be seen without a GPU is measured, printed as it comes, and written to one Markdown page. What is not there
(TRL's environment, vLLM, a GPU) or no longer fits into the time is left out, and the page says so; a step that fails
does not keep the others from being made, but the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from klab.harness.dispatch.gpus import let_segments_grow
from klab.harness.store import files
from klab.harness.training import pack as packs
from klab.harness.training.runtime.oom import free_memory
from klab.harness.training.runtime.torch_settings import configure_torch
from tests.benchmarks import gpu
from tests.benchmarks.gpu_proof_steps import STEPS, LeftOut, Setting
from tests.benchmarks.shapes import SHAPES, write_start

SHAPE_OF = {"0.5b": "qwen2.5-0.5b", "toy": "toy"}
HERE = Path(__file__).parent


def trl_python() -> Path:
    """The interpreter of the parity tests; this one where that is not there and TRL is here."""
    own = HERE.parents[1] / ".venv-parity/bin/python"
    return Path(sys.executable) if not own.exists() and find_spec("trl") else own


def main(arguments: Sequence[str] | None = None) -> int:
    """Make all steps; 1 where one of them failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu_proof", description=__doc__)
    parser.add_argument("--setting", choices=SHAPE_OF, default="0.5b")
    parser.add_argument("--minutes", type=float, default=10.0, help="steps that would begin later are left out")
    parser.add_argument("--only", nargs="+", choices=STEPS, help="some of the steps")
    parser.add_argument("--bandwidth", type=float, help="the device's, in GB/s, where it is not known")
    parser.add_argument("--tflops", type=float, help="the device's, in TFLOP/s")
    parser.add_argument("--trl", type=Path, default=trl_python(), help="the interpreter that has TRL")
    parser.add_argument("--out", type=Path, default=HERE / "gpu_proof.md")
    given = parser.parse_args(arguments)
    let_segments_grow()
    began = time.monotonic()
    device = packs.device()
    if device.type == "cpu" and given.setting != "toy":
        raise SystemExit("there is no GPU here; --setting toy tries everything at toy size")
    sections, failed = [f"# klab on {device}, {SHAPE_OF[given.setting]}\n"], False
    with tempfile.TemporaryDirectory() as scratch, configure_torch(torch.get_num_threads()):
        shape = SHAPES[SHAPE_OF[given.setting]]
        start, deadline = write_start(Path(scratch), shape), began + 60 * given.minutes
        best = gpu.peaks(device, given.bandwidth, given.tflops)
        setting = Setting(given.setting, shape, start, device, best, given.trl, deadline)
        for title in given.only or STEPS:
            at = time.monotonic()
            try:
                if at > setting.deadline:
                    raise LeftOut(f"the {given.minutes:g} minutes are over")
                found = STEPS[title](setting)
            except LeftOut as reason:
                found = f"Left out: {reason}."
            except Exception as error:
                traceback.print_exc()
                found, failed = f"**Failed**: {type(error).__name__}: {error}", True
            free_memory()
            question = (STEPS[title].__doc__ or "").strip()
            sections.append(f"## {title}\n\n*{question}* ({time.monotonic() - at:.0f} s)\n\n{found}\n")
            print(sections[-1], flush=True)
            files.replace(given.out, "\n".join(sections).encode(), durable=False)
    print(f"{time.monotonic() - began:.0f} s; written to {given.out}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
