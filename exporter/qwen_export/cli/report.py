"""A verification on the terminal, as `export` and `verify` show it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from qwen_common.errors import BELOW_THE_BAR, one_line

if TYPE_CHECKING:
    from qwen_export.checkpoint.checkpoint import Checkpoint


def verified(
    artifact: Path,
    checkpoint: Checkpoint,
    progress: bool,
    provider: str = "auto",
    tokens: int | None = None,
    text: Path | None = None,
    with_transformers: bool = False,
) -> dict[str, Any]:
    """Verify `artifact`, with a progress bar; returns its report."""
    from qwen_export.cli.progress import STEPS, progress_bar
    from qwen_export.verify.verification import DEFAULT_TOKENS, verify

    with progress_bar(progress, "verification", STEPS) as shown:
        return verify(
            artifact,
            checkpoint,
            shown,
            provider=provider,
            tokens=tokens or DEFAULT_TOKENS,
            text=text,
            with_transformers=with_transformers,
        )


def show_report(folder: Path, report: dict[str, Any]) -> None:
    """Print a report's figures and findings."""
    from qwen_export.cli.console import PlainConsole
    from qwen_export.cli.tables import report_table

    console = PlainConsole()
    console.print(report_table(report))
    for finding in report["findings"]:
        console.print(finding, highlight=False)
    where = one_line(str(folder / "REPORT.md"))
    click.echo(f"{'passed' if report['passed'] else 'BELOW THE BAR'}: {where} has it all")


def end_with(report: dict[str, Any] | None) -> None:
    """Exit with `BELOW_THE_BAR` where a report says so."""
    if report and not report["passed"]:
        sys.exit(BELOW_THE_BAR)
