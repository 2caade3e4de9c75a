"""What came out: tidy frames, statistics, tables, figures and one page.

>>> from klab.reports import load_run
>>> load_run("runs/quickstart").summary()  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from klab.reports.inference import analyse
    from klab.reports.page import render
    from klab.reports.study import Study, load_run, load_runs

__all__ = ["Study", "analyse", "load_run", "load_runs", "render"]


def __getattr__(name: str) -> Any:
    # pandas and matplotlib are imported when a report is asked for, not when the command line starts.
    if name == "render":
        from klab.reports.page import render

        return render
    if name == "analyse":
        from klab.reports.inference import analyse

        return analyse
    if name in __all__:
        from klab.reports import study

        return getattr(study, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
