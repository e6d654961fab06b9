"""The command `qwen-run`."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click
from click_default_group import DefaultGroup
from qwen_common.errors import UserError, reported
from qwen_common.providers import PROVIDERS
from qwen_common.version import DISTRIBUTION

from qwen_runtime.generation import Generation
from qwen_runtime.kiosk.commands import COMMANDS as KIOSK_COMMANDS
from qwen_runtime.model import Model, Sampling

_EPILOG = """\b
Examples:
  qwen-run artifacts/Qwen3.5-0.8B-cpu "Why is the sky blue?"
  qwen-run artifacts/Qwen3.5-0.8B-cpu                      (a chat)
  cat letter.txt | qwen-run artifacts/Qwen3.5-0.8B-cpu - --system "Summarise."
  qwen-run artifacts/Qwen3.5-0.8B-cpu --image photo.jpg "What is this?"
  qwen-run artifacts/Qwen3.5-0.8B-cpu "Name a colour" --temperature 0 --json
  qwen-run artifacts/Qwen3.5-0.8B-cpu --video clip.mp4 "What happens?"
  qwen-run artifacts/Qwen3.5-0.8B-cpu "Explain tides" --speculative
"""

_SERVE_EPILOG = """\b
Examples:
  qwen-run serve artifacts/Qwen3.5-0.8B-cpu
  qwen-run serve artifacts/Qwen3.5-0.8B-cpu --port 8080 --think
  QWEN_EDGE_API_KEY=secret qwen-run serve artifacts/Qwen3.5-0.8B-cpu --host 0.0.0.0
"""

_DEVICES_EPILOG = """\b
Examples:
  qwen-run devices
  qwen-run devices --json | jq -r '.profiles[]'
"""

_BENCH_EPILOG = """\b
Examples:
  qwen-run bench artifacts/Qwen3.5-0.8B-cpu
  qwen-run bench artifacts/Qwen3.5-0.8B-cpu --contexts 512,4096 --rounds 5 --plot speed.png
  qwen-run bench artifacts/Qwen3.5-0.8B-cpu --json > speed.json
"""


@click.group(cls=DefaultGroup, default="answer", epilog=_EPILOG)
@click.version_option(package_name=DISTRIBUTION)
def main() -> None:
    """Run an artifact that qwen-export made.

    Without the name of a command: answer.

    Exit codes: 0 done, 2 a mistake that you can mend, 1 a mistake of ours, 130 interrupted.
    """


for _command in KIOSK_COMMANDS:
    main.add_command(_command)


@main.command(epilog=_EPILOG)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--raw", is_flag=True, help="Continue PROMPT as it is, without the chat template.")
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Show this image with PROMPT; may be given several times.",
)
@click.option("--max-image-tokens", type=int, help="Most tokens for each image.  [default: 1024]")
@click.option(
    "--video",
    "videos",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Show frames of this video with PROMPT; may be given several times.",
)
@click.option("--video-frames", type=int, help="Most frames of each video.  [default: 8]")
@click.option("--system", help="System message of the conversation.")
@click.option("--max-tokens", type=int, help="Most tokens to generate.  [default: 4096]")
@click.option("--temperature", type=float, help="0 always takes the likeliest token.")
@click.option("--top-p", type=float, help="Sample from the likeliest tokens up to this probability.")
@click.option("--top-k", type=int, help="Sample from this many likeliest tokens.")
@click.option("--min-p", type=float, help="Sample from tokens this many times as likely as the likeliest.")
@click.option("--repetition-penalty", type=float, help="Above 1 makes repetition less likely.")
@click.option("--seed", type=int, help="Make sampling repeatable.")
@click.option("--stop", multiple=True, metavar="TEXT", help="Stop at this text; may be given several times.")
@click.option("--think/--no-think", "thinking", default=False, help="Let the model think first.")
@click.option(
    "--speculative",
    is_flag=True,
    help="Take the likeliest tokens, guessed by the MTP head and checked several in a run.",
)
@click.option(
    "--provider", default="auto", show_default=True, metavar="NAME", help=f"auto, {', '.join(PROVIDERS)}."
)
@click.option("--verify", is_flag=True, help="Check every file's SHA-256 before loading.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming.")
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
def answer(
    artifact: Path,
    prompt: str | None,
    raw: bool,
    images: tuple[Path, ...],
    max_image_tokens: int | None,
    videos: tuple[Path, ...],
    video_frames: int | None,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    repetition_penalty: float | None,
    seed: int | None,
    stop: tuple[str, ...],
    thinking: bool,
    speculative: bool,
    provider: str,
    verify: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Answer PROMPT from ARTIFACT, or chat when there is no PROMPT. PROMPT "-" is read from stdin."""
    if prompt is None and (raw or as_json):
        raise click.UsageError("--raw and --json need a PROMPT.")
    if (images or videos) and (raw or prompt is None):
        raise click.UsageError("--image and --video need a PROMPT, and not --raw.")
    _speak_utf8()
    with reported(debug):
        sampling = Sampling(temperature, top_p, top_k, repetition_penalty, seed, min_p=min_p)
        sampling.search_options()  # so that a mistake is known before a large model is loaded
        _check_name(artifact)
        if sys.stdin is None and prompt in (None, "-"):
            raise UserError("stdin is closed: give a PROMPT, or let stdin be open")
        text = sys.stdin.read() if prompt == "-" else prompt
        if text is not None and not (text.strip() or raw or images or videos):
            raise UserError("the prompt is empty: write a question, or leave PROMPT out for a chat")
        options: dict[str, Any] = {
            "max_tokens": max_tokens,
            "sampling": sampling,
            "stop": stop,
            "thinking": thinking,
            "max_image_tokens": max_image_tokens,
            "video_frames": video_frames,
            "speculative": speculative,
        }
        with Model.load(artifact, provider, verify) as model:
            click.echo(model.info.reason, err=True)
            if text is None:
                from qwen_runtime.chat import chat

                chat(model, system, options)
                return
            for video in videos:
                click.echo(f"{video.name} is shown as images: frames sampled evenly", err=True)
            _answer(model, text if raw else _messages(system, text, images, videos), options, as_json)


