"""Load an artifact and generate text from it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from qwen_common.errors import UserError

from qwen_runtime.artifact import Artifact
from qwen_runtime.backends.protocol import Backend, Logits
from qwen_runtime.echo import Echo
from qwen_runtime.ending import Ending
from qwen_runtime.generation import Decoding, Generation
from qwen_runtime.guidance import Guidance
from qwen_runtime.info import ModelInfo as ModelInfo
from qwen_runtime.load_options import LoadOptions
from qwen_runtime.loading import load_parts
from qwen_runtime.logits import LogitsProcessor
from qwen_runtime.pooling import Pooler, Pooling, Vector
from qwen_runtime.prompt import Prompt, PromptBuilder
from qwen_runtime.reading import PromptReader
from qwen_runtime.request import Message, Request
from qwen_runtime.sampling import Sampling
from qwen_runtime.scoring import Scorer
from qwen_runtime.speculative import Speculative
from qwen_runtime.speculative.generator import SpeculativeGenerator
from qwen_runtime.states import StateSettings
from qwen_runtime.variants import Variant, Variants


class Model:
    """A loaded artifact. Use it as a context manager, or call `close`."""

    def __init__(
        self,
        artifact: Artifact,
        info: ModelInfo,
        prompts: PromptBuilder,
        variants: Variants,
    ) -> None:
        self.info = info
        self._artifact, self._prompts = artifact, prompts
        self._variants: Variants | None = variants  # None once closed
        self._adapter: str | None = None  # of answers that name none

    @classmethod
    def load(
        cls,
        path: str | Path,
        provider: str = "auto",
        verify: bool = False,
        *,
        context_length: int | None = None,
        keep: int = 0,
        states: StateSettings | None = None,
        image_pixels: int | None = None,
        prepacked: Path | None = None,
        speculative: Speculative | None = None,
        threads: int | str | None = None,
        adapters: Mapping[str, str | Path] = MappingProxyType({}),
    ) -> Model:
        """Load the artifact in the folder `path`. Each argument is described at `LoadOptions`.

        Raises:
            UserError: not an artifact, changed since its export, made for a newer ONNX Runtime, or the
                provider is not in this install, cannot take or write `prepacked`, or takes no adapters; one
                of these is damaged, or for another model.
        """
        options = LoadOptions(
            provider=provider,
            verify=verify,
            context_length=context_length,
            keep=keep,
            states=states,
            image_pixels=image_pixels,
            prepacked=prepacked,
            speculative=speculative,
            threads=threads,
            adapters=adapters,
        )
        return cls.load_with(path, options)

    @classmethod
    def load_with(cls, path: str | Path, options: LoadOptions) -> Model:
        """As `load`, with the options in one value."""
        return cls(*load_parts(path, options))

    def close(self) -> None:
        """Free the model's memory, and write the states that are not on disk yet. Safe to call twice."""
        if self._variants is not None:
            self._reader.flush()
            self._reader.clear()
        self._variants = None

    def use_adapter(self, name: str | None) -> None:
        """Let what names no adapter have this one from now on; None: none.

        Raises:
            UserError: there is no such adapter, or the provider takes none.
        """
        self._variant(name)
        self._adapter = name

    def _variant(self, adapter: str | None = None) -> Variant:
        if self._variants is None:
            raise UserError(f"the model {self.info.name} is closed: load it again")
        return self._variants[self._adapter if adapter is None else adapter]

    @property
    def _backend(self) -> Backend:
        return self._variant().backend

    @property
    def _reader(self) -> PromptReader:
        return self._variant().reader

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens written in it are recognised.

        Raises:
            UserError: half of a surrogate pair is in it.
        """
        return self._backend.tokenizer.encode(text)

    def decode(self, tokens: Sequence[int], special: bool = False) -> str:
        """Text of `tokens`; of special tokens like <|im_end|> only if `special`."""
        return self._backend.tokenizer.decode(tokens, special)

    def token_bytes(self, token: int) -> bytes:
        """What `token` stands for, which may be a part of a character; b"" where there is no such token."""
        return self._backend.tokenizer.raw(token)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        template_kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The prompt for the assistant's next turn, by the checkpoint's own chat template."""
        return self._prompts.render(messages, thinking, tools, template_kwargs)

    def prompt(self, request: Request) -> Prompt:
        """What the model reads before it answers `request`.

        Raises:
            UserError: as `generate` says of prompts and images.
        """
        return self._prompts.build(request)

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        thinking: bool = False,
        template_kwargs: Mapping[str, Any] = MappingProxyType({}),
        max_image_tokens: int | None = None,
        video_frames: int | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        guidance: Guidance | None = None,
        logprobs: int | None = None,
        prediction: str = "",
        adapter: str | None = None,
    ) -> Generation:
        """Generate text after `prompt`: a raw string, or messages that go through the chat template.

        Args:
            max_tokens: most tokens to generate; None is 4096, or as many as the context still holds. The
                KV cache is allocated for all of them beforehand.
            stop: text at which to stop; it is not part of the result.
            thinking: for messages, whether the model is asked to think first.
            template_kwargs: for messages, variables for the chat template, such as `preserve_thinking`; an
                `enable_thinking` among them comes before `thinking`.
            max_image_tokens: most tokens that each image may take, a token for some 32 x 32 pixels; what is
                larger is made smaller. None is 1024, or as many as the prompt still holds.
            video_frames: most frames of each video, each of which is an image; None is 8.
            tools: for messages, the functions that the model is told of, as OpenAI describes them.
            guidance: what the answer must look like. Only tokens that can lead there are considered.
            logprobs: report how likely each token was, and as many of the likeliest at its place, 0 to 20.
            prediction: a text that much of the answer may be, to draft from where decoding is speculative.
            adapter: the name of the one to answer with; None is that of `use_adapter`.

        A message's content is a text, or a list of parts: {"type": "text", "text": ...}, and where the
        artifact has a vision tower {"type": "image", "image": a path, the bytes of a file, or a PIL image}
        and {"type": "image_url", "image_url": {"url": a data URL}}. {"type": "video", "video": a path, or the
        bytes of a file} is shown as frames sampled evenly, each after its time.

        Returns:
            An iterator of pieces of text, which does its work as it is iterated.

        Raises:
            UserError: the prompt is empty or does not fit the context, an option is out of range, there is no
                such adapter, an image or a video cannot be read or is one too many for the artifact.
        """
        return self.answer(
            Request(
                prompt=prompt,
                max_tokens=max_tokens,
                sampling=sampling or Sampling(),
                stop=stop,
                thinking=thinking,
                template_kwargs=dict(template_kwargs),
                max_image_tokens=max_image_tokens,
                video_frames=video_frames,
                tools=tools,
                guidance=guidance,
                logprobs=logprobs,
                prediction=prediction,
                adapter=adapter,
            )
        )

    def answer(
        self,
        request: Request,
        cancelled: threading.Event | None = None,
        on_prompt: Callable[[int], object] = lambda read: None,
    ) -> Generation:
        """As `generate`, of a request that is at hand.

        Args:
            cancelled: stops the answer when it is set, as `Generation.cancel` does.
            on_prompt: called before each chunk of the prompt with the tokens that were read.
        """
        request.check()
        variant = self._variant(request.adapter)
        backend = variant.backend
        prompt = self.prompt(request)
        max_tokens = prompt.room(request.max_tokens, self.info.context_length)
        options = self._search_options(request.sampling)
        defaults = self._artifact.search_defaults
        ending = Ending.of(request, self._artifact.end_tokens, self._artifact.vocab_size)
        processor = LogitsProcessor.from_sampling(
            request.sampling, {**defaults, **options}, ending.not_before
        )
        logits = request.logprobs is not None or bool(request.sampling.logit_bias)
        if self.scores_apart and logits and prompt.images:
            raise UserError(f"{self.info.provider} takes images, or logprobs and logit_bias: leave one off")
        if self.scores_apart and not logits:
            options |= processor.search_options() | ending.search_options()
            processor = LogitsProcessor()
            ending = replace(ending, model=frozenset()) if ending.ignored else ending
        stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
        decoding = Decoding(max_tokens, ending.tokens, stop, processor, request.logprobs, request.echo)
        max_length = len(prompt.tokens) + max(max_tokens, 1)
        echo = Echo(prompt.tokens, backend.tokenizer) if request.echo else None
        open_generator = backend.logits_generator if logits else backend.generator
        opened = partial(open_generator, options, request.guidance)
        if echo is not None and request.logprobs is not None:
            appends = backend.chunk_size is not None
            prefill = echo.prefill(opened(max_length), request.logprobs, appends)
        else:
            prefill = variant.reader.prefill(prompt, request, options, max_length, opened)
        generator = prefill.generator
        if isinstance(generator, SpeculativeGenerator):
            generator.expect(self.encode(request.prediction))
        return Generation(
            prefill,
            decoding,
            backend.tokenizer,
            cancelled=cancelled,
            acceptance=generator.acceptance if isinstance(generator, SpeculativeGenerator) else None,
            echo=echo,
            on_prompt=on_prompt,
        )

    def score(self, tokens: Sequence[int], prompt: int) -> Iterator[Logits]:
        """Logits [vocab] after the first `prompt` of `tokens`, then after each of the others: the prompt is
        read in runs, and the others one by one as if they had been generated.

        Raises:
            UserError: the tokens do not fit the context.
        """
        return self._scorer.score(tokens, prompt)

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
        return self._scorer.logprobs(tokens)

    def pace(self, tokens: Sequence[int], prompt: int) -> Iterator[None]:
        """What `score` does, as an answer does it and without its logits, for timing: a step for the first
        `prompt` of `tokens`, then one for each token after it, which may be others than `tokens` has.

        Raises:
            UserError: the tokens do not fit the context.
        """
        return self._scorer.pace(tokens, prompt)

    def embed(self, tokens: Sequence[int], pooling: Pooling = "mean") -> Vector:
        """A text as a vector of length 1, float32 [hidden_size]: the mean of its hidden states, or the last.

        Raises:
            UserError: there are no tokens, too many or unknown ones, or the artifact shows no hidden states.
        """
        return Pooler(self._artifact, self._backend, self.info.context_length).embed(tokens, pooling)

    def read_ahead(
        self,
        messages: Sequence[Message],
        *,
        sampling: Sampling | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        guidance: Guidance | None = None,
        template_kwargs: Mapping[str, Any] = MappingProxyType({}),
        adapter: str | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Read a conversation up to where the user speaks next, so that the next turn's prompt is short.

        Worth doing while the user reads the answer, which is not written in history as it was generated.
        Without a kept state (see `load`) that holds the conversation's beginning nothing happens. Asking the
        last question once more then means reading everything.

        Args:
            messages: the conversation with the answer.
            sampling, tools, guidance, template_kwargs, adapter: as `generate` was given.
            cancelled: asked every 64 tokens; what was read until then is kept.
        """
        key = {**self._search_options(sampling or Sampling()), "guidance": guidance}
        reader = self._variant(adapter).reader
        reader.read_ahead(messages, tools, template_kwargs, key, cancelled)

    def flush_states(self) -> None:
        """Write the states of the answers that have ended to the folder that `load` was given for them."""
        self._reader.flush()

    def save_state(self, path: str | Path, prompt: str | Sequence[Message], **options: Any) -> int:
        """Read a prompt, as far as the next turn of its conversation agrees with it, and write the state to a
        file of NumPy's npz format, which only the user can read.

        Args:
            options: as `generate` takes them; tools and thinking are part of the prompt.

        Returns:
            How many tokens need not be read again.

        Raises:
            UserError: as `generate`, `load` was not given `states`, or the file cannot be written.
        """
        request = Request(prompt=prompt, **options)
        request.check()
        built = self._prompts.build(request)
        built.room(request.max_tokens, self.info.context_length)
        reader = self._variant(request.adapter).reader
        return reader.save(built, request, Path(path))

    def load_state(self, path: str | Path) -> int:
        """Keep the state in `path`, which `save_state` wrote: prompts that begin with its tokens go on there.

        Returns:
            How many they are.

        Raises:
            UserError: `load` was not given `states`, or the file is damaged or another model's.
        """
        return self._reader.load(Path(path))

    @property
    def _scorer(self) -> Scorer:
        return Scorer(self._backend, self.info.context_length, self._artifact.end_tokens)

    def _search_options(self, sampling: Sampling) -> dict[str, Any]:
        vocab_size = self._artifact.vocab_size
        if wrong := [token for token in sampling.logit_bias or {} if not 0 <= token < vocab_size]:
            raise UserError(f"logit_bias has token {wrong[0]}, but they go from 0 to {vocab_size - 1}")
        options = sampling.search_options()
        if "top_k" in options:
            options["top_k"] = min(options["top_k"], vocab_size)
        return options
