"""`qwen-export inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import click
from qwen_common.errors import UserError

from qwen_export.cli.shared import debug_option, mmproj_option, reporting


@click.command("inspect")
@click.argument("artifact", type=click.Path(path_type=Path))
@mmproj_option
@click.option("--json", "as_json", is_flag=True, help="Print what is found as JSON on stdout.")
@debug_option
def inspect(artifact: Path, mmproj: Path | None, as_json: bool, debug: bool) -> None:
    """Say what is in ARTIFACT and which providers or devices can run it, from its own files.

    Of a GGUF file it says which model it is, and what an export keeps of it.
    """
    with reporting(debug):
        from qwen_export.cli.console import PlainConsole
        from qwen_export.cli.tables import gguf_table, inspection_tables
        from qwen_export.inspection import inspect as look_into
        from qwen_export.opening import is_gguf

        if of_gguf := is_gguf(str(artifact)):
            from qwen_export.gguf.inspection import inspect_gguf

            found = inspect_gguf(str(artifact), mmproj)
        elif mmproj:
            raise UserError(f"--mmproj goes with a GGUF file, and {artifact} is none: leave it off")
        else:
            found = look_into(artifact)
        if as_json:
            click.echo(json.dumps(found, indent=2))
        else:
            tables = [gguf_table(found)] if of_gguf else inspection_tables(found)
            PlainConsole().print(*tables)
