"""Load an artifact and generate text from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from qwen_common.errors import UserError

from qwen_runtime.artifact import Artifact
from qwen_runtime.backends.load import load as load_backend
from qwen_runtime.backends.protocol import Backend
from qwen_runtime.generation import Generation, Logits, Plan
from qwen_runtime.guidance import Guidance
from qwen_runtime.images import Patches, cut_patches, expand, open_image, take_images
from qwen_runtime.prefix import State, StateCache, common_prefix
from qwen_runtime.speculative import Sessions, Speculator
from qwen_runtime.template import render
from qwen_runtime.video import with_frames

Message = Mapping[str, Any]

_DEFAULT_MAX_TOKENS = 4096
_MAX_IMAGE_TOKENS = 1024
_ROOM_TO_GROW = 4096  # tokens by which the KV cache of a kept state is rounded up
_MAX_LOGPROBS = 20
_AHEAD_STEP = 64  # tokens; a question that comes meanwhile waits for one step


@dataclass(frozen=True)
class ModelInfo:
    """What was loaded and where it runs; `reason` is one line for people, `images` whether it can see."""

    name: str
    path: Path
    profile: str
    provider: str
    reason: str
    context_length: int
    images: bool = False


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. None takes the checkpoint's own default.

    Attributes:
        temperature: 0 always takes the likeliest token.
        top_p: smallest set of tokens whose probabilities reach this sum, above 0 and at most 1.
        top_k: number of likeliest tokens that are considered, at least 1.
        min_p: only tokens at least this many times as likely as the likeliest, from 0 to 1; before `top_k`
            and `top_p`. Of those that guidance leaves all are considered where none is as likely.
        repetition_penalty: above 0; 1 changes nothing.
        seed: the same seed, prompt and provider give the same text.
        presence_penalty: subtracted from the logit of every token that the answer has already.
        frequency_penalty: the same, as often as it has it.
        logit_bias: added to the logits of tokens, by id; -100 rules one out, 100 all others.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    min_p: float | None = None

    def search_options(self) -> dict[str, Any]:
        """As ONNX Runtime GenAI's search options, which know none of the last four.

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
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "from 0 to 1"),
            "presence_penalty": (_is_finite(self.presence_penalty), "a finite number"),
            "frequency_penalty": (_is_finite(self.frequency_penalty), "a finite number"),
            "logit_bias": (all(map(math.isfinite, (self.logit_bias or {}).values())), "finite numbers"),
            "seed": (self.seed is None or 0 <= self.seed < 2**31, "from 0 to 2147483647"),
        }
        for name, (holds, range_text) in valid.items():
            if not holds:
                raise UserError(f"{name} is {getattr(self, name)}, but must be {range_text}")
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        options["random_seed"] = options.pop("seed")
        for name in ("presence_penalty", "frequency_penalty", "logit_bias", "min_p"):
            del options[name]
        options = {name: value for name, value in options.items() if value is not None}
        if self.temperature == 0:
            del options["temperature"]
            options.pop("random_seed", None)
            options["do_sample"] = False
        elif self.temperature is not None:
            options["do_sample"] = True
        return options


def _is_finite(value: float | None) -> bool:
    return value is None or math.isfinite(value)


