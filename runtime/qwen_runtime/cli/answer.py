"""`qwen-run answer`: one answer, or a chat."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click
from qwen_common.errors import UserError, check_unicode, reported

from qwen_runtime.artifact import Artifact
from qwen_runtime.cli.options import ARTIFACT, DEBUG, GivenPath, load_options, named_path
from qwen_runtime.generation import Generation
from qwen_runtime.load_options import LoadOptions
from qwen_runtime.load_progress import shown_load
from qwen_runtime.model import Model
from qwen_runtime.request import Request
from qwen_runtime.sampling import Sampling
from qwen_runtime.switched import adapter_files, no_adapter
from qwen_runtime.template import GIVEN

EPILOG = """\b
Examples:
  qwen-run artifacts/Qwen3.5-0.8B-cpu "Why is the sky blue?"
  qwen-run artifacts/Qwen3.5-0.8B-cpu                      (a chat)
  cat letter.txt | qwen-run artifacts/Qwen3.5-0.8B-cpu - --system "Summarise."
  qwen-run artifacts/Qwen3.5-0.8B-cpu --image photo.jpg "What is this?"
  qwen-run artifacts/Qwen3.5-0.8B-cpu "Name a colour" --temperature 0 --json
  qwen-run artifacts/Qwen3.5-0.8B-cpu --video clip.mp4 "What happens?"
  qwen-run artifacts/Qwen3.5-0.8B-cpu "Explain tides" --speculative
  qwen-run artifacts/Qwen3.5-0.8B-cpu "Explain tides" --adapter tools=tools.onnx_adapter
"""


def _variables(context: click.Context, parameter: click.Parameter, given: Sequence[str]) -> dict[str, Any]:
    """JSON where it is that, or else text."""
    found: dict[str, Any] = {}
    for name, equals, value in (entry.partition("=") for entry in given):
        if not name or not equals:
            raise click.BadParameter("write NAME=VALUE, such as preserve_thinking=true")
        if name in GIVEN:
            raise click.BadParameter(f"{name} is what the conversation says: leave it off")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    return found


@click.command(epilog=EPILOG)
@ARTIFACT
@click.argument("prompt", required=False)
@click.option("--raw", is_flag=True, help="Continue PROMPT as it is, without the chat template.")
@click.option(
    "--image",
    "images",
    multiple=True,
    type=GivenPath(exists=True, dir_okay=False, path_type=Path),
    help="Show this image with PROMPT; may be given several times.",
)
@click.option(
    "--max-image-tokens", type=click.IntRange(1), help="Most tokens for each image.  [default: 1024]"
)
@click.option(
    "--video",
    "videos",
    multiple=True,
    type=GivenPath(exists=True, dir_okay=False, path_type=Path),
    help="Show frames of this video with PROMPT; may be given several times.",
)
@click.option("--video-frames", type=click.IntRange(1), help="Most frames of each video.  [default: 8]")
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
    "--template-arg",
    "template_kwargs",
    multiple=True,
    callback=_variables,
    metavar="NAME=VALUE",
    help="A variable for the chat template, such as preserve_thinking=true; may be given several times.",
)
@load_options
@click.option(
    "--adapter",
    metavar="NAME[=PATH]",
    help="Answer with an adapter of the artifact, or with the one in this file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming.")
@DEBUG
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
    template_kwargs: dict[str, Any],
    load: LoadOptions,
    adapter: str | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Answer PROMPT from ARTIFACT, or chat when there is no PROMPT. PROMPT "-" is read from stdin."""
    if prompt is None and (raw or as_json):
        raise click.UsageError("--raw and --json need a PROMPT.")
    if (images or videos) and (raw or prompt is None):
        raise click.UsageError("--image and --video need a PROMPT, and not --raw.")
    if raw and (system is not None or thinking or template_kwargs):
        raise click.UsageError("--raw uses no chat template: leave off --system, --think and --template-arg.")
    _speak_utf8()
    with reported(debug):
        request = Request(
            prompt=(),
            max_tokens=max_tokens,
            sampling=Sampling(temperature, top_p, top_k, repetition_penalty, seed, min_p=min_p),
            stop=stop,
            thinking=thinking,
            template_kwargs=template_kwargs,
            max_image_tokens=max_image_tokens,
            video_frames=video_frames,
        )
        if adapter is not None and "=" in adapter:
            adapter, path = named_path(adapter, "--adapter", "NAME=PATH")
            load = replace(load, adapters={adapter: path})
        request = replace(request, adapter=adapter)
        request.check()  # so that a mistake is known before a large model is loaded
        _check_name(artifact)
        if adapter is not None:
            opened = Artifact.open(artifact)
            if adapter not in (names := adapter_files(opened, load.adapters)):
                raise no_adapter(opened, adapter, names)
        if sys.stdin is None and prompt in (None, "-"):
            raise UserError("stdin is closed: give a PROMPT, or let stdin be open")
        text = sys.stdin.read() if prompt == "-" else prompt
        if text is not None and not (text.strip() or raw or images or videos):
            raise UserError("the prompt is empty: write a question, or leave PROMPT out for a chat")
        # The tokenizer refuses it too, which is late.
        check_unicode(text or "", "the prompt", "convert it first")
        check_unicode(system or "", "the system message", "convert it first")
        with shown_load(artifact):
            loaded = Model.load_with(artifact, load)
        with loaded as model:
            click.echo(model.info.placed, err=True)
            if text is None:
                from qwen_runtime.chat import chat

                chat(model, system, request)
                return
            for video in videos:
                click.echo(f"{video.name} is shown as images: frames sampled evenly", err=True)
            messages = _messages(system, text, images, videos)
            _answer(model, replace(request, prompt=text if raw else messages), as_json)


def _check_name(artifact: Path) -> None:
    """A command that was misspelt looks like an artifact.

    Raises:
        UserError: there is no such artifact, and a command with almost this name.
    """
    group = click.get_current_context().find_root().command
    assert isinstance(group, click.Group)
    if not artifact.exists() and (close := get_close_matches(str(artifact), group.commands, 1)):
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


def _answer(model: Model, request: Request, as_json: bool) -> None:
    generation = model.answer(request)
    if not as_json:
        _stream(generation)
        if guesses := generation.acceptance:
            counts = f"{guesses.accepted} of {guesses.drafted}"
            click.echo(f"drafted tokens accepted: {counts} ({guesses.rate:.0%})", err=True)
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
        "reason": model.info.reason,
        **({} if request.adapter is None else {"adapter": request.adapter}),
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
