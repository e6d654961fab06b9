"""`qwen-export plan`."""

from __future__ import annotations

import json
from pathlib import Path

import click
from qwen_common.errors import UserError

from qwen_export.cli.shared import debug_option, mmproj_option, overrides_option, reporting

_EPILOG = """\b
Examples:
  qwen-export plan --profile intel-n100 Qwen/Qwen3.5-2B
  qwen-export plan Qwen3.5-27B                            on all profiles
  qwen-export plan --profile radeon-780m                  the family
  qwen-export plan --profile cpu Qwen3.5-4B --set weights.body=int8 --json
  qwen-export plan --profile cpu Qwen3.5-35B-A3B --auto-precision     what --size and --memory can ask for
"""


@click.command("plan", epilog=_EPILOG)
@click.argument("model", required=False)
@click.option("--profile", "profile_name", metavar="NAME", help="Hardware class.  [default: all]")
@overrides_option
@click.option("--revision", help="Branch, tag or commit, when MODEL is a hub id.")
@click.option("--text-only", is_flag=True, help="Leave the vision tower out.")
@click.option(
    "--auto-precision",
    is_flag=True,
    help="Of one MODEL and one profile: the least and most that it can choose.",
)
@mmproj_option
@click.option("--json", "as_json", is_flag=True, help="Print the predictions as JSON on stdout.")
@debug_option
def plan(
    model: str | None,
    profile_name: str | None,
    overrides: tuple[str, ...],
    revision: str | None,
    text_only: bool,
    auto_precision: bool,
    mmproj: Path | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Say what MODEL would take and give, from its configuration alone.

    MODEL is a checkpoint folder, a hub id, a GGUF file, or a name like Qwen3.5-4B for a published text model;
    without it the family is compared. Without a profile all of them are. Exit code 2 if MODEL does not fit
    the profile.
    """
    with reporting(debug):
        from qwen_profiles.schema import load_profile

        from qwen_export.architecture.yarn import shorter_context
        from qwen_export.cli.auto_precision import reach
        from qwen_export.cli.console import PlainConsole
        from qwen_export.cli.tables import compare_table, matrix_table, prediction_table
        from qwen_export.planner.models import configured, family
        from qwen_export.planner.predictions import compare, require_memory, shipped_profiles

        if overrides and not profile_name:
            raise UserError("--set changes one profile: say which with --profile")
        chosen = [load_profile(profile_name, overrides)] if profile_name else shipped_profiles()
        models = [configured(model, revision, text_only, mmproj)] if model else list(family().values())
        one = bool(model and profile_name)
        if auto_precision and not one:
            raise UserError("--auto-precision is for one model and one profile: name both")
        ends = reach(models[0], chosen[0]) if auto_precision else {}
        found = compare(models, chosen)
        if as_json:
            rows = [row.as_json() | ({"auto_precision": ends} if ends else {}) for row in found]
            click.echo(json.dumps(rows[0] if one else rows, indent=2))
        else:
            many = not (model or profile_name)
            table = (
                prediction_table(found[0]) if one else matrix_table(found) if many else compare_table(found)
            )
            PlainConsole().print(table)
            for option, (least, most) in ends.items():
                click.echo(f"--auto-precision --{option}: {least / 1e9:.4g} GB to {most / 1e9:.4g} GB")
        if one:
            if shorter := shorter_context(models[0].config.positions, chosen[0].context_length):
                click.echo(f"note: {shorter}", err=True)
            require_memory(models[0], chosen[0])
