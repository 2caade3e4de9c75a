"""`klab doctor`: is this machine fit to run klab?"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import typer

from klab.grid import UserError
from klab.grid.libraries import LIBRARIES
from klab.grid.user_code import python_command
from klab.harness.cli.arguments import RUNS, JsonOption, RunsOption
from klab.harness.cli.table import show
from klab.harness.cli.text import show_json
from klab.harness.store import Lock, files, machine

Verdict = Literal["ok", "note", "problem"]

_FREE_GB = 1.0
_IMPORT_SECONDS = 180
_TORCH = (
    "import torch; c = torch.cuda.is_available(); "
    "print(torch.__version__, '; CUDA', torch.version.cuda, ';', "
    "', '.join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) if c else 'no GPU')"
)
_BITS = (
    "import torch; torch.set_num_threads(1); "
    "from klab.harness.store.kernels import kernels; "
    "print(' '.join(f'{name}={value}' for name, value in kernels().items()) or 'no choice known'); "
    "from klab.harness.policy.stacked.native.library import library; print(library() is not None); "
    "from klab.harness.training.runtime.pack_invariance import pack_invariant; print(pack_invariant())"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    verdict: Verdict
    detail: str


def doctor(runs: RunsOption = RUNS, as_json: JsonOption = False) -> None:
    """Check versions, torch and its devices, Slurm, folders, locks and disk space. Exit code 1: there is a problem."""
    findings = list(examine(runs))
    if as_json:
        show_json([asdict(finding) for finding in findings])
    else:
        show(("what", "", "details"), [(each.what, each.verdict, each.detail) for each in findings])
    if any(finding.verdict == "problem" for finding in findings):
        raise typer.Exit(1)


def examine(runs: Path) -> Iterator[Finding]:
    """All findings, quick ones first."""
    for package, version in machine.versions().items():
        yield Finding(package, "ok" if version else "problem", version or "is not installed")
    for package, version in machine.versions(LIBRARIES).items():
        if package in LIBRARIES and version:
            yield Finding(package, "ok", version)
    hardware = machine.hardware()
    yield Finding("cores", "ok", f"{hardware['cores']}, {hardware['processor']}")
    yield Finding("memory", "ok", f"{hardware['memory_gb']} GB")
    yield from _torch()
    yield _slurm()
    yield _git()
    yield from _folder(runs)


def _torch() -> Iterator[Finding]:
    """Whether torch is fit, and whether cells have the same bits alone and in packs with it on this processor."""
    try:
        yield Finding("torch works", "ok", _said(_TORCH))
        kernels, native, invariant = _said(_BITS).splitlines()[-3:]
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        yield Finding("torch works", "problem", lines[-1] if lines else "cannot be imported")
    except subprocess.TimeoutExpired:
        yield Finding("torch works", "problem", f"was not imported within {_IMPORT_SECONDS} s")
    else:
        yield Finding("kernels", "ok", kernels)
        yield _compiled(native == "True")
        yield _packs(invariant == "True")


def _said(program: str) -> str:
    command = python_command("-c", program)
    return subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=True).stdout.strip()


def _compiled(native: bool) -> Finding:
    if native:
        return Finding("compiled layers", "ok", "small float32 models compute in them on the CPU")
    missing = "there is no C compiler (cc, gcc, clang) that builds them, or KLAB_NATIVE is 0"
    return Finding("compiled layers", "note", f"{missing}: small models train about half as fast on the CPU")


def _packs(invariant: bool) -> Finding:
    if invariant:
        return Finding("packs", "ok", "a cell has the same bits alone and in any pack, with one thread per process")
    cost = "a pack would change its cells' bits on this processor, so its cells are trained one after another"
    return Finding("packs", "note", f"{cost} (see harness/README.md)")


def _slurm() -> Finding:
    if shutil.which("sbatch") is None:
        return Finding("Slurm", "note", "not on this machine (--on slurm needs it)")
    try:
        done = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("Slurm", "note", f"is installed, but its controller does not answer ({error})")
    text = " ".join((done.stdout or done.stderr).split())
    if done.returncode == 0 and "UP" in text:
        return Finding("Slurm", "ok", text)
    return Finding("Slurm", "note", f"is installed, but its controller does not answer: {text}")


def _git() -> Finding:
    commit = machine.commit(Path.cwd())
    return Finding("git commit", "ok" if commit else "note", commit or "this folder is not a git repository")


def _folder(runs: Path) -> Iterator[Finding]:
    existing = runs.resolve()
    while not existing.exists():
        existing = existing.parent
    try:
        probe = existing / ".klab-doctor"
        files.replace(probe, b"klab\n")
        probe.unlink()
        lock = Lock(existing / ".klab-doctor.lock", purpose="doctor")
        lock.acquire()
        lock.release()
        yield Finding("run folders", "ok", f"{existing} can be written, locks work")
    except (OSError, UserError) as error:
        yield Finding("run folders", "problem", str(error))
    free = shutil.disk_usage(existing).free / 2**30
    yield Finding("disk space", "ok" if free >= _FREE_GB else "problem", f"{free:.1f} GB free")
