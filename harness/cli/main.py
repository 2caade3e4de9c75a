"""The entry point `klab`: finds the command, runs it, and turns errors into messages and exit codes.

Only the module of the command that is called is imported, so that help is instant.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer

from klab.grid import UserError
from klab.harness.cli.text import say, tolerate_any_encoding
from klab.harness.store.kernels import fix_kernels

COMMANDS = {
    "plan": "Show what a grid file would run, what it would cost, and which differences it could see.",
    "launch": "Run a grid file's cells, here, on this machine's cores and GPUs, or on Slurm; again: continue.",
    "status": "Show the state of every cell of a run.",
    "logs": "Show a cell's attempts, its error and its job's output.",
    "rerun": "Repeat one cell in the foreground and compare its numbers with the stored ones.",
    "cancel": "Stop cells and take them out of the queue.",
    "hold": "Keep waiting cells from starting.",
    "release": "Let held cells start.",
    "extend": "Add seeds to a run, or to its open comparisons, without losing the error rate.",
    "confirm": "Run a run's best cells and its baseline again on fresh seeds, as a run of its own.",
    "report": "Write tables, figures and one page about one run or several.",
    "archive": "Keep a run's results in one small folder, for reports and reruns without the run.",
    "results": "Write one document about several studies, made of their reports.",
    "compare": "Compare two cells over their seeds.",
    "watch": "Watch a run live: every open cell with its curves.",
    "serve": "Show a live page of all runs in a browser: states, curves, completions, reports.",
    "gradients": "Measure bias, variance and cosine of cells' gradient estimators by enumeration.",
    "claims": "Check the book of claims.",
    "pretrain": "Train the policy that a grid's cells start from, as a model of its own.",
    "reward-model": "Train or find the reward models of a grid's proxy tasks, and say how good they are.",
    "crosscheck": "Train a cell for a few updates on klab's engine and on TRL from the same rollouts, and compare.",
    "axes": "List the axes and values of the objective, with formulas and sources.",
    "formula": "Print loss and gradient of an algorithm, a cell or a grid's configurations, as a paper would.",
    "export": "Print a cell's settings for another trainer, or say why it has none.",
    "doctor": "Check versions, devices, Slurm, folders and disk space.",
}
"""Name -> one line of help. The module `klab.harness.cli.<name>` holds a function of that name, `_` for `-`."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code: 0 fine, 1 some cells failed or the machine did, 2 the user's mistake."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    fix_kernels()
    tolerate_any_encoding()
    try:
        _app(words)(words, prog_name="klab")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except UserError as error:
        _complain(str(error))
        return 2
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        _complain(_explain(error))
        return 1
    return 0


def _app(words: Sequence[str]) -> typer.Typer:
    app = typer.Typer(
        help="A lab for KL-regularised policy gradients: ablation grids on real training, with exact gradients.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    wanted = next((word for word in words if not word.startswith("-")), None)
    for name, line in COMMANDS.items():
        app.command(name, short_help=line)(_function(name) if name == wanted else _absent)
    return app


def _options(
    version: bool = typer.Option(
        False, "--version", help="Print the version and end.", callback=lambda on: _version(on)
    ),
) -> None:
    pass


def _version(on: bool) -> None:
    if on:
        from importlib.metadata import version

        typer.echo(f"klab {version('klab')}")
        raise typer.Exit


def _function(name: str) -> Callable[..., Any]:
    word = name.replace("-", "_")
    function: Callable[..., Any] = getattr(importlib.import_module(f"klab.harness.cli.{word}"), word)
    return function


def _absent() -> None:
    raise AssertionError("a command that was not asked for has no function")


def _complain(text: str) -> None:
    say(f"klab: {text}", error=True)


def _explain(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in _FULL:
        return f"{where}the disk is full; nothing was lost. Free some space and give the same command again."
    if error.errno in _READ_ONLY:
        return f"{where}cannot be written ({error.strerror}). Choose another folder with --runs."
    if error.errno == errno.EIO:
        return f"{where}the disk reports an error ({error.strerror}); nothing was overwritten."
    return f"{where}{error.strerror or error}"


if __name__ == "__main__":
    sys.exit(main())
