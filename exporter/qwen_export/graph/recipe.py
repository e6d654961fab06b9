"""From a profile's precision by role to how one weight is stored on one target."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from qwen_common.errors import UserError
from qwen_profiles.reading import BODY
from qwen_profiles.schema import FrequentTokens, Role, WeightFormat

from qwen_export.architecture.tensors import TensorSpec, layer_of
from qwen_export.checkpoint.tensors.tensor import CheckpointTensor, Fp4Experts, common_scheme
from qwen_export.graph.targets import Target
from qwen_export.graph.weights import Rows, Storage, Transform, Weight
from qwen_export.quantize.blockwise import Quantization
from qwen_export.quantize.fp4 import Fp4

# MatMulNBits' schema; the smallest of 2 bits that has a quick kernel.
_SMALLEST_BLOCK = {2: 32, 4: 16, 8: 16}
_LARGEST_BLOCK = 128  # QMoE's on the CPU


def check_layers(layers: Mapping[int, Collection[Role]], specs: Mapping[str, TensorSpec]) -> None:
    """Refuse formats by layer that would format nothing.

    Args:
        layers: by layer, the roles that have a format of their own there.
        specs: the model's tensors.

    Raises:
        UserError: there is no such layer, or it has no weight of such a role. One of an MLP and experts will
            do, as `body` names both.
    """
    there: dict[int, set[Role]] = {}
    for name, spec in specs.items():
        if (layer := layer_of(name)) is not None and spec.recipe_role:
            there.setdefault(layer, set()).add(spec.recipe_role)
    for layer, roles in layers.items():
        if layer not in there:
            raise UserError(f"layer_weights.{layer}: the model has layers 0 to {max(there)}")
        body = set(BODY) if there[layer] & set(BODY) else set()
        if absent := sorted(set(roles) - there[layer] - body):
            raise UserError(
                f"layer_weights.{layer}.{absent[0]}: that layer has {', '.join(sorted(there[layer]))}"
            )


@dataclass(frozen=True)
class Recipe:
    """The precision of each role, for one target and one activation dtype.

    Attributes:
        accuracy_level: MatMulNBits' attribute; 4 lets the CPU kernel quantise activations to int8.
        scale_dtype: of quantised weights' scales; None: the activations'.
        cache_dtype: of the KV cache; None: the activations'.
        tensors: the checkpoint's.
        layers: by layer, the formats of roles that differ there.
        carry_over: tensors that are codes already keep them, where the target has a kernel for them.
        specs: shapes and roles of the model's tensors.
        switched: tensors that an adapter changes at run time.
        frequent_tokens: whose rows of embedding and lm_head have a form of their own, and which.
    """

    formats: dict[Role, WeightFormat]
    target: Target
    dtype: np.dtype
    accuracy_level: int = 0
    scale_dtype: np.dtype | None = None
    cache_dtype: np.dtype | None = None
    tensors: Mapping[str, CheckpointTensor] = field(default_factory=dict)
    layers: Mapping[int, Mapping[Role, WeightFormat]] = field(default_factory=dict)
    carry_over: bool = True
    specs: Mapping[str, TensorSpec] = field(default_factory=dict)
    switched: Collection[str] = ()
    frequent_tokens: FrequentTokens | None = None

    def whole(self, tensor: str) -> Rows:
        """All rows of one of the checkpoint's tensors."""
        return Rows(tensor, 0, self.specs[tensor].shape[0])

    def role(self, tensor: str) -> Role:
        """The role whose format `tensor` is stored in."""
        role = self.specs[tensor].recipe_role
        assert role, f"{tensor} stays in floating point"
        return role

    def floats(
        self,
        tensor: str,
        dtype: np.dtype | None = None,
        transform: Transform | None = None,
        name: str | None = None,
    ) -> Weight:
        """One of the checkpoint's tensors that is not quantised.

        Args:
            dtype: that it is stored in; None: the activations'.
            name: of the weight, where it is not the tensor's.
        """
        spec = self.specs[tensor]
        rows = (self.whole(tensor),)
        return Weight(name or tensor, spec.role, rows, spec.shape[1:], dtype or self.dtype, transform)

    def storage(
        self,
        role: Role,
        in_features: int,
        tensors: Collection[str] = (),
        whole_blocks: bool = False,
        even_blocks: bool = False,
    ) -> Storage:
        """How a projection of `role` with rows of `in_features`, made of `tensors`, is stored.

        Where the operator wants `whole_blocks` or an even number of them, or the target exact ones, the block
        size is halved until it fits; a row that no block fits stays in the activations' dtype.
        """
        whole, even = whole_blocks or even_blocks, even_blocks or self.target.exact_blocks
        return self._prequantized(in_features, tensors, even) or self.quantized(
            self._format(role, tensors), in_features, whole, even
        )

    def fp4_experts(self, stacks: Collection[str]) -> Fp4 | None:
        """The form of experts that are 4-bit floats already, where the target's QMoE reads it."""
        if not (self.carry_over and self.target.fp4_experts):
            return None
        found = [self.tensors.get(name) for name in stacks]
        forms = {tensor.fp4_experts if isinstance(tensor, Fp4Experts) else None for tensor in found}
        return forms.pop() if len(forms) == 1 else None

    def _prequantized(self, in_features: int, tensors: Collection[str], even: bool) -> Quantization | None:
        """The form that takes the codes of all `tensors` as they are; None if there is none.

        A group of codes may be cut into smaller blocks, which share its scale and zero point.
        """
        scheme = common_scheme(self.tensors[name] for name in tensors if name in self.tensors)
        if scheme is None or not self.carry_over:
            return None
        block = min(scheme.group_size & -scheme.group_size, _LARGEST_BLOCK)
        return self._fitting(scheme.bits, block, scheme.symmetric, in_features, True, even, prequantized=True)

    def _format(self, role: Role, tensors: Collection[str]) -> WeightFormat:
        layer = layer_of(next(iter(tensors), ""))
        return self.layers.get(-1 if layer is None else layer, {}).get(role, self.formats[role])

    def quantized(
        self, form: WeightFormat, in_features: int, whole: bool = False, even: bool = False
    ) -> Storage:
        """How rows of `in_features` are stored in `form`; the rest as for `storage`."""
        if form.bits is None:
            return self.dtype
        block = int(form.block_size)
        return self._fitting(form.bits, block, form.symmetric, in_features, whole, even) or self.dtype

    def _fitting(
        self,
        bits: int,
        block: int,
        symmetric: bool,
        in_features: int,
        whole: bool,
        even: bool,
        prequantized: bool = False,
    ) -> Quantization | None:
        # Experts side by side are gathered, zero points too: of 2 bits four fill a byte.
        multiple = max(2, 8 // bits) if even else 1
        if whole or even:
            while block >= _SMALLEST_BLOCK[bits] and in_features % (multiple * block):
                block //= 2
        if block < _SMALLEST_BLOCK[bits]:
            return None
        symmetric = symmetric and not self.target.zero_points_required
        return Quantization(bits, block, symmetric, self.scale_dtype or self.dtype, prequantized)
