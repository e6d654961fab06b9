"""An artifact on one execution provider in a process of its own, and what transformers says in its place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from qwen_common import providers
from qwen_export.checkpoint.checkpoint import Checkpoint

SCRIPT = Path(__file__).with_name("plugin_run.py")
CPU = "CPUExecutionProvider"
COPIES = {"MemcpyFromHost", "MemcpyToHost"}
Operators = dict[str, dict[str, int]]  # provider -> operator -> nodes


@dataclass(frozen=True)
class Images:
    """What an artifact takes of images, and the place of every token.

    Attributes:
        position_ids: int64 [3, 1, tokens].
    """

    pixel_values: np.ndarray
    image_grid_thw: np.ndarray
    position_ids: np.ndarray


@dataclass(frozen=True)
class Run:
    """Logits float32 [tokens, vocab], and the operators of the nodes that ran, by provider.

    Attributes:
        vision: those of the vision tower, and `features` float32 [image tokens, hidden], with images.
    """

    logits: np.ndarray
    ran: Operators
    vision: Operators = field(default_factory=dict)
    features: np.ndarray | None = None


@dataclass(frozen=True)
class Provider:
    """How one is asked.

    Attributes:
        command: of an interpreter that has it, without the script.
        name: its module, where it is a plug-in, or ONNX Runtime's name of it.
        variables: of the environment, added to this process's.
    """

    name: str
    command: Sequence[str] = (sys.executable,)
    options: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def record(self) -> providers.Provider:
        """What is known of it."""
        return next(
            record
            for record in providers.PROVIDERS.values()
            if self.name in (record.onnxruntime_name, (record.plugin or "").partition(":")[0])
        )

    def run(
        self,
        artifact: Path,
        ids: Sequence[int],
        chunks: Sequence[int],
        folder: Path,
        graph: str = "model.onnx",
        images: Images | None = None,
    ) -> Run:
        """A prompt in pieces of `chunks` tokens; `folder` takes the files.

        Raises:
            RuntimeError: the process failed; the end of what it said.
        """
        asked: dict[str, Any] = {"graph": graph, "ids": list(ids), "chunks": list(chunks)}
        if images:
            asked["images"] = "images.npz"
            np.savez(folder / "images.npz", **vars(images))
        done = subprocess.run(
            [*self.command, str(SCRIPT), self.name, str(artifact), json.dumps(dict(self.options))],
            input=json.dumps(asked),
            env={**os.environ, **self.variables},
            cwd=folder,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        ran = json.loads(done.stdout.splitlines()[-1])
        vision = ran.pop("vision", {})
        features = np.load(folder / "features.npy") if images else None
        return Run(np.load(folder / "logits.npy"), ran, vision, features)


def webgpu(folder: str) -> Provider:
    """The plug-in that was installed into `folder`; a software device will do."""
    path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {"PYTHONPATH": path, "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER": "1"}
    return Provider("onnxruntime_ep_webgpu", variables=variables)


def logits_of_transformers(checkpoint: Path, ids: Sequence[int], images: Images | None = None) -> np.ndarray:
    """Float32 [tokens, vocab]."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    inputs: dict[str, Any] = {"input_ids": torch.tensor([list(ids)])}
    kind = AutoModelForImageTextToText if Checkpoint.open(str(checkpoint)).vision else AutoModelForCausalLM
    model = kind.from_pretrained(checkpoint, dtype=torch.float32).eval()
    if images:
        inputs["pixel_values"] = torch.tensor(images.pixel_values)
        inputs["image_grid_thw"] = torch.tensor(images.image_grid_thw)
        inputs["position_ids"] = torch.tensor(images.position_ids)
    with torch.no_grad():
        return model(**inputs).logits[0].numpy()


def features_of_transformers(checkpoint: Path, images: Images) -> np.ndarray:
    """Of the vision tower: float32 [image tokens, hidden]."""
    import torch
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    values, grid = torch.tensor(images.pixel_values), torch.tensor(images.image_grid_thw)
    with torch.no_grad():
        return torch.cat(model.model.get_image_features(values, grid).pooler_output).numpy()


def random_image(checkpoint: Path, height: int, width: int, text: int) -> tuple[list[int], Images]:
    """Token ids around one image of `height` x `width` random patches, with `text` ids on each side."""
    vision = Checkpoint.open(str(checkpoint)).vision
    assert vision
    generator = np.random.default_rng([height, width])
    side = vision.spatial_merge_size
    rows, columns = height // side, width // side
    before, after = (generator.integers(0, 2000, text).tolist() for _ in range(2))
    ids = [*before, vision.vision_start_token_id, *[vision.image_token_id] * (rows * columns), *after]
    # An image's tokens share a time, the next token comes after the longer side.
    first = text + 1
    image = np.stack(np.broadcast_arrays(0, *np.indices((rows, columns)))).reshape(3, -1) + first
    behind = np.arange(text) + first + max(rows, columns)
    positions = [np.tile(np.arange(first), (3, 1)), image, np.tile(behind, (3, 1))]
    patches = generator.normal(size=(height * width, vision.patch_dim)).astype(np.float32)
    grid = np.array([[1, height, width]], np.int64)
    return ids, Images(patches, grid, np.concatenate(positions, axis=1)[:, None].astype(np.int64))
