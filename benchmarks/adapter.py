"""Time and peak memory of merging a LoRA adapter while exporting, beside PEFT's merge.

    python -m benchmarks.adapter [--size 0.8B] [--rank 16] [--dora] [--json adapter.json]

A random checkpoint of a real geometry in bf16, and an adapter of every projection. In turns, each in a
process of its own: the export alone, the export with the adapter, and PEFT's merge_and_unload with its save,
whose folder would still have to be exported. Memory is the process's own maximum (VmHWM). Needs the extra
`test`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from qwen_export.checkpoint.config import load_config
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from benchmarks.export import watched
from benchmarks.geometry import GEOMETRIES, write_checkpoint
from benchmarks.support.checkpoints import TINY, copy_tokenizer

_PEFT = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
"""


def write_adapter(folder: Path, checkpoint: Path, rank: int, dora: bool) -> Path:
    """Random factors in bf16 for every projection of the model's layers."""
    generator = torch.Generator().manual_seed(0)
    tensors, modules = {}, set()
    for name, spec in load_config(checkpoint).tensors().items():
        module = name.removesuffix(".weight")
        if module == name or len(spec.shape) != 2 or ".layers." not in name:
            continue
        rows, columns = spec.shape
        key = f"base_model.model.{module}"
        for kind, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            factor = torch.randn(shape, generator=generator) * 0.01
            tensors[f"{key}.lora_{kind}.weight"] = factor.to(torch.bfloat16)
        if dora:
            tensors[f"{key}.lora_magnitude_vector"] = torch.ones(rows)
        modules.add(module.rpartition(".")[2])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": checkpoint.name,
        "r": rank,
        "lora_alpha": 2 * rank,
        "use_dora": dora,
        "target_modules": sorted(modules),
    }
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=GEOMETRIES, default="0.8B")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = write_checkpoint(folder / "checkpoint", GEOMETRIES[arguments.size])
        copy_tokenizer(TINY, base)
        adapter = write_adapter(folder / "adapter", base, arguments.rank, arguments.dora)
        export = [sys.executable, "-c", "from qwen_export.cli import main; main()", "--profile", "cpu"]
        export += [str(base), "--no-verify", "--no-progress", "-o"]
        commands = {
            "export": [*export, str(folder / "plain")],
            "export with --adapter": [*export, str(folder / "merged"), "--adapter", str(adapter)],
            "PEFT's merge, saved": [sys.executable, "-c", _PEFT, *map(str, (base, adapter, folder / "peft"))],
        }
        for what, command in commands.items():
            results[what] = watched(command)

    first = next(iter(results.values()))[0]
    table = Table(f"{arguments.size}, rank {arguments.rank}", "time, export = 1", "peak GiB")
    for what, (seconds, peak) in results.items():
        table.add_row(what, f"{seconds / first:.2f}", f"{peak / 2**30:.2f}")
    Console(width=110).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
