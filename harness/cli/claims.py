"""`klab claims`: statements of papers and posts with their verdicts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klab.grid import UserError
from klab.harness.cli.arguments import JsonOption
from klab.harness.cli.table import console, show, table
from klab.harness.cli.text import say, show_json

if TYPE_CHECKING:
    from klab.harness.claims.claim import Finding

COLOURS = {
    "holds": "green",
    "holds under its condition": "green",
    "overclaimed": "yellow",
    "fails": "red",
    "not decided here": "dim",
}


def claims(
    identifiers: Annotated[
        list[str] | None, typer.Argument(metavar="[CLAIM]...", help="Ids such as C13; all of them by default.")
    ] = None,
    as_json: JsonOption = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    figures: Annotated[
        Path | None, typer.Option("--figures", metavar="DIR", help="Write the book's figures (PDF and PNG) into DIR.")
    ] = None,
) -> None:
    """Examine what the literature claims: source, statement, measured number, and the verdict that follows."""
    import torch

    from klab.harness.claims.book import examine, markdown, records

    if as_json and as_markdown:
        raise UserError("choose --json or --markdown, not both")
    torch.set_num_threads(1)
    if figures is not None:
        _draw(figures)
        if not identifiers and not as_json and not as_markdown:
            return
    findings = examine(identifiers or ())
    if as_json:
        show_json(records(findings))
    elif as_markdown:
        print(markdown(findings), end="")
    elif identifiers:
        for finding in findings:
            _print_in_full(finding)
    else:
        _print_table(findings)


def _draw(folder: Path) -> None:
    from klab.harness.claims.figures import draw_all

    for path in draw_all(folder):
        say(str(path), error=True)


def _print_table(findings: list[Finding]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from klab.harness.claims.book import measured, tally

    made = Table(box=None, pad_edge=False, header_style="bold")
    made.add_column("claim", no_wrap=True)
    made.add_column("source", max_width=24)
    made.add_column("statement", ratio=3)
    made.add_column("measured", ratio=2)
    made.add_column("verdict", no_wrap=True)
    for finding in findings:
        colour = COLOURS[str(finding.verdict)]
        differs = "" if finding.as_expected else " *"
        texts = (finding.claim.id, finding.claim.source, finding.claim.statement, measured(finding.headline))
        made.add_row(*(escape(text) for text in texts), f"[{colour}]{finding.verdict}[/]{differs}")
    console().print(made)
    console().print(f"\n{tally(findings)}")
    if not all(finding.as_expected for finding in findings):
        console().print("* another verdict than the one on record")
    console().print("`klab claims CLAIM` shows one in full.")


def _print_in_full(finding: Finding) -> None:
    from rich.markup import escape

    from klab.harness.claims.book import digits, subject

    claim, screen = finding.claim, console()
    colour = COLOURS[str(finding.verdict)]
    screen.print(f"[bold]{claim.id}[/]  [{colour}]{finding.verdict}[/]  (on record: {claim.tag})")
    screen.print(escape(claim.statement))
    screen.print(f"[dim]{escape(claim.source)}. {subject(claim)}. {finding.seconds:.2f} s[/]\n")
    if finding.numbers:
        rows = [(number.name, digits(number.value), number.book or "", number.comparison) for number in finding.numbers]
        screen.print(table(("number", "measured", "printed", ""), rows))
        screen.print()
    if finding.checks:
        show(
            ("holds", "proposition", "scope"),
            [
                (check.holds, check.proposition, "under its condition" if check.restricted else "as stated")
                for check in finding.checks
            ],
        )
        screen.print()
    for line in finding.remarks:
        screen.print(escape(line))
    screen.print()
