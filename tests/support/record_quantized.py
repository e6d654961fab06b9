"""Small checkpoints as other libraries write them, and what those libraries' weights answer.

    python -m tests.support.record_quantized FORM...

in an environment that has the library of the form, PyTorch and transformers. Each form is a folder of
tests/exporter/recorded/quantized: the checkpoint as the library wrote it, and logits.npz with token ids, the
float32 logits of transformers' model with the weights that the library itself dequantises (MLX: of MLX's own
model), and the library's version.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

RECORDED = Path(__file__).parents[1] / "exporter" / "recorded" / "quantized"
GEOMETRY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "tie_word_embeddings": False,
}
IDS = np.random.default_rng(1).integers(2, GEOMETRY["vocab_size"], (1, 24))


def plain_checkpoint(folder: Path, **overrides: Any) -> torch.nn.Module:
    """The bfloat16 checkpoint that all are made from."""
    from tests.support.random_checkpoints import random_model

    model = random_model(**{**GEOMETRY, **overrides}).to(torch.bfloat16)
    model.save_pretrained(folder)
    if "num_experts" in overrides:  # which transformers saves one by one, and Qwen publishes stacked
        save_file(dict(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    return model


def logits_of(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> np.ndarray:
    """transformers' float32 logits with `weights` in place of those of the same names."""
    assert weights
    model = model.float().eval()
    missing = model.load_state_dict({name: value.float() for name, value in weights.items()}, strict=False)
    assert not missing.unexpected_keys, missing.unexpected_keys
    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.numpy()


