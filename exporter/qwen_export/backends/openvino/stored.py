"""An OpenVINO artifact's weights as the checkpoint would hold them: same names, shapes, the stored values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from qwen_common.errors import UserError

from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.architecture.models.qwen3_5_moe import MoeTextConfig
from qwen_export.architecture.tensors import TensorSpec
from qwen_export.backends.openvino.compress import Weight, weights
from qwen_export.backends.protocol import ArtifactWeights

_BITS = {"u4": 4, "i4": 4}  # element types of several values a byte, the first one in the low bits
_SIGNED = {"i4", "i8"}
_LANGUAGE_MODELS = ("openvino_model.xml", "openvino_text_embeddings_model.xml", "openvino_language_model.xml")
_RUNTIME_BYTES = 400_000_000  # Python, OpenVINO and its compiled kernels (measured, Linux x86-64)
_COPIES = 2  # of the weights in memory: the pipeline's, and those of the IR that shows its logits


@dataclass(frozen=True)
class _Constant:
    """A constant of the IR, in the shape that it has there; the IR's file stays mapped."""

    node: Any

    @property
    def kind(self) -> str:
        return str(self.node.get_element_type().get_type_name())

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.node.output(0).shape)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """float32 values of rows `start` to `stop` of axis 0, or the one row that is for all of them."""
        shape = (stop - start, *self.shape[1:])
        if self.shape[0] == 1:
            start, stop, shape = 0, 1, self.shape
        data, width = self.node.data, math.prod(self.shape[1:])
        bits = _BITS.get(self.kind)
        if bits is None:
            found = data[start:stop]
            if self.kind == "bf16":
                found = found.view(np.uint16).view(ml_dtypes.bfloat16)
            return np.asarray(found.astype(np.float32))
        first, last = start * width, stop * width
        packed = data.reshape(-1).view(np.uint8)[first // 2 : -(-last // 2)]
        codes = np.stack([packed & 15, packed >> 4], -1).reshape(-1)[first % 2 :][: last - first]
        values = codes.astype(np.float32)
        if self.kind in _SIGNED:
            values = np.where(values > 7, values - 16, values)
        return values.reshape(shape)


@dataclass(frozen=True)
class _Operand:
    """What one use of a weight multiplies by: codes, with a scale and perhaps a zero point for each group."""

    codes: _Constant
    scales: _Constant | None
    zeros: _Constant | None

    @classmethod
    def of(cls, weight: Weight, nodes: Mapping[str, Any]) -> _Operand:
        constants = [_Constant(nodes[name]) for name in weight.sizes]
        constants = [constant for constant in constants if constant.kind != "i64"]  # shapes
        codes = max(constants, key=lambda constant: math.prod(constant.shape))
        others = [constant for constant in constants if constant is not codes]
        scales = next((c for c in others if c.kind in ("f16", "f32")), None)
        return cls(codes, scales, next((c for c in others if c is not scales), None))

    def rows(self, start: int, stop: int, rank: int) -> np.ndarray:
        """float32 rows of axis 0 of a tensor of `rank` axes; the IR cuts the last one into groups."""
        values = self.codes.rows(start, stop)
        if self.zeros is not None:
            values = values - self.zeros.rows(start, stop)
        if self.scales is not None:
            values = values * self.scales.rows(start, stop)
        return values.reshape(stop - start, *self.codes.shape[1 : rank - 1], -1)


@dataclass(frozen=True)
class IRTensor:
    """A tensor of the checkpoint, read from the IR; a `CheckpointTensor`.

    Attributes:
        role: of the recipe.
        shape: the checkpoint's.
        nbytes: with scales and zero points.
    """

    role: str
    shape: tuple[int, ...]
    nbytes: int
    files: frozenset[Path]
    parts: tuple[_Operand, ...]

    @property
    def quantised(self) -> bool:
        return any(part.scales is not None for part in self.parts)

    def read(self, start: int, stop: int) -> np.ndarray:
        """float32 rows `start` to `stop` of axis 0."""
        found = [part.rows(start, stop, len(self.shape)) for part in self.parts]
        return found[0] if len(found) == 1 else np.concatenate(found, axis=1)


def read_model(path: Path) -> Any:
    """The openvino.Model in the file `path`; its weights stay mapped.

    Raises:
        UserError: OpenVINO is not installed, or cannot read it.
    """
    try:
        import openvino
    except ImportError as error:
        raise UserError(
            f"{path.parent} is for OpenVINO: pip install 'qwen-edge[export,openvino]', in an environment of "
            "its own"
        ) from error
    try:
        return openvino.Core().read_model(path)
    except RuntimeError as error:
        raise UserError(f"{path} cannot be read: copy the artifact again") from error


def artifact_weights(artifact: Path, config: TextConfig, specs: Mapping[str, TensorSpec]) -> ArtifactWeights:
    """The matrices of `artifact` by their names in the checkpoint, and what reading them takes.

    Args:
        specs: the checkpoint's tensors.

    Raises:
        UserError: the artifact is not of that checkpoint.
    """
    places: dict[str, dict[int, tuple[Path, Weight, _Operand]]] = {}
    decoded: dict[str, float] = {}  # constants by name: bytes that one token reads
    for file in (artifact / name for name in _LANGUAGE_MODELS if (artifact / name).is_file()):
        model = read_model(file)
        nodes = {node.get_friendly_name(): node for node in model.get_ops()}
        for weight in weights(model, file.stem):
            if weight.tensor in specs:
                operand = _Operand.of(weight, nodes)
                places.setdefault(weight.tensor, {})[weight.part] = file, weight, operand
            if weight.role != "embedding":
                share = 1.0
                if weight.role == "experts" and isinstance(config, MoeTextConfig):
                    share = config.num_experts_per_tok / config.num_experts
                decoded |= {constant: size * share for constant, size in weight.sizes.items()}
    tensors = {}
    for name, found in places.items():
        ordered = [found[at] for at in sorted(found)]
        tensor = IRTensor(
            role=specs[name].role,
            shape=specs[name].shape,
            nbytes=sum(sum(weight.sizes.values()) for _, weight, _ in ordered),
            files=frozenset(file for file, _, _ in ordered),
            parts=tuple(part for _, _, part in ordered),
        )
        rows = {part.codes.shape[0] for part in tensor.parts}
        if rows != {tensor.shape[0]} or tensor.read(0, 1).shape[1:] != tensor.shape[1:]:
            raise UserError(
                f"{artifact} has {name} in another shape than {tensor.shape}: it was exported by another "
                "version, or from another checkpoint; export it again"
            )
        tensors[name] = tensor
    size = sum(path.stat().st_size for path in artifact.glob("*.bin"))
    return ArtifactWeights(tensors, int(sum(decoded.values())), _COPIES * size + _RUNTIME_BYTES)
