"""Load an artifact and generate text from it."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from qwen_profiles.errors import UserError

from qwen_runtime.artifact import Artifact
from qwen_runtime.images import Patches, cut_patches, expand, open_image, take_images, vision_inputs
from qwen_runtime.provider import PROVIDERS, Choice, choose
from qwen_runtime.stop import StopFilter
from qwen_runtime.template import render

Message = Mapping[str, Any]

_DEFAULT_MAX_TOKENS = 4096
_MAX_IMAGE_TOKENS = 1024
_UNKNOWN_OPERATOR = "is not a registered function/op"  # ONNX Runtime, of a graph that it is too old for


@dataclass(frozen=True)
class ModelInfo:
    """What was loaded and where it runs; `reason` is one line for people."""

    name: str
    path: Path
    profile: str
    provider: str
    reason: str
    context_length: int


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. None takes the checkpoint's own default.

    Attributes:
        temperature: 0 always takes the likeliest token.
        top_p: smallest set of tokens whose probabilities reach this sum, above 0 and at most 1.
        top_k: number of likeliest tokens that are considered, at least 1.
        repetition_penalty: above 0; 1 changes nothing.
        seed: the same seed, prompt and provider give the same text.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def search_options(self) -> dict[str, Any]:
        """As ONNX Runtime GenAI's search options.

        Raises:
            UserError: a value is out of range.
        """
        valid = {
            "temperature": (self.temperature is None or self.temperature >= 0, "0 or more"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "repetition_penalty": (
                self.repetition_penalty is None or self.repetition_penalty > 0,
                "above 0",
            ),
            "seed": (self.seed is None or 0 <= self.seed < 2**31, "from 0 to 2147483647"),
        }
        for name, (holds, range_text) in valid.items():
            if not holds:
                raise UserError(f"{name} is {getattr(self, name)}, but must be {range_text}")
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        options["random_seed"] = options.pop("seed")
        options = {name: value for name, value in options.items() if value is not None}
        if self.temperature == 0:
            del options["temperature"]
            options["do_sample"] = False
        elif self.temperature is not None:
            options["do_sample"] = True
        return options


class Model:
    """A loaded artifact. Use it as a context manager, or call `close`."""

    def __init__(self, artifact: Artifact, info: ModelInfo, og: Any, model: Any) -> None:
        self.info = info
        self._artifact = artifact
        self._og = og
        self._model = model
        self._tokenizer = og.Tokenizer(model)

    @classmethod
    def load(cls, path: str | Path, provider: str = "auto", verify: bool = False) -> Model:
        """Load the artifact in the folder `path`.

        Args:
            provider: `cpu`, `cuda`, `dml`, `openvino` or `webgpu`; `auto` takes the one that the artifact
                was made for, or the CPU where that is missing or does not start.
            verify: compare every file's SHA-256 with the manifest, not only the small ones'.

        Raises:
            UserError: not an artifact, changed since its export, made for a newer ONNX Runtime, or the
                provider is not in this install.
        """
        artifact = Artifact.open(path, verify)
        import onnxruntime_genai as og

        og.disable_telemetry_events()
        choice = choose(provider, artifact.manifest["provider"], og)
        try:
            model = _open(og, artifact, choice)
        except Exception as error:
            title = PROVIDERS[choice.name].title
            if choice.name == "cpu":
                raise
            if provider != "auto":
                raise UserError(f"{title} could not load {artifact.root}: {_one_line(error)}") from error
            choice = Choice("cpu", f"CPU: {title} did not start ({_one_line(error)})")
            model = _open(og, artifact, choice)
        info = ModelInfo(
            name=artifact.manifest["model"]["name"],
            path=artifact.root,
            profile=artifact.manifest["profile"],
            provider=choice.name,
            reason=choice.reason,
            context_length=artifact.context_length,
        )
        return cls(artifact, info, og, model)

    def close(self) -> None:
        """Free the model's memory. Safe to call twice."""
        self._tokenizer = self._model = None

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens written in it are recognised.

        Raises:
            UserError: a NUL character or half of a surrogate pair is in it.
        """
        if "\0" in text:  # where ONNX Runtime GenAI's tokenizer would stop reading, and say nothing
            raise UserError("the text has a NUL character: remove it")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError("the text is not valid UTF-8: convert it first") from error
        return [int(token) for token in self._tokenizer.encode(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(np.asarray(tokens, np.int32)))

    def apply_chat_template(self, messages: Sequence[Message], thinking: bool = False) -> str:
        """The prompt for the assistant's next turn, by the checkpoint's own chat template."""
        return render(self._artifact.chat_template, messages, enable_thinking=thinking)

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        thinking: bool = False,
        max_image_tokens: int | None = None,
    ) -> Generation:
        """Generate text after `prompt`: a raw string, or messages that go through the chat template.

        Args:
            max_tokens: most tokens to generate; None is 4096, or as many as the context still holds. The
                KV cache is allocated for all of them beforehand.
            stop: text at which to stop; it is not part of the result.
            thinking: for messages, whether the model is asked to think first.
            max_image_tokens: most tokens that each image may take, a token for some 32 x 32 pixels; what is
                larger is made smaller. None is 1024, or as many as the prompt still holds.

        A message's content is a text, or a list of parts: {"type": "text", "text": ...}, and where the
        artifact has a vision tower {"type": "image", "image": a path, the bytes of a file, or a PIL image}
        and {"type": "image_url", "image_url": {"url": a data URL}}.

        Returns:
            An iterator of pieces of text, which does its work as it is iterated.

        Raises:
            UserError: the prompt is empty or does not fit the context, an option is out of range, or an image
                cannot be read or is one too many for the artifact.
        """
        sources: list[Any] = []
        if not isinstance(prompt, str):
            if not all(isinstance(message, Mapping) for message in prompt):
                raise UserError("a list of prompts is not supported: the model keeps one sequence's state")
            messages, sources = take_images(prompt)
            prompt = self.apply_chat_template(messages, thinking)
        tokens = self.encode(prompt)
        tokens, images = self._place_images(tokens, sources, max_image_tokens)
        room = self.info.context_length - len(tokens)
        if not tokens:
            raise UserError("the prompt is empty")
        if room < 1:
            raise UserError(
                f"the prompt has {len(tokens)} tokens, and the context is {self.info.context_length}: "
                "shorten it"
            )
        if max_tokens is not None and max_tokens < 1:
            raise UserError(f"max_tokens is {max_tokens}, but must be at least 1")
        options = (sampling or Sampling()).search_options()
        if "top_k" in options:
            options["top_k"] = min(options["top_k"], self._artifact.vocab_size)
        options["max_length"] = len(tokens) + min(room, max_tokens or _DEFAULT_MAX_TOKENS)
        return Generation(self, tokens, images, options, [stop] if isinstance(stop, str) else list(stop))

    def _place_images(
        self, tokens: list[int], sources: Sequence[Any], max_tokens: int | None
    ) -> tuple[list[int], list[Patches]]:
        """The prompt with room for every image's features, and the images themselves."""
        settings = self._artifact.images
        if settings is None:
            if sources:
                raise UserError(
                    f"{self.info.name} takes no images: export a vision-language checkpoint, not --text-only"
                )
            return tokens, []
        if max_tokens is not None and max_tokens < 1:
            raise UserError(f"max_image_tokens is {max_tokens}, but must be at least 1")
        limit = self._artifact.image_prompt_tokens
        room = (limit - len(tokens)) // max(1, len(sources))
        if sources and room < 1:
            raise UserError(
                f"the text has {len(tokens)} tokens and a prompt with images at most {limit}: shorten it, or "
                "give fewer images"
            )
        most = min(room, max_tokens or _MAX_IMAGE_TOKENS)
        images = [cut_patches(open_image(source), settings, most) for source in sources]
        tokens = expand(tokens, self._artifact.image_token, images)
        if images and len(tokens) > limit:  # a strip cannot be made as small as it should
            raise UserError(
                f"the images take {len(tokens)} tokens, and {limit} is the most: cut or leave some"
            )
        return tokens, images


