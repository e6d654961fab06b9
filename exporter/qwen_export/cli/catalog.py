"""`qwen-export catalog`."""

from __future__ import annotations

from pathlib import Path

import click

from qwen_export.cli.shared import debug_option, reporting

_EPILOG = """\b
Examples:
  qwen-export catalog artifacts/Qwen3.5-0.8B-strix-halo artifacts/Qwen3.5-0.8B-cpu \\
      --base-url https://example.com/models --publisher "Example Ltd" \\
      --license Apache-2.0 --license-uri https://www.apache.org/licenses/LICENSE-2.0 -o catalog.json
"""


@click.command(epilog=_EPILOG)
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--base-url", required=True, help="Where the artifacts' folders will lie: https.")
@click.option("--publisher", required=True, help="Who publishes them.")
@click.option("--license", "licence", required=True, help="Short name of the model's licence.")
@click.option("--license-uri", "licence_uri", required=True, help="Where that licence can be read: https.")
@click.option("--version", default="1.0.0", show_default=True, help="Of the models.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="New file.  [default: stdout]")
@debug_option
def catalog(
    artifacts: tuple[Path, ...],
    base_url: str,
    publisher: str,
    licence: str,
    licence_uri: str,
    version: str,
    output: Path | None,
    debug: bool,
) -> None:
    """Write a model catalogue of Windows ML for ARTIFACTS: name the best for a machine first.

    Upload each artifact's folder under its own name to the base URL, and the catalogue anywhere.
    """
    with reporting(debug):
        from qwen_common.errors import UserError

        from qwen_export.model_catalogue import Publication, catalogue, large_files

        if output is not None and output.exists():
            raise UserError(f"{output} already exists: choose another file with -o, or remove it")
        found = catalogue(artifacts, Publication(base_url, publisher, version, licence, licence_uri))
        for name in large_files(found.models, artifacts):
            click.echo(f"{name} has more than 1 GB: Microsoft advises MSIX packages for such files", err=True)
        text = found.model_dump_json(indent=2, exclude_none=True)
        if output is None:
            click.echo(text)
        else:
            output.write_text(text + "\n", encoding="utf-8")