class Model:
    """A loaded artifact. Use it as a context manager, or call `close`."""

    def __init__(self, artifact: Artifact, info: ModelInfo, backend: Backend, states: StateCache) -> None:
        self.info = info
        self._states = states
        self._artifact = artifact
        self._loaded: Backend | None = backend  # None once closed
        self._sessions: Sessions | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        provider: str = "auto",
        verify: bool = False,
        *,
        context_length: int | None = None,
        keep: int = 0,
    ) -> Model:
        """Load the artifact in the folder `path`.

        Args:
            provider: `cpu`, `cuda`, `dml`, `openvino` or `webgpu`, or of an OpenVINO artifact the device,
                `cpu`, `gpu` or `npu`; `auto` takes the one that the artifact was made for, or else the first
                other one that loads it, the CPU last.
            verify: compare every file's SHA-256 with the manifest, not only the small ones'.
            context_length: most tokens of prompt and answer together, if fewer than the artifact's own.
            keep: how many states to keep after their answers, each with a KV cache of some 4096 tokens more
                than it needs. A prompt that goes on from one, as the next turn of a conversation does, is
                read from there on; but not with a seed, nor where the sampling differs.

        Raises:
            UserError: not an artifact, changed since its export, made for a newer ONNX Runtime, or the
                provider is not in this install.
        """
        artifact = Artifact.open(path, verify)
        backend = load_backend(artifact, provider, keep)
        info = ModelInfo(
            name=artifact.manifest["model"]["name"],
            path=artifact.root,
            profile=artifact.manifest["profile"],
            provider=backend.provider,
            reason=backend.reason,
            context_length=min(artifact.context_length, context_length or artifact.context_length),
            images=artifact.images is not None,
        )
        return cls(artifact, info, backend, StateCache(keep if backend.rewinds else 0))

    def close(self) -> None:
        """Free the model's memory. Safe to call twice."""
        self._states.clear()
        self._loaded = self._sessions = None

    @property
    def _backend(self) -> Backend:
        if self._loaded is None:
            raise UserError(f"the model {self.info.name} is closed: load it again")
        return self._loaded

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
        return [int(token) for token in self._backend.tokenizer.encode(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._backend.tokenizer.decode(np.asarray(tokens, np.int32)))

    def apply_chat_template(
        self, messages: Sequence[Message], thinking: bool = False, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """The prompt for the assistant's next turn, by the checkpoint's own chat template."""
        variables: dict[str, Any] = {"enable_thinking": thinking}
        if tools:
            variables["tools"] = tools
        return render(self._artifact.chat_template, messages, **variables)

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        thinking: bool = False,
        max_image_tokens: int | None = None,
        video_frames: int | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        guidance: Guidance | None = None,
        logprobs: int | None = None,
        speculative: bool = False,
    ) -> Generation:
        """Generate text after `prompt`: a raw string, or messages that go through the chat template.

        Args:
            max_tokens: most tokens to generate; None is 4096, or as many as the context still holds. The
                KV cache is allocated for all of them beforehand.
            stop: text at which to stop; it is not part of the result.
            thinking: for messages, whether the model is asked to think first.
            max_image_tokens: most tokens that each image may take, a token for some 32 x 32 pixels; what is
                larger is made smaller. None is 1024, or as many as the prompt still holds.
            video_frames: most frames of each video, each of which is an image; None is 8.
            tools: for messages, the functions that the model is told of, as OpenAI describes them.
            guidance: what the answer must look like. Only tokens that can lead there are considered.
            logprobs: report how likely each token was, and as many of the likeliest at its place, 0 to 20.
            speculative: take the likeliest tokens, guessed by the artifact's MTP head and checked by the
                model several in a run. The first call loads the graphs for it.

        A message's content is a text, or a list of parts: {"type": "text", "text": ...}, and where the
        artifact has a vision tower {"type": "image", "image": a path, the bytes of a file, or a PIL image}
        and {"type": "image_url", "image_url": {"url": a data URL}}. {"type": "video", "video": a path, or the
        bytes of a file} is shown as frames sampled evenly, each after its time.

        Returns:
            An iterator of pieces of text, which does its work as it is iterated.

        Raises:
            UserError: the prompt is empty or does not fit the context, an option is out of range, an image or
                a video cannot be read or is one too many for the artifact, or speculative decoding is not
                possible with this artifact, provider or these options.
        """
        sources: list[Any] = []
        if isinstance(prompt, str):
            text = prompt
            tokens = self.encode(text)
            snapshot = len(tokens) - 1  # there must be something left to read
        else:
            if not all(isinstance(message, Mapping) for message in prompt):
                raise UserError("a list of prompts is not supported: the model keeps one sequence's state")
            messages, sources = take_images(with_frames(prompt, video_frames))
            text = self.apply_chat_template(messages, thinking, tools)
            tokens = self.encode(text)
            snapshot = self._shared(tokens, messages, thinking, tools) if self._states.size else 0
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
        if logprobs is not None and not 0 <= logprobs <= _MAX_LOGPROBS:
            raise UserError(f"logprobs is {logprobs}, but must be from 0 to {_MAX_LOGPROBS}")
        sampling = sampling or Sampling()
        if wrong := [
            token for token in sampling.logit_bias or {} if not 0 <= token < self._artifact.vocab_size
        ]:
            raise UserError(
                f"logit_bias has token {wrong[0]}, but they go from 0 to {self._artifact.vocab_size - 1}"
            )
        options = self._options(sampling)
        # What a state has drawn so far would change what it draws next; and images need a fresh generator.
        reusable = self._states.size > 0 and not images and "random_seed" not in options and not speculative
        logits = logprobs is not None or bool(sampling.logit_bias)
        limit = min(room, max_tokens or _DEFAULT_MAX_TOKENS)
        defaults = self._artifact.genai_config["search"]
        samples = options.get("do_sample", defaults.get("do_sample", False))
        adjustments = {
            "presence_penalty": sampling.presence_penalty or 0.0,
            "frequency_penalty": sampling.frequency_penalty or 0.0,
            "min_p": (sampling.min_p or 0.0) if samples else 0.0,  # the likeliest is never ruled out
        }
        if self.scores_apart and logits and images:
            raise UserError(f"{self.info.provider} takes images, or logprobs and logit_bias: leave one off")
        if self.scores_apart and not logits:
            options |= {name: value for name, value in adjustments.items() if value}
            adjustments = {}
        plan = Plan(
            prompt=tokens,
            snapshot=snapshot if reusable else None,
            # In pieces cancelling works in a long one too.
            step=self._backend.appends or len(tokens),
            max_tokens=limit,
            end_tokens=self._artifact.end_tokens,
            stop=[stop] if isinstance(stop, str) else list(stop),
            logit_bias=sampling.logit_bias or {},
            temperature=options.get("temperature", defaults.get("temperature", 1.0)),
            logprobs=logprobs,
            inputs=self._backend.image_inputs(text, tokens, images) if images else None,
            **adjustments,
        )
        key = {**options, "guidance": guidance}
        max_length = len(tokens) + limit
        if speculative:
            speculator = self._speculator(plan, key, max_length)
            answering = State(speculator, key, max_length)
            return Generation(answering, self._backend.tokenizer, plan, self._release, speculator.acceptance)
        state = self._states.take(tokens, key, max_length) if reusable else None
        if state is None:
            if reusable:
                grown = -(-max_length // _ROOM_TO_GROW) * _ROOM_TO_GROW
                max_length = min(grown, self.info.context_length)
            state = State(self._backend.generator(options, guidance, max_length, logits), key, max_length)
        return Generation(state, self._backend.tokenizer, plan, self._release)

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
        tokens = expand(tokens, self._artifact.image_token, self._artifact.video_token, images)
        if images and len(tokens) > limit:  # a strip cannot be made as small as it should
            raise UserError(
                f"the images take {len(tokens)} tokens, and {limit} is the most: cut or leave some"
            )
        return tokens, images

    def score(self, tokens: Sequence[int], prompt: int) -> Iterator[Logits]:
        """Logits [vocab] after the first `prompt` of `tokens`, then after each of the others: the prompt is
        read in runs, and the others one by one as if they had been generated.

        Raises:
            UserError: the tokens do not fit the context.
        """
        if len(tokens) >= self.info.context_length:
            raise UserError(f"{len(tokens)} tokens do not fit the context of {self.info.context_length}")
        appends, ends = self._backend.appends, self._artifact.end_tokens
        if not appends and not ends.isdisjoint(tokens[prompt:]):
            raise UserError(f"on {self.info.provider} the text must not have tokens that end an answer")
        generator: Any = self._backend.generator({"do_sample": False}, None, len(tokens) + 1, True)
        step = appends or prompt
        State(generator, {}, len(tokens) + 1).read(tokens[:prompt], None, step, lambda: False)
        for token in [*tokens[prompt:], None]:
            logits: Logits = generator.get_logits()
            yield logits.reshape(-1, logits.shape[-1])[-1].copy()
            if token is not None and appends:
                generator.append_tokens(np.asarray([token], np.int32))
            elif token is not None:
                logits[...] = -np.inf
                logits[..., token] = 0
                generator.set_logits(logits)
                generator.generate_next_token()

    @property
    def scores_apart(self) -> bool:
        """Whether `score` runs the same weights in another way than answers do, with other kernels."""
        return not self._backend.shows_logits

    def logprobs(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """How likely each of `tokens` but the first is after those before it, in the way that answers are
        computed: logarithms, float32 [tokens - 1].

        Raises:
            UserError: the tokens do not fit the context.
        """
        if not self.scores_apart:
            scored = [
                logits[token] - np.logaddexp.reduce(logits, dtype=np.float64)
                for logits, token in zip(self.score(tokens[:-1], 1), tokens[1:], strict=True)
            ]
            return np.asarray(scored, np.float32)
        if len(tokens) >= self.info.context_length:
            raise UserError(f"{len(tokens)} tokens do not fit the context of {self.info.context_length}")
        return self._backend.logprobs(tokens)

    def pace(self, tokens: Sequence[int], prompt: int) -> Iterator[None]:
        """What `score` does, as an answer does it and without its logits, for timing: a step for the first
        `prompt` of `tokens`, then one for each token after it, which may be others than `tokens` has.

        Raises:
            UserError: the tokens do not fit the context.
        """
        if not self.scores_apart:
            yield from (None for _ in self.score(tokens, prompt))
            return
        options = {"do_sample": False, "ignore_eos": True}
        generator = self._backend.generator(options, None, len(tokens) + 2)
        generator.append_tokens(np.asarray(tokens[:prompt], np.int32))
        for _ in range(len(tokens) - prompt + 1):
            generator.generate_next_token()
            while not len(generator.get_next_tokens()):  # a piece of a long prompt was read
                generator.generate_next_token()
            yield

    def read_ahead(
        self,
        messages: Sequence[Message],
        *,
        sampling: Sampling | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        guidance: Guidance | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Read a conversation up to where the user speaks next, so that the next turn's prompt is short.

        Worth doing while the user reads the answer, which is not written in history as it was generated.
        Without a kept state (see `load`) that holds the conversation's beginning nothing happens. Asking the
        last question once more then means reading everything.

        Args:
            messages: the conversation with the answer.
            sampling, tools, guidance: as `generate` was given.
            cancelled: asked every 64 tokens; what was read until then is kept.
        """
        if not self._states.size:
            return
        one, other = (
            self.encode(self.apply_chat_template([*messages, {"role": "user", "content": text}], tools=tools))
            for text in ("A", "\n\nB")  # a line break may become one token with those before it
        )
        end = common_prefix(one, other)
        options = self._options(sampling or Sampling())
        state = self._states.take(one[:end], {**options, "guidance": guidance}, end + 1)
        if state is not None:
            state.read(one[:end], end, min(_AHEAD_STEP, self._backend.appends or _AHEAD_STEP), cancelled)
            self._release(state)

    def _options(self, sampling: Sampling) -> dict[str, Any]:
        options = sampling.search_options()
        if "top_k" in options:
            options["top_k"] = min(options["top_k"], self._artifact.vocab_size)
        return options

    def _shared(
        self,
        tokens: Sequence[int],
        messages: Sequence[Message],
        thinking: bool,
        tools: Sequence[Mapping[str, Any]],
    ) -> int:
        """How far the next turn's prompt will agree with this one's, `tokens`, whatever is said in it.

        Not to the end: Qwen3.5's template begins an answer with a thought, be it empty, and leaves it out
        when the answer is history.
        """
        later = [*messages, {"role": "assistant", "content": "A"}, {"role": "user", "content": "B"}]
        try:
            return common_prefix(tokens, self.encode(self.apply_chat_template(later, thinking, tools)))
        except UserError:  # a template with rules of its own about who speaks when
            return 0

    def _speculator(self, plan: Plan, options: Mapping[str, Any], max_length: int) -> Speculator:
        refused = {
            "temperature": options.get("do_sample", False),
            "repetition penalty": options.get("repetition_penalty", 1) != 1,
            "presence or frequency penalty": plan.presence_penalty != 0 or plan.frequency_penalty != 0,
            "logit bias": bool(plan.logit_bias),
            "guidance": options["guidance"] is not None,
            "log probabilities": plan.logprobs is not None,
            "images": plan.inputs is not None,
        }
        for what, present in refused.items():
            if present:
                raise UserError(
                    f"speculative decoding chooses the likeliest token and takes no {what}: leave one off"
                )
        if self._sessions is None:
            self._sessions = Sessions.load(self._artifact, self.info.provider)
        generator = self._backend.generator({"do_sample": False}, None, max_length)
        return Speculator(self._sessions, generator, max_length)

    def _release(self, state: State) -> None:
        if state.tokens:
            self._states.put(state)