def _open(og: Any, artifact: Artifact, choice: Choice) -> Any:
    config = og.Config(str(artifact.root))
    config.clear_providers()
    provider = PROVIDERS[choice.name]
    if provider.genai_name is not None:
        config.append_provider(provider.genai_name)
        for name, value in provider.options:
            config.set_provider_option(provider.genai_name, name, value)
    try:
        return og.Model(config)
    except Exception as error:
        if _UNKNOWN_OPERATOR not in str(error):
            raise
        raise UserError(
            f"{artifact.root} needs onnxruntime {artifact.manifest['onnxruntime']}: install it, or export "
            "with a profile for older ones"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@dataclass
class _Progress:
    """What a running answer tells.

    Apart from `Generation`, so that no reference cycle keeps the KV cache of a dropped answer until Python
    next collects garbage.
    """

    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)


class Generation:
    """One answer as it grows: iterate it for pieces of text. A context manager, or call `close`; one that is
    dropped frees what it holds too.

    Attributes:
        text: the pieces yielded so far.
        prompt_tokens: number of tokens of the prompt.
    """

    def __init__(
        self,
        model: Model,
        prompt: list[int],
        images: Sequence[Patches],
        options: dict[str, Any],
        stop: list[str],
    ) -> None:
        self.text = ""
        self.prompt_tokens = len(prompt)
        self._progress = _Progress()
        self._pieces = _run(model, prompt, images, options, StopFilter(stop), self._progress)

    @property
    def tokens(self) -> list[int]:
        """Ids generated so far, without the one that ended the answer."""
        return self._progress.tokens

    @property
    def finish_reason(self) -> str | None:
        """ "stop" at an end token or stop string, "length", "cancelled"; None while it runs."""
        return self._progress.finish_reason

    def cancel(self) -> None:
        """Stop before the next token. Safe to call from another thread."""
        self._progress.cancelled.set()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.text += piece
        return piece

    def close(self) -> None:
        """Free what the generation holds; what it would still have yielded is lost."""
        self._pieces.close()

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _run(
    model: Model,
    prompt: list[int],
    images: Sequence[Patches],
    options: dict[str, Any],
    stop: StopFilter,
    progress: _Progress,
) -> Generator[str]:
    og = model._og
    parameters = og.GeneratorParams(model._model)
    parameters.set_search_options(**options)
    generator = og.Generator(model._model, parameters)
    decoder = model._tokenizer.create_stream()
    # In pieces, so that cancelling works in a long prompt too; else ONNX Runtime GenAI cuts it by itself.
    step = model._artifact.chunk_size if PROVIDERS[model.info.provider].appends else len(prompt)
    if images:  # all at once: only the first run gets images and their positions
        tensors = og.NamedTensors()
        for name, value in vision_inputs(prompt, images).items():
            tensors[name] = value
        generator.set_inputs(tensors)
        prompt = []
    for start in range(0, len(prompt), step):
        if progress.cancelled.is_set():
            progress.finish_reason = "cancelled"
            return
        generator.append_tokens(np.asarray(prompt[start : start + step], np.int32))
    while True:
        if progress.cancelled.is_set():
            progress.finish_reason = "cancelled"
            break
        generator.generate_next_token()
        token = int(generator.get_next_tokens()[0])
        if token in model._artifact.end_tokens:
            progress.finish_reason = "stop"
            break
        progress.tokens.append(token)
        if piece := stop.feed(decoder.decode(token)):
            yield piece
        if stop.stopped:
            progress.finish_reason = "stop"
            return
        if generator.is_done():
            progress.finish_reason = "length"
            break
    if rest := stop.flush():
        yield rest
