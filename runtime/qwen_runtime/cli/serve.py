"""`qwen-run serve`: an artifact for OpenAI clients and browsers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from qwen_common.errors import UserError, reported

from qwen_runtime.cli.options import DEBUG, FiniteRange, GivenPath, load_options, named_path
from qwen_runtime.load_options import LoadOptions

_EPILOG = """\b
Examples:
  qwen-run serve artifacts/Qwen3.5-0.8B-cpu
  qwen-run serve artifacts/Qwen3.5-0.8B-cpu --port 8080 --think
  qwen-run serve artifacts/Qwen3.5-0.8B-cpu --state-dir ~/.cache/qwen-edge/states
  qwen-run serve artifacts/Qwen3.5-0.8B-cpu --model large=artifacts/Qwen3.5-4B-cpu --unload-after 600
  qwen-run serve artifacts/Qwen3.5-0.8B-cpu --adapter tools=tools.onnx_adapter
  QWEN_EDGE_API_KEY=secret qwen-run serve artifacts/Qwen3.5-0.8B-cpu --host 0.0.0.0
  qwen-run serve artifacts/Qwen3.5-0.8B-cpu --allowed-host chat.example.org --cors-origin https://app.example.org
"""

_MEGAPIXELS, _KIOSK_MEGAPIXELS = 50, 16


@click.command(epilog=_EPILOG)
@click.argument("artifacts", metavar="[ARTIFACT]...", nargs=-1, type=GivenPath(path_type=Path))
@click.option(
    "--model",
    "named",
    multiple=True,
    metavar="NAME=FOLDER",
    help="An artifact by another name. One is in memory at a time. May be repeated.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=PATH",
    help="An adapter beside those in the artifact: requests for the model NAME are answered with it. May be "
    "repeated.",
)
@click.option(
    "--unload-after",
    type=FiniteRange(0, min_open=True),
    metavar="SECONDS",
    help="Free the model's memory after so long without a request; the next one loads it.  [default: never]",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any.")
@click.option(
    "--api-key",
    envvar="QWEN_EDGE_API_KEY",
    help="Demand this key; also from QWEN_EDGE_API_KEY. Others on this machine see it in the command.",
)
@click.option(
    "--api-key-file",
    envvar="QWEN_EDGE_API_KEY_FILE",
    type=GivenPath(path_type=Path, dir_okay=False),
    help="Demand the key in this file; also from QWEN_EDGE_API_KEY_FILE.",
)
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="Answer to this name too, of a proxy or a container; *.NAME for all below it. May be repeated.",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Let pages of this site use the API, such as https://chat.example.org. May be repeated.",
)
@click.option(
    "--parallel", default=1, show_default=True, type=click.IntRange(1), help="Answers made at a time."
)
@click.option(
    "--queue", default=16, show_default=True, type=click.IntRange(0), help="Requests that may wait."
)
@click.option(
    "--keep",
    default=2,
    show_default=True,
    type=click.IntRange(0),
    help="Conversations whose history need not be read again.",
)
@click.option(
    "--state-dir",
    type=GivenPath(file_okay=False, path_type=Path),
    help="Keep what was read of prompts in this folder, so that it is not read again after a restart.",
)
@click.option(
    "--state-disk",
    default=8.0,
    show_default=True,
    type=FiniteRange(0, min_open=True),
    help="Most GB in --state-dir.",
)
@click.option(
    "--state-memory",
    default=2.0,
    show_default=True,
    type=FiniteRange(0),
    help="With --state-dir, most GB of conversations in memory.",
)
@click.option(
    "--image-megapixels",
    type=FiniteRange(0, min_open=True),
    help="Most of all images of a request, as they are sent.  [default: 50; with --kiosk 16]",
)
@click.option(
    "--context",
    "context_length",
    type=click.IntRange(1),
    help="Most tokens of prompt and answer together.  [default: the artifact's]",
)
@click.option(
    "--think/--no-think",
    "thinking",
    default=False,
    help="Let the model think first where a request does not say.",
)
@click.option(
    "--strict-model",
    is_flag=True,
    help="Refuse requests for other models.  [default: the model answers to every name]",
)
@click.option(
    "--grace",
    default=30,
    show_default=True,
    type=click.IntRange(0),
    help="Seconds that running answers may take when the server is told to end.",
)
@load_options
@click.option("--kiosk", is_flag=True, help="Show the page in its kiosk mode.")
@DEBUG
def serve(
    artifacts: tuple[Path, ...],
    named: tuple[str, ...],
    adapters: tuple[str, ...],
    load: LoadOptions,
    context_length: int | None,
    keep: int,
    state_dir: Path | None,
    state_disk: float,
    state_memory: float,
    api_key_file: Path | None,
    image_megapixels: float | None,
    kiosk: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Serve each ARTIFACT to OpenAI clients and browsers. Needs: pip install 'qwen-edge[serve]'."""
    with reported(debug):
        try:
            from qwen_runtime.serve.server import serve as listen
            from qwen_runtime.serve.worker import ModelSettings
            from qwen_runtime.states import GB, StateSettings
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name} is missing: pip install 'qwen-edge[serve]'") from error
        if api_key_file is not None:
            if options["api_key"] is not None:
                raise UserError("there is an API key, and a file with one: leave one off")
            options["api_key"] = _key_in(api_key_file)
        states = None
        if state_dir is not None:
            states = StateSettings(state_dir, round(state_disk * GB), round(state_memory * GB))
        pixels = round(10**6 * (image_megapixels or (_KIOSK_MEGAPIXELS if kiosk else _MEGAPIXELS)))
        load = replace(load, context_length=context_length, keep=keep, states=states, image_pixels=pixels)
        paths = _paths(artifacts, named)
        load = replace(load, adapters=_adapters(adapters, len(paths)))
        listen([ModelSettings(path, name, load) for path, name in paths], kiosk=kiosk, **options)


def _paths(artifacts: Sequence[Path], named: Sequence[str]) -> list[tuple[Path, str | None]]:
    found: list[tuple[Path, str | None]] = [(path, None) for path in artifacts]
    for text in named:
        name, folder = named_path(text, "--model", "NAME=FOLDER")
        found.append((folder, name))
    if not found:
        raise UserError("no artifact: give the folder that qwen-export made")
    return found


def _adapters(given: Sequence[str], models: int) -> dict[str, Path]:
    if given and models > 1:
        raise UserError(
            "--adapter does not say which artifact it is for: serve one, or export them with "
            "--adapter-at-runtime"
        )
    found: dict[str, Path] = {}
    for text in given:
        name, path = named_path(text, "--adapter", "NAME=PATH")
        if name in found:
            raise UserError(f"two adapters are called {name}: give one another name")
        found[name] = path
    return found


def _key_in(path: Path) -> str:
    """The one line of a file."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split()  # Windows' editors put a mark before it
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read an API key in {path}: write it there, on one line") from error
    if len(lines) != 1:
        raise UserError(
            f"{path} has {'no' if not lines else 'more than one'} API key: write one, on one line"
        )
    return lines[0]
