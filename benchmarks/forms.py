"""Peak memory of exporting a checkpoint in each form in which quantised ones store weights.

    python -m benchmarks.forms [FORM...] [--layers 6 24] [--experts 64 256]

Random codes of the right shapes, in the 0.8B geometry with so many layers and a vocabulary of 32,000,
or ("experts") in one layer of 35B-A3B with as many experts; profile `cpu`, without verification, each in a
process of its own. Memory is the process's own maximum (VmHWM). Flat means: as much for the larger model.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from qwen_export.checkpoint.config import load_config
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from benchmarks.export import watched
from benchmarks.geometry import GEOMETRIES
from benchmarks.support.checkpoints import TINY, copy_tokenizer

_BF16, _E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
_RNG = np.random.default_rng(0)
Parts = dict[str, np.ndarray]


def _random(shape: tuple[int, ...], dtype: Any, high: int = 256) -> np.ndarray:
    """Bytes below `high`, seen as `dtype`."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return _RNG.integers(0, high, size, np.uint8).view(dtype).reshape(shape)


def _scales(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    return _RNG.uniform(0.001, 0.002, shape).astype(dtype)


def _fp8(n: int, k: int) -> Parts:
    blocks = -(-n // 128), -(-k // 128)
    return {"weight": _random((n, k), _E4M3, 120), "weight_scale_inv": _scales(blocks, _BF16)}


def _fp8_stacked(experts: int, n: int, k: int) -> Parts:
    """Names end with what follows the stack's own name."""
    return {
        "": _random((experts, n, k), _E4M3, 120),
        "_scale_inv": _scales((experts, n // 128, k // 128), _BF16),
    }


def _gptq(n: int, k: int, out_of_order: bool = False) -> Parts:
    order = np.arange(k, dtype=np.int32) // 128
    return {
        "qweight": _random((k // 8, n), np.int32),
        "qzeros": np.full((k // 128, n // 8), 0x77777777, np.int32),
        "scales": _scales((k // 128, n), np.float16),
        "g_idx": _RNG.permutation(order) if out_of_order else order,
    }


def _awq(n: int, k: int) -> Parts:
    return {
        "qweight": _random((k, n // 8), np.int32),
        "qzeros": _random((k // 128, n // 8), np.int32),
        "scales": _scales((k // 128, n), np.float16),
    }


def _packed(n: int, k: int) -> Parts:
    return {
        "weight_packed": _random((n, k // 8), np.int32),
        "weight_scale": _scales((n, k // 32), _BF16),
        "weight_zero_point": _random((n // 8, k // 32), np.int32),
        "weight_shape": np.array([n, k], np.int64),
    }


def _int8(n: int, k: int) -> Parts:
    return {"weight": _random((n, k), np.int8), "weight_scale": _scales((n, 1), _BF16)}


def _nvfp4(n: int, k: int) -> Parts:
    return {
        "weight_packed": _random((n, k // 2), np.uint8),
        "weight_scale": _random((n, k // 16), _E4M3, 120),
        "weight_global_scale": np.full(1, 5000, np.float32),
    }


def _mxfp4(n: int, k: int) -> Parts:
    scales = _RNG.integers(112, 118, (n, k // 32), np.uint8)
    return {"weight_packed": _random((n, k // 2), np.uint8), "weight_scale": scales}


def _modelopt(n: int, k: int) -> Parts:
    return {
        "weight": _random((n, k // 2), np.uint8),
        "weight_scale": _random((n, k // 16), _E4M3, 120),
        "weight_scale_2": np.array(0.0002, np.float32),
    }


def _nf4(n: int, k: int, nested: bool = False) -> Parts:
    blocks = n * k // 64
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "shape": [n, k], "dtype": "bfloat16"}
    parts = {
        "weight": _random((n * k // 2, 1), np.uint8),
        "weight.quant_map": np.linspace(-1, 1, 16, dtype=np.float32),
        "weight.absmax": _scales((blocks,)),
    }
    if nested:
        state |= {"nested_blocksize": 256, "nested_offset": 0.01, "nested_dtype": "float32"}
        parts["weight.absmax"] = _random((blocks,), np.uint8)
        parts["weight.nested_absmax"] = _scales((-(-blocks // 256),))
        parts["weight.nested_quant_map"] = np.linspace(-1, 1, 256, dtype=np.float32)
    told = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return {**parts, "weight.quant_state.bitsandbytes__nf4": told}


def _bnb8(n: int, k: int) -> Parts:
    return {"weight": _random((n, k), np.int8), "SCB": _scales((n,))}


def _mlx(n: int, k: int, bits: int = 4) -> Parts:
    groups = {part: _scales((n, k // 64), _BF16) for part in ("scales", "biases")}
    return {"weight": _random((n, k * bits // 32), np.uint32), **groups}


def _torchao(n: int, k: int) -> Parts:
    return {
        "_weight_qdata": _random((n, k), np.int8),
        "_weight_scale": _scales((n, 1), _BF16),
        "_weight_zero_point": np.zeros((n, 1), np.int8),
    }


def _compressed(format: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True, **weights}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"all": group}}


_INT4 = {"bits": 4, "group_size": 128, "sym": False}
_AUTO_ROUND = {"quant_method": "auto-round", **_INT4, "data_type": "int"}
_NVFP4 = _compressed("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16)
# What config.json says, and what stands for a weight [N, K].
FORMS: Mapping[str, tuple[dict[str, Any], Callable[..., Parts]]] = {
    "bf16": ({}, lambda n, k: {"weight": _random((n, k), _BF16, 60)}),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, _fp8),
    "gptq": ({"quant_method": "gptq", **_INT4}, _gptq),
    "gptq, groups out of order": ({"quant_method": "gptq", **_INT4}, lambda n, k: _gptq(n, k, True)),
    "awq": ({"quant_method": "awq", **_INT4, "version": "gemm", "zero_point": True}, _awq),
    "auto-round": ({**_AUTO_ROUND, "packing_format": "auto_round:auto_gptq"}, _gptq),
    "auto-round, its own": ({**_AUTO_ROUND, "packing_format": "auto_round"}, _gptq),
    "compressed-tensors int4": (
        _compressed("pack-quantized", strategy="group", group_size=32, symmetric=False),
        _packed,
    ),
    "compressed-tensors int8": (_compressed("int-quantized", num_bits=8, strategy="channel"), _int8),
    "compressed-tensors nvfp4": (_NVFP4, _nvfp4),
    "compressed-tensors mxfp4": (
        _compressed("mxfp4-pack-quantized", type="float", strategy="group", group_size=32),
        _mxfp4,
    ),
    "modelopt nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, _modelopt),
    "bitsandbytes nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, _nf4),
    "bitsandbytes nf4, nested": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        lambda n, k: _nf4(n, k, True),
    ),
    "bitsandbytes int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, _bnb8),
    "mlx 4 bits": ({"quant_method": "mlx", "bits": 4, "group_size": 64}, _mlx),
    "mlx 5 bits": ({"quant_method": "mlx", "bits": 5, "group_size": 64}, lambda n, k: _mlx(n, k, 5)),
    "torchao int8": ({"quant_method": "torchao"}, _torchao),
}
EXPERTS = (
    "fp8, experts stacked",
    *("fp8", "gptq", "compressed-tensors nvfp4", "bitsandbytes nf4, nested", "mlx 4 bits"),
)
_ROLES = ("mlp", "shared_expert", "attention", "linear_attention", "experts")


def write(folder: Path, form: str, geometry: Mapping[str, Any]) -> Path:
    """A checkpoint, a shard for each layer."""
    stacked = form == "fp8, experts stacked"
    quantization, parts_of = FORMS["fp8" if stacked else form]
    folder.mkdir(parents=True)
    config = {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", **geometry}
    config |= {"quantization_config": quantization} if quantization else {}
    (folder / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    shards: dict[str, Parts] = {}
    specs = load_config(folder).tensors()
    parts_of = cache(parts_of)  # layers of one shape are alike
    for name, spec in specs.items():
        shard = shards.setdefault(".".join(name.split(".")[:3]), {})
        module, _, kind = name.rpartition(".")
        if spec.recipe_role == "experts":
            experts, n, k = spec.shape
            if stacked:
                shard |= {name + part: value for part, value in _fp8_stacked(experts, n, k).items()}
                continue
            kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            for own in kinds:
                made = parts_of(n // len(kinds), k)
                for expert in range(experts):
                    shard |= {f"{module}.{expert}.{own}.{part}": value for part, value in made.items()}
        elif (spec.recipe_role in _ROLES and name.endswith("proj.weight")) or ".in_proj_qkv." in name:
            shard |= {f"{module}.{part}": value for part, value in parts_of(*spec.shape).items()}
        else:
            shard[name] = _random(spec.shape, _BF16, 60)
    for number, tensors in enumerate(shards.values()):
        file = f"model-{number:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    copy_tokenizer(TINY, folder)
    return folder


def peak(form: str, geometry: Mapping[str, Any]) -> int:
    """Bytes."""
    with tempfile.TemporaryDirectory() as name:
        checkpoint = write(Path(name, "checkpoint"), form, geometry)
        command = ["-c", "from qwen_export.cli import main; main()", "--profile", "cpu", "--no-verify"]
        return watched([sys.executable, *command, str(checkpoint), "-o", f"{name}/out", "--no-progress"])[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("forms", nargs="*", metavar="FORM", help=f"of {', '.join(FORMS)}")
    parser.add_argument("--layers", type=int, nargs="*", default=[6, 24])
    parser.add_argument("--experts", type=int, nargs="*", default=[64, 256])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    dense = {**GEOMETRIES["0.8B"], "vocab_size": 32_000}
    mixture = {**GEOMETRIES["35B-A3B"], "vocab_size": 32_000, "num_hidden_layers": 1}
    results: dict[str, dict[str, int]] = {}
    for form in arguments.forms or FORMS:
        for layers in arguments.layers:
            found = peak(form, {**dense, "num_hidden_layers": layers})
            results.setdefault(form, {})[f"{layers} layers"] = found
            print(form, layers, found >> 20, flush=True)
    for form in [form for form in EXPERTS if not arguments.forms or form in arguments.forms]:
        for experts in arguments.experts:
            found = peak(form, {**mixture, "num_experts": experts})
            results.setdefault(f"{form}, experts", {})[f"{experts} experts"] = found
            print(form, experts, found >> 20, flush=True)
    columns = list(dict.fromkeys(column for row in results.values() for column in row))
    table = Table("form", *(f"{column}, MiB" for column in columns))
    for form, row in results.items():
        table.add_row(form, *(str(row[column] >> 20) if column in row else "" for column in columns))
    Console(width=110).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