def auto_round(format: str, **scheme: Any) -> Callable[[Path], np.ndarray]:
    """AutoRound without tuning: rounding to the nearest."""

    def write(folder: Path) -> np.ndarray:
        from auto_round import AutoRound
        from auto_round.export.export_to_awq.utils import dequantize_gemm
        from auto_round.schemes import QuantizationScheme
        from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from benchmarks.support.checkpoints import TINY

        options = {"bits": 4, "data_type": "int", "act_bits": 16, **scheme}
        with tempfile.TemporaryDirectory() as plain, tempfile.TemporaryDirectory() as written:
            model = plain_checkpoint(Path(plain))
            AutoRound(
                AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16),
                AutoTokenizer.from_pretrained(TINY),
                scheme=QuantizationScheme.from_dict(options),
                iters=0,
                disable_opt_rtn=True,
                device_map="cpu",
            ).quantize_and_save(written, format=format)
            (found,) = (path.parent for path in Path(written).rglob("model.safetensors"))
            keep(found, folder)
        tensors = load_file(folder / "model.safetensors")
        bits, group = options["bits"], options["group_size"]
        packing = json.loads((folder / "config.json").read_text())["quantization_config"]["packing_format"]
        weights = {}
        for module in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
            parts = {part: tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales")}
            if "awq" in packing:
                weight = dequantize_gemm(*parts.values(), bits, group)
            else:
                kind = qlinear_torch_zp if "auto_gptq" in packing else qlinear_torch
                n, k = parts["qweight"].shape[1], parts["qweight"].shape[0] * 32 // bits
                layer = kind.QuantLinear(bits, group, k, n, bias=False)
                layer.load_state_dict(parts)
                with torch.no_grad():
                    weight = layer(torch.eye(k, dtype=torch.float16))
            weights[f"{module}.weight"] = weight.T
        return logits_of(model, weights)

    return write


def by_transformers(config: Any, folder: Path) -> tuple[Any, Any]:
    """The plain model, and the one that transformers quantises by `config` and saves to `folder`."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as plain, tempfile.TemporaryDirectory() as written:
        model = plain_checkpoint(Path(plain))
        quantised = AutoModelForCausalLM.from_pretrained(
            plain, dtype=torch.bfloat16, device_map="cpu", quantization_config=config
        )
        quantised.save_pretrained(written)
        keep(Path(written), folder)
    return model, quantised


def bitsandbytes(**options: Any) -> Callable[[Path], np.ndarray]:
    """Dequantised in float32, though the checkpoint's dtype is bfloat16."""

    def write(folder: Path) -> np.ndarray:
        import bitsandbytes
        from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
        from transformers import BitsAndBytesConfig

        model, quantised = by_transformers(BitsAndBytesConfig(**options), folder)
        weights = {}
        for name, module in quantised.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                module.weight.quant_state.dtype = torch.float32
                weights[f"{name}.weight"] = dequantize_4bit(module.weight.data, module.weight.quant_state)
            elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
                weights[f"{name}.weight"] = int8_vectorwise_dequant(module.weight.CB, module.weight.SCB)
        return logits_of(model, weights)

    return write


def mlx(mode: str, bits: int, group_size: int, **overrides: Any) -> Callable[[Path], np.ndarray]:
    """MLX's own model, in float32 with the weights as they are stored; no bits: not quantised."""

    def write(folder: Path) -> np.ndarray:
        import mlx.core as mx
        from mlx_lm.utils import load_model, quantize_model, save_config, save_model

        with tempfile.TemporaryDirectory() as plain:
            plain_checkpoint(Path(plain), **overrides)
            text = json.loads((Path(plain) / "config.json").read_text())
            text["full_attention_interval"] = 2  # all that MLX knows of the layers' types
            outer = {"model_type": text["model_type"].removesuffix("_text"), "text_config": text}
            (Path(plain) / "config.json").write_text(json.dumps({**outer, "tie_word_embeddings": False}))
            model, config = load_model(Path(plain))
            if bits:
                model, config = quantize_model(model, config, group_size, bits, mode)
            save_model(folder, model)
            save_config(config, folder / "config.json")
        model, _ = load_model(folder)
        model.set_dtype(mx.float32)
        return np.array(model(mx.array(IDS)))

    return write


def modelopt(config: str) -> Callable[[Path], np.ndarray]:
    """As its exporter writes it."""

    def write(folder: Path) -> np.ndarray:
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint
        from modelopt.torch.export.quant_utils import from_quantized_weight
        from transformers import AutoModelForCausalLM

        with tempfile.TemporaryDirectory() as plain, tempfile.TemporaryDirectory() as written:
            model = plain_checkpoint(Path(plain))
            quantised = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
            quantised = mtq.quantize(
                quantised, getattr(mtq, config), lambda model: model(torch.from_numpy(IDS))
            )
            export_hf_checkpoint(quantised, export_dir=written)
            keep(Path(written), folder)
        tensors = load_file(folder / "model.safetensors")
        weights = {
            name: from_quantized_weight(tensors[name], tensors[f"{name}_scale"], "fp8", torch.float32)
            for name in tensors
            if f"{name}_scale" in tensors
        }
        return logits_of(model, weights)

    return write


def modelopt_fp4(packer: str, algorithm: str, group: int) -> Callable[[Path], np.ndarray]:
    """Codes and scales by ModelOpt's tensors; names and settings are ours: its exporter needs CUDA."""

    def write(folder: Path) -> np.ndarray:
        from modelopt.torch.quantization import qtensor

        made = getattr(qtensor, packer)
        with tempfile.TemporaryDirectory() as plain:
            model = plain_checkpoint(Path(plain))
            keep(Path(plain), folder)
        tensors, weights = load_file(folder / "model.safetensors"), {}
        chosen = [name for name in tensors if name.endswith("_proj.weight") and len(tensors[name]) % 32 == 0]
        for name in chosen:
            rows = len(tensors[name])
            packed, *scales = made.quantize(tensors[name].float(), group)
            named = dict(zip(("scale", "double_scale"), scales, strict=False))
            weights[name] = packed.dequantize(dtype=torch.float32, block_sizes={-1: group}, **named)
            tensors[name] = packed._quantized_data.contiguous()
            for suffix, scale in zip(("scale", "scale_2"), scales, strict=False):
                tensors[f"{name}_{suffix}"] = scale.reshape(rows, -1) if scale.numel() > 1 else scale
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        told = {"quant_algo": algorithm, "group_size": group, "exclude_modules": ["lm_head"]}
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": told}))
        return logits_of(model, weights)

    return write


def torchao(config: str, *settings: Any) -> Callable[[Path], np.ndarray]:
    def write(folder: Path) -> np.ndarray:
        from torchao import quantization
        from torchao.quantization.quant_primitives import dequantize_affine
        from transformers import TorchAoConfig

        model, quantised = by_transformers(TorchAoConfig(getattr(quantization, config)(*settings)), folder)
        weights = {}
        for name, module in quantised.named_modules():
            weight = getattr(module, "weight", None)
            if hasattr(weight, "target_dtype"):  # its dequantize() knows bfloat16 only
                parts = weight.block_size, weight.scale, weight.zero_point, torch.int8
                weights[f"{name}.weight"] = dequantize_affine(
                    weight.qdata, *parts, output_dtype=torch.float32
                )
            elif hasattr(weight, "qdata"):
                weights[f"{name}.weight"] = weight.dequantize(torch.float32)
        return logits_of(model, weights)

    return write


FORMS: dict[str, tuple[str, Callable[[Path], np.ndarray]]] = {
    "auto-round-gptq": ("auto-round", auto_round("auto_round:auto_gptq", group_size=32, sym=True)),
    "auto-round-own": ("auto-round", auto_round("auto_round:gptqmodel", group_size=32, sym=False)),
    "auto-round-awq": ("auto-round", auto_round("auto_round:auto_awq", group_size=64, sym=False)),
    "bitsandbytes-nf4": ("bitsandbytes", bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "bitsandbytes-nf4-nested": (
        "bitsandbytes",
        bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    ),
    "bitsandbytes-int8": ("bitsandbytes", bitsandbytes(load_in_8bit=True)),
    "mlx": ("mlx-lm", mlx("affine", 0, 0)),
    "mlx-4": ("mlx-lm", mlx("affine", 4, 64)),
    "mlx-5": ("mlx-lm", mlx("affine", 5, 32)),
    "mlx-8-experts": ("mlx-lm", mlx("affine", 8, 32, num_experts=4)),
    "mlx-mxfp4": ("mlx-lm", mlx("mxfp4", 4, 32)),
    "mlx-mxfp8": ("mlx-lm", mlx("mxfp8", 8, 32)),
    "mlx-nvfp4": ("mlx-lm", mlx("nvfp4", 4, 16)),
    "modelopt-fp8": ("nvidia-modelopt", modelopt("FP8_DEFAULT_CFG")),
    "modelopt-mxfp4": ("nvidia-modelopt", modelopt_fp4("MXFP4QTensor", "MXFP4", 32)),
    "modelopt-nvfp4": ("nvidia-modelopt", modelopt_fp4("NVFP4QTensor", "NVFP4", 16)),
    "torchao-fp8": ("torchao", torchao("Float8WeightOnlyConfig")),
    "torchao-int8": ("torchao", torchao("Int8WeightOnlyConfig")),
    "torchao-int4": ("torchao", torchao("IntxWeightOnlyConfig", torch.int4)),
}


def keep(written: Path, folder: Path) -> None:
    """The checkpoint itself, without tokenizer and generation settings."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in written.glob("*.json"):
        if path.name in ("config.json", "hf_quant_config.json"):
            shutil.copy(path, folder / path.name)
    for path in written.glob("*.safetensors"):
        shutil.copy(path, folder / path.name)


def main(names: list[str]) -> None:
    for name in names or FORMS:
        library, write = FORMS[name]
        folder = RECORDED / name
        shutil.rmtree(folder, ignore_errors=True)
        logits = write(folder)
        np.savez_compressed(
            folder / "logits.npz", ids=IDS, logits=logits, library=f"{library} {version(library)}"
        )
        print(name, sum(path.stat().st_size for path in folder.iterdir()))


if __name__ == "__main__":
    main(sys.argv[1:])
