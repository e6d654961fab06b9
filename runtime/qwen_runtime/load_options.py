"""How an artifact is loaded: by `Model.load`, a process of its own, the server and the command line alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qwen_runtime.speculative import Speculative
from qwen_runtime.states import StateSettings


@dataclass(frozen=True)
class LoadOptions:
    """What may be chosen when an artifact is loaded. It can be pickled.

    Attributes:
        provider: `cpu`, `cuda`, `dml`, `openvino` or `webgpu`, or of an OpenVINO artifact the device, `cpu`,
            `gpu` or `npu`; `auto` takes the one that the artifact was made for, or else the first other one
            that loads it, the CPU last.
        verify: compare every file's SHA-256 with the manifest, not only the small ones'.
        context_length: most tokens of prompt and answer together, if fewer than the artifact's own, which
            None takes.
        keep: how many states to keep after their answers, each with a KV cache of some 4096 tokens more than
            it needs. A prompt that goes on from one, as the next turn of a conversation does, is read from
            there on; but not with a seed, nor where the sampling differs.
        states: run the graph in ONNX Runtime itself, on the CPU, and keep states as arrays, and in a folder.
            Then a prompt may go on from several points of one, whatever the sampling, with images and
            portable artifacts too. A seed gives other tokens than without.
        image_pixels: most of all images of a prompt, as they are before they are made smaller; None is 100
            million.
        prepacked: a folder for weights in the layout of this CPU, made there once with twice the artifact's
            bytes. They are mapped and not copied: memory is the system's to take back, and a model larger
            than the memory runs at the pace of the disk.
        speculative: guess the next tokens and check several in a run, in ONNX Runtime itself on the CPU;
            states are kept as with `states`. Off by itself where it does not pay.
        threads: that compute on the CPU: a number, 0 for one on each physical core, `performance` for one on
            each P core; `4:yield` keeps no core busy while a thread waits, `4:50us` not longer. None: as
            ORT_INTRA_OP_NUM_THREADS says, or the artifact. `ModelInfo.threads` has the outcome.
        adapters: files of adapters beside the artifact's own, by the name that an answer asks for.
    """

    provider: str = "auto"
    verify: bool = False
    context_length: int | None = None
    keep: int = 0
    states: StateSettings | None = None
    image_pixels: int | None = None
    prepacked: Path | None = None
    speculative: Speculative | None = None
    threads: int | str | None = None
    adapters: Mapping[str, str | Path] = field(default_factory=dict)


DEFAULTS = LoadOptions()
