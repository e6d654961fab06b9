"""OpenVINO GenAI on Intel's CPUs, graphics devices and NPUs.

Through its continuous-batching pipeline: its attention is paged, its Gated DeltaNet runs in fused kernels,
and it is asked for tokens one step at a time, where the others call back.
"""

from __future__ import annotations

import itertools
import random
import re
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
from qwen_common.errors import UserError
from qwen_common.providers import OPENVINO_EP

from qwen_runtime.artifact import Artifact
from qwen_runtime.backends.stateful import Stateful, StatefulGenerator
from qwen_runtime.grammar import structural_tag, why_refused
from qwen_runtime.guidance import Guidance
from qwen_runtime.images import Patches
from qwen_runtime.sampling import GREEDY
from qwen_runtime.tokenizer import Tokenizer

DEVICES = {"cpu": "CPU", "gpu": "GPU", "npu": "NPU"}
_INSTALL = "pip install 'qwen-edge[openvino]'"
_IMAGE_TAG = "<ov_genai_"  # OpenVINO GenAI's own way to write where an image goes
# OpenVINO GenAI's names for what `Sampling.search_options` and ONNX Runtime GenAI call otherwise.
_RENAMED = {"random_seed": "rng_seed"}
# Measured, docs/openvino.md: OpenVINO's default on a CPU with AVX-512 or AMX is bfloat16, in which it keeps
# the recurrent states too, and the pipeline's Gated DeltaNet takes longer.
_ON_CPU = {"INFERENCE_PRECISION_HINT": "f32"}
_QUICKER = "an ONNX artifact is about twice as fast on a CPU: qwen-export --profile cpu CHECKPOINT"
_LARGEST_MIN_P = 0.9999  # it refuses 1, which leaves the likeliest token alone