@main.command(epilog=_DEVICES_EPILOG)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
def devices(as_json: bool, debug: bool) -> None:
    """Show what this machine has, which providers can use it, and which profiles are made for it."""
    with reported(debug):
        import dataclasses

        import onnxruntime_genai as og

        from qwen_runtime.devices import find_machine, fitting_profiles, providers

        machine = find_machine()
        usable, profiles = providers(machine, og), fitting_profiles(machine)
        if as_json:
            found = dataclasses.asdict(machine) | {"cpu_flags": sorted(machine.cpu_flags)}
            found |= {"providers": [dataclasses.asdict(item) for item in usable], "profiles": profiles}
            click.echo(json.dumps(found, indent=2))
            return
        click.echo(f"CPU       {machine.cpu}, {machine.memory_bytes / 1e9:.0f} GB of memory")
        for device in machine.devices:
            memory = f", {device.memory_bytes / 1e9:.0f} GB of its own" if device.memory_bytes else ""
            click.echo(f"{device.kind.upper():9} {device.name}{memory}")
        for item in usable:
            click.echo(f"{item.title:9} {'usable' if item.usable else item.advice}")
        click.echo(f"profiles  {', '.join(profiles) or 'none is made for this machine; cpu always works'}")


def _lengths(context: click.Context, parameter: click.Parameter, text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter("give numbers of tokens with commas between them, such as 128,512") from None


@main.command(epilog=_BENCH_EPILOG)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--contexts",
    callback=_lengths,
    metavar="N,N,...",
    help="Lengths of prompt, in tokens.  [default: 128,512,2048, as far as they fit]",
)
@click.option(
    "--tokens", default=32, show_default=True, type=click.IntRange(1), help="To decode after each prompt."
)
@click.option(
    "--rounds", default=3, show_default=True, type=click.IntRange(1), help="The medians of so many are shown."
)
@click.option(
    "--provider", default="auto", show_default=True, metavar="NAME", help=f"auto, {', '.join(PROVIDERS)}."
)
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Draw it too, into this PNG file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
def bench(
    artifact: Path,
    contexts: list[int] | None,
    tokens: int,
    rounds: int,
    provider: str,
    picture: Path | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Measure ARTIFACT here: first token, prefill, decode, memory, share of the memory bandwidth."""
    with reported(debug):
        import dataclasses

        from rich.console import Console

        from qwen_runtime import bench as measuring

        with Console(stderr=True).status("starting") as status:
            found = measuring.bench(artifact, provider, contexts, tokens, rounds, status.update)
        if picture is not None:
            measuring.plot(found, picture)
        if as_json:
            click.echo(json.dumps(dataclasses.asdict(found), indent=2))
            return
        Console().print(measuring.table(found))
        click.echo(measuring.summary(found))


@main.command(epilog=_SERVE_EPILOG)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any.")
@click.option("--api-key", envvar="QWEN_EDGE_API_KEY", help="Demand this key; also from QWEN_EDGE_API_KEY.")
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
    "--grace",
    default=30,
    show_default=True,
    type=click.IntRange(0),
    help="Seconds that running answers may take when the server is told to end.",
)
@click.option(
    "--provider", default="auto", show_default=True, metavar="NAME", help=f"auto, {', '.join(PROVIDERS)}."
)
@click.option("--kiosk", is_flag=True, help="Show the page in its kiosk mode.")
@click.option("--verify", is_flag=True, help="Check every file's SHA-256 before loading.")
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
def serve(
    artifact: Path,
    provider: str,
    verify: bool,
    context_length: int | None,
    keep: int,
    debug: bool,
    **options: Any,
) -> None:
    """Serve ARTIFACT to OpenAI clients and browsers. Needs: pip install 'qwen-edge[serve]'."""
    with reported(debug):
        try:
            from qwen_runtime.serve.run import serve as run
            from qwen_runtime.serve.worker import Source
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name} is missing: pip install 'qwen-edge[serve]'") from error
        run(Source(artifact, provider, verify, context_length, keep), **options)


def _check_name(artifact: Path) -> None:
    """A command that was misspelt looks like an artifact.

    Raises:
        UserError: there is no such artifact, and a command with almost this name.
    """
    if not artifact.exists() and (close := get_close_matches(str(artifact), main.commands, 1)):
        raise UserError(f"no folder {artifact}: is the command '{close[0]}' meant?")


def _speak_utf8() -> None:
    """Pipes and files are UTF-8, also on Windows, whose code pages lack most of what a model writes."""
    for stream, errors in (sys.stdin, "surrogateescape"), (sys.stdout, "replace"):
        if isinstance(stream, io.TextIOWrapper) and not stream.isatty():
            stream.reconfigure(encoding="utf-8", errors=errors)


def _messages(
    system: str | None, text: str, images: Sequence[Path], videos: Sequence[Path]
) -> list[dict[str, Any]]:
    opening = [{"role": "system", "content": system}] if system else []
    pictures = [{"type": "image", "image": path} for path in images]
    pictures += [{"type": "video", "video": path} for path in videos]
    content = [*pictures, {"type": "text", "text": text}] if pictures else text
    return [*opening, {"role": "user", "content": content}]


def _answer(model: Model, prompt: str | list[dict[str, Any]], options: dict[str, Any], as_json: bool) -> None:
    generation = model.generate(prompt, **options)
    if not as_json:
        _stream(generation)
        if guesses := generation.acceptance:
            counts = f"{guesses.accepted} of {guesses.drafted}"
            click.echo(f"guesses accepted: {counts} ({guesses.rate:.0%})", err=True)
        return
    for _ in generation:
        pass
    usage: dict[str, Any] = {
        "prompt_tokens": generation.prompt_tokens,
        "completion_tokens": len(generation.tokens),
    }
    if guesses := generation.acceptance:
        usage |= {"drafted_tokens": guesses.drafted, "accepted_tokens": guesses.accepted}
        usage["acceptance_rate"] = guesses.rate
    result = {
        "text": generation.text,
        "finish_reason": generation.finish_reason,
        "usage": usage,
        "model": model.info.name,
        "provider": model.info.provider,
    }
    click.echo(json.dumps(result, ensure_ascii=False))


def _stream(generation: Generation) -> None:
    try:
        for piece in generation:
            click.echo(piece, nl=False)
        click.echo()
    except BrokenPipeError:
        # The reader, such as `head`, has what it wanted. Nothing more can be flushed to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
