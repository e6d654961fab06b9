"""llama.cpp's own quantisation of a mixture's real weights, read back as floats for transformers.

llama.cpp chooses the type of every tensor (its `llama_model_quantize`, benchmarks.peers.llama_quantize); the
package gguf turns what it wrote into floats again. So the weights are llama.cpp's and the activations stay
float32, which its kernels round too: what is measured is at best as bad as llama.cpp.

K-quants and IQ-quants take rows of 256 values only, and for others llama.cpp falls back to blocks of 32 with
more bits. `joined` lays rows end to end until they are a multiple of 256, as if the model were wide enough:
it shows what the formats cost where they apply. Nothing runs such a file.
"""

from __future__ import annotations

import math
import os
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFReader, get_tensor_name_map
from gguf.quants import dequantize
from qwen_export.architecture.models.qwen3_5_moe import MoeTextConfig
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from benchmarks.peers.gguf_file import finish, open_writer

_SUPERBLOCK = 256  # values, of K-quants and IQ-quants


@dataclass(frozen=True)
class Read:
    """What llama.cpp made of the weights.

    Attributes:
        bytes: of all tensors.
        weights: by transformers' names, float32.
        types: how many of the values that were quantised are in which type.
    """

    bytes: int
    weights: dict[str, torch.Tensor]
    types: Counter[str]


def quantized(
    python: str,
    form: str,
    model: PreTrainedModel,
    config: MoeTextConfig,
    folder: Path,
    joined: bool,
    importance: Mapping[str, np.ndarray] | None = None,
) -> Read:
    """The weights of `model` in llama.cpp's `form` (such as Q4_K_M).

    Args:
        python: of an environment that has llama-cpp-python.
        folder: where files are written.
        importance: see `importance`.

    Raises:
        subprocess.CalledProcessError: llama.cpp cannot.
    """
    state = model.state_dict()
    source, target = folder / "source.gguf", folder / f"{form}.gguf"
    writer = open_writer(source, config)
    for name, value, _ in _named(state, config.num_hidden_layers):
        rows = _joined(value, joined)
        writer.add_tensor(name, np.ascontiguousarray(rows))
    finish(writer)
    command = [python, "-m", "benchmarks.peers.llama_quantize", str(source), str(target), form]
    if importance is not None:
        np.savez(folder / "importance.npz", **_of_rows(state, config, importance, joined))
        command += ["--imatrix", str(folder / "importance.npz")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    tensors = {tensor.name: tensor for tensor in GGUFReader(target).tensors}
    parts: dict[str, list[torch.Tensor]] = {}
    types: Counter[str] = Counter()
    for name, value, origin in _named(state, config.num_hidden_layers):
        tensor = tensors[name]
        if tensor.tensor_type != GGMLQuantizationType.F32:
            types[tensor.tensor_type.name] += value.size
        found = dequantize(np.asarray(tensor.data), tensor.tensor_type).reshape(value.shape)
        parts.setdefault(origin, []).append(torch.from_numpy(found.copy()))
    weights = {
        origin: torch.cat(found, 1 if len(found) > 1 else 0).reshape(state[origin].shape)
        for origin, found in parts.items()
    }
    target.unlink()
    return Read(sum(int(tensor.n_bytes) for tensor in tensors.values()), weights, types)


def importance(model: PreTrainedModel, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Mean square of each projection's input features over a text, what llama.cpp calls an importance matrix.

    Args:
        ids: [sequences, tokens]

    Returns:
        By transformers' name of the weight: [in]; of experts [experts, in], each expert over its own tokens,
        and where it has none over all that came by.
    """
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, np.ndarray] = {}

    def add(name: str, inputs: torch.Tensor, row: int, rows: int) -> None:
        squares = inputs.double().square().reshape(-1, inputs.shape[-1])
        sums.setdefault(name, np.zeros((rows, squares.shape[1])))[row] += squares.sum(0).numpy()
        counts.setdefault(name, np.zeros((rows, 1)))[row] += len(squares)

    names = {module: name for name, module in model.named_modules()}

    def experts(module, hidden, chosen, weights):  # type: ignore[no-untyped-def]
        found = torch.zeros_like(hidden)
        for expert in range(module.num_experts):
            tokens, place = torch.where(chosen == expert)
            add(f"{names[module]}.gate_up_proj", hidden[tokens], expert, module.num_experts)
            gate, up = (hidden[tokens] @ module.gate_up_proj[expert].mT).chunk(2, -1)
            inner = module.act_fn(gate) * up
            add(f"{names[module]}.down_proj", inner, expert, module.num_experts)
            found.index_add_(0, tokens, inner @ module.down_proj[expert].mT * weights[tokens, place, None])
        return found

    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: add(f"{name}.weight", inputs[0], 0, 1))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    before = model.config._experts_implementation
    ALL_EXPERTS_FUNCTIONS.register("importance", experts)
    model.set_experts_implementation("importance")
    try:
        with torch.no_grad():
            model(torch.from_numpy(ids))
    finally:
        model.set_experts_implementation(before)
        for hook in hooks:
            hook.remove()
    found = {}
    for name, total in sums.items():
        whole = total.sum(0) / counts[name].sum()
        seen = counts[name] > 0
        found[name] = np.where(seen, total / np.maximum(counts[name], 1), whole).squeeze(
            0 if len(total) == 1 else ()
        )
    return found


def _named(state: Mapping[str, torch.Tensor], layers: int) -> Iterator[tuple[str, np.ndarray, str]]:
    """(GGUF's name, values, transformers' name); gate_up_proj is two tensors there."""
    names = get_tensor_name_map(MODEL_ARCH.QWEN35MOE, layers)
    for origin, tensor in state.items():
        if origin == "lm_head.weight":  # tied
            continue
        value = tensor.float().numpy()
        if origin.endswith("experts.gate_up_proj"):
            gate, up = np.split(value, 2, axis=1)
            block = f"blk.{origin.split('.')[2]}"
            yield f"{block}.ffn_gate_exps.weight", gate, origin
            yield f"{block}.ffn_up_exps.weight", up, origin
            continue
        if origin.endswith("dt_bias"):
            yield f"blk.{origin.split('.')[2]}.ssm_dt.bias", value, origin
            continue
        name = names.get_name(origin, try_suffixes=(".weight",))
        assert name, origin
        if origin.endswith("down_proj"):
            name += ".weight"
        yield name, value.squeeze(), origin


def _joined(value: np.ndarray, joined: bool) -> np.ndarray:
    """Rows laid end to end until they are whole superblocks: [..., rows / n, n x columns]."""
    if not joined or value.ndim < 2:
        return value
    count = math.lcm(value.shape[-1], _SUPERBLOCK) // value.shape[-1]
    if value.shape[-2] % count:
        return value
    return value.reshape(*value.shape[:-2], value.shape[-2] // count, -1)


def _of_rows(
    state: Mapping[str, torch.Tensor],
    config: MoeTextConfig,
    importance: Mapping[str, np.ndarray],
    joined: bool,
) -> dict[str, np.ndarray]:
    """`importance` by GGUF's names, for the rows as they are written."""
    found = {}
    for name, value, origin in _named(state, config.num_hidden_layers):
        if origin in importance:
            times = _joined(value, joined).shape[-1] // value.shape[-1]
            found[name] = np.tile(importance[origin], times).astype(np.float32)
    return found