class OpenVINO:
    """An artifact in OpenVINO GenAI; attributes as in `Backend`."""

    rewinds = False  # the pipeline's own prefix cache does what rewinding is for
    shows_logits = False

    def __init__(
        self, artifact: Artifact, device: str, reason: str, genai: Any, open_pipeline: Callable[[], Any]
    ) -> None:
        self.provider, self.reason = f"openvino-{device}", reason
        self.chunk_size: int | None = artifact.chunk_size
        self._artifact, self._device = artifact, device
        self._genai = genai
        self._open = open_pipeline
        self.pipeline = open_pipeline()
        self.lock = threading.Lock()  # of the pipeline, which several answers may share
        self._valid: set[Guidance] = set()
        self._numbers = itertools.count()
        self._stateful: Stateful | None = None
        self.tokenizer = Tokenizer.open(artifact.root)

    @classmethod
    def load(cls, artifact: Artifact, provider: str, keep: int) -> OpenVINO:
        """As `backends.load`; `provider` is `auto` or a device."""
        try:
            import openvino
            import openvino_genai
            import openvino_tokenizers  # noqa: F401 - without it OpenVINO GenAI cannot read the tokenizer
        except ImportError as error:
            raise UserError(f"{artifact.root} needs OpenVINO: {_INSTALL}") from error
        _check_version(artifact)
        available = openvino.Core().available_devices
        device, reason = choose_device(provider, artifact.manifest["device"], available)
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = artifact.chunk_size
        scheduler.enable_prefix_caching = keep > 0

        def open_pipeline() -> Any:
            return openvino_genai.ContinuousBatchingPipeline(
                artifact.root, scheduler, DEVICES[device], _properties(artifact, device)
            )

        try:
            return cls(artifact, device, reason, openvino_genai, open_pipeline)
        except RuntimeError as error:
            raise UserError(
                f"OpenVINO could not load {artifact.root} on {DEVICES[device]}: {_last_line(error)}"
            ) from error

    def logits_generator(
        self, options: Mapping[str, Any], guidance: Guidance | None, max_length: int
    ) -> StatefulGenerator:
        if guidance is not None:
            raise UserError("with OpenVINO an answer has guidance, or logprobs and logit_bias: leave one off")
        return self._with_logits().generator(options, max_length)

    def generator(
        self, options: Mapping[str, Any], guidance: Guidance | None, max_length: int
    ) -> PipelineGenerator:
        config = self.pipeline.get_config()
        for name, value in {"random_seed": random.randrange(2**31), **options}.items():
            if name == "min_p" and value > _LARGEST_MIN_P:
                name, value = "do_sample", False
            setattr(config, _RENAMED.get(name, name), value)
        config.max_length = max_length
        ends = set() if options.get("ignore_eos") else set(self._artifact.end_tokens)
        config.stop_token_ids = ends | set(options.get("stop_token_ids", ()))
        if guidance is not None:
            self._check(guidance)
            config.structured_output_config = self._structure(guidance)
        text = self.tokenizer if self._artifact.images else None
        return PipelineGenerator(self, next(self._numbers), config, text)

    def _check(self, guidance: Guidance) -> None:
        """Try a grammar with one token. OpenVINO GenAI compiles it in a step of the pipeline, and where that
        fails it tries again in every later step, whoever's it is: then only a new pipeline helps.

        Raises:
            UserError: xgrammar refuses the grammar.
        """
        if guidance in self._valid:
            return
        config = self.pipeline.get_config()
        config.max_new_tokens = 1
        config.structured_output_config = self._structure(guidance)
        trial = PipelineGenerator(
            self, next(self._numbers), config, self.tokenizer if self._artifact.images else None
        )
        trial.append_tokens(np.asarray(self.tokenizer.encode("A"), np.int32))
        try:
            while not trial.tried():
                trial.generate_next_token()
        except RuntimeError as error:
            with self.lock:
                self.pipeline = self._open()
            raise UserError(f"the guidance is not valid: {why_refused(_last_line(error))}") from error
        self._valid.add(guidance)

    def logprobs(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """The pipeline echoes a prompt with them."""
        options = {**GREEDY, "ignore_eos": True, "echo": True, "logprobs": 1}
        generator = self.generator(options, None, len(tokens) + 1)
        generator.append_tokens(np.asarray(tokens, np.int32))
        while len(generator.logprobs) < len(tokens):
            generator.generate_next_token()
        return np.asarray(generator.logprobs[1 : len(tokens)], np.float32)

    def image_inputs(self, text: str, tokens: Sequence[int], images: Sequence[Patches]) -> Any:
        """The text and pixels: the pipeline cuts them up as they are, and puts features in their places."""
        if _IMAGE_TAG in text:
            raise UserError(f"a text has {_IMAGE_TAG} written in it: remove it")
        # The pipeline's own tokenizer gives the ids of a text that needs no normalising, and others else.
        normalised = self.tokenizer.decode(self.tokenizer.encode(text), special=True)
        return normalised, [image.pixels for image in images]

    def _with_logits(self) -> Stateful:
        """Compiled once, when somebody first wants logits."""
        with self.lock:
            if self._stateful is None:
                properties = _properties(self._artifact, self._device)
                self._stateful = Stateful(self._artifact, DEVICES[self._device], properties)
            return self._stateful

    def _structure(self, guidance: Guidance) -> Any:
        if guidance.kind == "lark_grammar":
            raise UserError(
                "OpenVINO takes no llguidance grammar: give a JSON schema or a regular expression"
            )
        if guidance.kind == "answer":
            return self._genai.StructuredOutputConfig(structural_tags_config=structural_tag(guidance.text))
        return self._genai.StructuredOutputConfig(**{guidance.kind: guidance.text})


class PipelineGenerator:
    """One request to the pipeline, begun with the first token that is asked for."""

    def __init__(self, backend: OpenVINO, number: int, config: Any, text: Tokenizer | None) -> None:
        """Args:
        text: set where the pipeline takes its prompts as text, because it may have images.
        """
        self._backend, self._number, self._config = backend, number, config
        self._pipeline = backend.pipeline
        self._text = text
        self._prompt: list[int] = []
        self._inputs: tuple[str, list[npt.NDArray[np.uint8]]] | None = None
        self._request: Any = None
        self._ready: deque[int] = deque()
        self._token: list[int] = []
        self.logprobs: list[float] = []  # of the tokens, and of the prompt's if it is echoed

    def append_tokens(self, tokens: npt.NDArray[np.int32]) -> None:
        self._prompt += [int(token) for token in tokens]

    def set_inputs(self, inputs: tuple[str, list[npt.NDArray[np.uint8]]]) -> None:
        """As `OpenVINO.image_inputs` gives them."""
        self._inputs = inputs

    def generate_next_token(self) -> None:
        """One step of the pipeline, which may only read a chunk of a long prompt."""
        with self._backend.lock:
            if self._pipeline is not self._backend.pipeline:
                raise RuntimeError("another answer's guidance was not valid and took the pipeline: ask again")
            if self._request is None:
                self._request = self._begin()
            if not self._ready and not self._request.can_read():  # another answer's step may have made it
                self._pipeline.step()
            while self._request.can_read():
                for output in self._request.read().values():
                    self._ready.extend(output.generated_ids)
                    self.logprobs.extend(output.generated_log_probs)
        self._token = [self._ready.popleft()] if self._ready else []

    def get_next_tokens(self) -> npt.NDArray[np.int64]:
        """The new token, or none while the prompt is still being read."""
        return np.array(self._token, np.int64)

    def tried(self) -> bool:
        """Whether the request was begun and is through."""
        return self._request is not None and self.is_done()

    def is_done(self) -> bool:
        running = type(self._request.get_status()).RUNNING
        return not self._ready and self._request.get_status() != running and not self._request.can_read()

    def _begin(self) -> Any:
        import openvino

        if self._text is not None:
            text, images = self._inputs or (self._text.decode(self._prompt, special=True), [])
            self._config.apply_chat_template = False
            tensors = [openvino.Tensor(np.ascontiguousarray(pixels[None])) for pixels in images]
            return self._pipeline.add_request(self._number, text, tensors, self._config)
        prompt = openvino.Tensor(np.asarray([self._prompt], np.int64))
        return self._pipeline.add_request(self._number, prompt, self._config)


def choose_device(wanted: str, made_for: str, available: Sequence[str]) -> tuple[str, str]:
    """The device to run on, a key of `DEVICES`, and the reason in one line, which says for a CPU what would
    be quicker there.

    Args:
        wanted: a device, or "auto" for the artifact's own, or else the CPU.
        made_for: the artifact's device.
        available: what OpenVINO finds here, such as "CPU" and "GPU.0".

    Raises:
        UserError: no such device, or one that was asked for is not there or cannot run language models.
    """
    found = {name.partition(".")[0] for name in available}
    device = made_for if wanted == "auto" else wanted
    if device not in DEVICES:
        raise UserError(f"no OpenVINO device '{device}': there are auto, {', '.join(DEVICES)}")
    title = DEVICES[device]
    problem = None
    if title not in found:
        problem = f"OpenVINO finds no {title} on this machine, only {', '.join(sorted(found)) or 'nothing'}"
    elif device == "npu":
        problem = "OpenVINO GenAI's paged attention does not run on the NPU"
    if problem is None:
        reasons = ["the artifact was made for it" if wanted == "auto" else "asked for"]
    elif wanted == "auto":
        device, reasons = "cpu", [problem]
    else:
        raise UserError(f"{problem}: install its driver, or choose another device")
    if device == "cpu":
        reasons.append(_QUICKER)
    return device, f"OpenVINO on {DEVICES[device]}: {'; '.join(reasons)}"


def _check_version(artifact: Artifact) -> None:
    """OpenVINO reads what older versions wrote, not what newer ones did."""
    made, here = artifact.manifest["openvino"], version("openvino")
    if _release(made) > _release(here):
        raise UserError(
            f"{artifact.root} was made with OpenVINO {made}, and this is {here}: install openvino, "
            f"openvino-genai and openvino-tokenizers {made} or newer, or export it again"
        )


def _release(text: str) -> tuple[int, ...]:
    """Year and release; a patch changes no format."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _properties(artifact: Artifact, device: str) -> dict[str, int | str]:
    """The artifact's own, what pays on a CPU, and a place for kernels compiled for a graphics device. The CPU
    compiles as quickly as it would read them."""
    properties: dict[str, int | str] = {**artifact.provider_options(OPENVINO_EP.key)}  # of the profile
    if device == "cpu":
        threads = artifact.threads.openvino if artifact.threads is not None else {}
        return {**_ON_CPU, **properties, **threads}
    from platformdirs import user_cache_dir

    properties["CACHE_DIR"] = user_cache_dir("qwen-edge", appauthor=False)
    return properties


def _last_line(error: Exception) -> str:
    """OpenVINO's errors begin with the places in its source, and end with what is wrong."""
    return str(error).strip().splitlines()[-1].strip()
