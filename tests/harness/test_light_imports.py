"""Which packages a tiny cell loads, from its warm-up to its result: what takes seconds to import and is not used
delays the first update of every launch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from klab.grid import Grid, load_grid
from klab.grid.libraries import needs_transformers
from klab.harness.store import Run

LOADED = """
print(json.dumps(sorted({
    name.partition(".")[0] for name, module in list(sys.modules.items())
    if "site-packages" in (getattr(module, "__file__", None) or "")
})))
"""
TRAINED = f"""
import json, sys
from pathlib import Path
from klab.harness.store import Run
from klab.harness.training import run_cells
run = Run.open(Path(sys.argv[1]))
run.cell(run.cells[0]).claim(details={{}})
assert set(run_cells(run.path, run.cells).values()) == {{"finished"}}
{LOADED}
"""
SERVED = f"""
import json, sys
sys.stdin = open("/dev/null")
from klab.harness.dispatch.local import fork_server
fork_server.main()
{LOADED}
"""

TORCH = {"torch", "torchgen", "numpy", "tqdm", "typing_extensions", "colorama", "dill", "mpmath", "sympy"}
"""torch with what it imports itself, some of it where it is installed."""
TINY = {*TORCH, "annotated_types", "jaxtyping", "pydantic", "pydantic_core", "typing_inspection", "safetensors"}
TINY |= {"tokenizers", "yaml"}
POOL = {"submitit", "cloudpickle"}


INSTALLERS = ("__editable__", "_distutils_hack")
"""What an installation adds to every process."""


def loaded(program: str, *arguments: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name for name in json.loads(done.stdout.splitlines()[-1]) if not name.startswith(INSTALLERS)}


def test_a_tiny_cell_loads_torch_and_little_else(make_grid: Callable[..., Grid], place: Path) -> None:
    make_grid(updates=2)
    policy = {"name": "tiny", "hidden": 32, "layers": 1, "warmup_accuracy": 0.2}
    text = {**json.loads((place / "little.yaml").read_text()), "name": "tiny", "policy": policy}
    (place / "tiny.yaml").write_text(json.dumps(text))
    run = Run.create(place / "runs/tiny", load_grid(place / "tiny.yaml"))
    found = loaded(TRAINED, str(run.path))
    assert "torch" in found
    assert found <= TINY


def test_the_local_pool_loads_what_its_cells_need() -> None:
    found = loaded(SERVED)
    assert "torch" in found
    assert found <= TINY | POOL
    assert "transformers" in loaded(SERVED, "transformers")


def test_which_cells_need_transformers() -> None:
    tiny = {"policy": {"name": "tiny"}, "task": {"name": "addition"}, "training": {}}
    assert not needs_transformers(tiny)
    assert not needs_transformers({**tiny, "task": {"name": "file", "reward": [{"name": "exact"}]}})
    assert needs_transformers({**tiny, "policy": {"name": "hf", "model": "x"}})
    assert needs_transformers({**tiny, "training": {"engine": "trl"}})
    assert needs_transformers({**tiny, "task": {"name": "proxy"}})
    assert needs_transformers({**tiny, "task": {"name": "file", "reward": [{"model": "x"}]}})
