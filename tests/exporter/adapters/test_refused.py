"""Adapters that are damaged, for another model, or of a kind that is not merged: a line each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from qwen_common.errors import UserError
from qwen_export.adapters.merge import with_adapters
from qwen_export.checkpoint import Checkpoint
from safetensors.torch import load_file, save_file

from tests.support.adapters import train
from tests.support.random_checkpoints import random_model, write_random_checkpoint

Q_PROJ = "base_model.model.model.layers.3.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(str(write_random_checkpoint(tmp_path_factory.mktemp("made") / "base")))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "adapter"
    train(random_model(), folder, target_modules=["q_proj", "up_proj"])
    return folder


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "adapter"))


def edit(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change(folder: Path, how: Callable[[Tensors], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    how(tensors)
    save_file(tensors, path)


def refusal(base: Checkpoint, *given: str) -> str:
    with pytest.raises(UserError) as caught:
        with_adapters(base, given)
    message = str(caught.value)
    assert "\n" not in message
    return message


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "IA3": ({"peft_type": "IA3"}, "of the type IA3, and only LoRA is merged here: merge it with PEFT"),
    "LoHa": ({"peft_type": "LOHA"}, "of the type LOHA, and only LoRA is merged here: merge it with PEFT"),
    "prompt": (
        {"peft_type": "PROMPT_TUNING"},
        "type PROMPT_TUNING, and only LoRA is merged here: no weights",
    ),
    "no type": ({"peft_type": None}, "of the type None"),
    "a type on two lines": ({"peft_type": ["LORA\n"]}, "of the type ['LORA"),
    "activated LoRA": ({"alora_invocation_tokens": [1]}, "Activated LoRA, which acts on some tokens only"),
    "QA-LoRA": ({"use_qalora": True}, "use_qalora: the adapter is QA-LoRA"),
    "replicated layers": ({"layer_replication": [[0, 2]]}, "of a model with replicated layers"),
    "PiSSA": (
        {"init_lora_weights": "pissa_niter_4"},
        "pissa_niter_4, which changes the base before training",
    ),
    "rank 0": ({"r": 0}, "adapter_config.json: r: Input should be greater than 0, not 0"),
    "rank as a word": ({"r": "8"}, "adapter_config.json: r: Input should be a valid integer"),
    "another rank": ({"r": 4}, "has shape (8, 64), and adapter_config.json says rank 4"),
    "another rank by a pattern": ({"rank_pattern": {"q_proj": 16}}, "says rank 16: are both of one adapter?"),
    "no expression": ({"alpha_pattern": {"(": 1}}, "'(' is no regular expression"),
    "alpha that is none": (
        {"lora_alpha": "much"},
        "adapter_config.json: lora_alpha: Input should be a valid",
    ),
    "alpha in quotes": ({"lora_alpha": "16"}, "lora_alpha: Input should be a valid number, not '16'"),
    "alpha that is true": ({"lora_alpha": True}, "lora_alpha: Input should be a valid number, not True"),
    "layers left out": (
        {"target_modules": ["q_proj"]},
        "up_proj.lora_A.weight, which adapter_config.json leaves out",
    ),
    "magnitudes that miss": ({"use_dora": True}, "has no lora_magnitude_vector for"),
    "saved modules that miss": ({"modules_to_save": ["lm_head"]}, "modules_to_save names lm_head, which"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configuration(case: str, base: Checkpoint, adapter: Path) -> None:
    values, message = CONFIGS[case]
    edit(adapter, **values)
    assert message in refusal(base, str(adapter))


TENSORS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "half a pair": (
        lambda tensors: tensors.pop(f"{Q_PROJ}.lora_B.weight"),
        "has no lora_B for model.layers.3.self_attn.q_proj: is it complete?",
    ),
    "of a larger model": (
        lambda tensors: tensors.update({f"{Q_PROJ}.lora_A.weight": torch.ones(8, 96)}),
        "has shape (8, 96), and model.layers.3.self_attn.q_proj.weight of this model asks for (8, 64)",
    ),
    "of more layers": (
        lambda tensors: tensors.update({Q_PROJ.replace(".3.", ".7.") + ".lora_A.weight": torch.ones(8, 64)}),
        "model.layers.7.self_attn.q_proj.lora_A.weight fits no module of this model",
    ),
    "a tower that is not there": (
        lambda tensors: tensors.update(
            {"base_model.model.model.visual.blocks.0.attn.qkv.lora_A.weight": torch.ones(8, 48)}
        ),
        "fits no module of this model: is the adapter for another one, or CHECKPOINT without a part",
    ),
    "more tokens": (
        lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(520, 64)}),
        "lm_head.weight has shape (520, 64), and lm_head.weight of this model asks for (512, 64)",
    ),
    "one name in two forms": (
        lambda tensors: tensors.update({f"{Q_PROJ}.lora_A.default.weight": torch.ones(8, 64)}),
        "are the same tensor: remove the wrong one",
    ),
    "integers": (
        lambda tensors: tensors.update({f"{Q_PROJ}.lora_A.weight": torch.ones(8, 64, dtype=torch.int64)}),
        "is int64 (8, 64), and an adapter's are bf16, fp16 or fp32",
    ),
    "magnitudes that nobody asked for": (
        lambda tensors: tensors.update({f"{Q_PROJ}.lora_magnitude_vector": torch.ones(256)}),
        "has a lora_magnitude_vector for",
    ),
    "names without a module": (
        lambda tensors: tensors.update({"base_model.model..lora_A.weight": torch.ones(8, 64)}),
        "base_model.model..lora_A.weight fits no module",
    ),
    "a wrapper's name alone": (
        lambda tensors: tensors.update({"module.lora_A.weight": torch.ones(8, 64)}),
        "module.lora_A.weight fits no module",
    ),
    "tokens and factors": (
        lambda tensors: tensors.update({f"{Q_PROJ}.token_adapter.trainable_tokens_delta": torch.ones(1, 64)}),
        "and model.layers.3.self_attn.q_proj.weight of this model asks for (0, 64)",
    ),
    "a kind of tomorrow": (
        lambda tensors: tensors.update({f"{Q_PROJ}.lora_C.weight": torch.ones(8, 8)}),
        "q_proj.lora_C.weight fits no module",
    ),
    "empty": (lambda tensors: tensors.clear(), "has no tensors"),
    "an empty tensor": (
        lambda tensors: tensors.update({f"{Q_PROJ}.lora_A.weight": torch.ones(0)}),
        "is float32 (0,), and an adapter's are",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(case: str, base: Checkpoint, adapter: Path) -> None:
    how, message = TENSORS[case]
    change(adapter, how)
    assert message in refusal(base, str(adapter))


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no configuration": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        "has no adapter_config.json",
    ),
    "no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not valid JSON"),
    "a list": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "is not a JSON object"),
    "no tensors": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "has no adapter_model.safetensors: is the adapter complete?",
    ),
    "pickled": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        "holds pickled weights, which are never loaded",
    ),
    "truncated": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(
            (folder / "adapter_model.safetensors").read_bytes()[:-10]
        ),
        "adapter_model.safetensors is truncated or damaged",
    ),
    "no file at all": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""),
        "adapter_model.safetensors is truncated or damaged",
    ),
    "a link out": (
        lambda folder: [
            shutil.move(folder / "adapter_model.safetensors", folder.parent / "elsewhere"),
            (folder / "adapter_model.safetensors").symlink_to(folder.parent / "elsewhere"),
        ],
        "adapter_model.safetensors is a link out of",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files(case: str, base: Checkpoint, adapter: Path) -> None:
    how, message = FILES[case]
    how(adapter)
    assert message in refusal(base, str(adapter))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere", "--adapter nowhere: no such folder"),
        ("./adapters/lora", "--adapter ./adapters/lora: no such folder"),
        ("lora=much", "--adapter lora=much: 'much' is no weight: write FOLDER, or FOLDER=0.5"),
        ("lora=nan", "'nan' is no weight"),
        ("lora=", "'' is no weight"),
    ],
)
def test_what_is_given(given: str, message: str, base: Checkpoint) -> None:
    assert message in refusal(base, given)


def test_values_that_are_no_numbers(base: Checkpoint, adapter: Path) -> None:
    change(adapter, lambda tensors: tensors[f"{Q_PROJ}.lora_A.weight"].fill_(float("nan")))
    merged = with_adapters(base, [str(adapter)])
    with pytest.raises(UserError, match=r"in adapter_model.safetensors holds NaN or Inf"):
        merged.read("model.layers.3.self_attn.q_proj.weight", 0, 8)


def test_what_cannot_be_weighted_or_put_together(base: Checkpoint, tmp_path: Path) -> None:
    whole, other = tmp_path / "whole", tmp_path / "other"
    train(random_model(), whole, target_modules=["q_proj"], modules_to_save=["lm_head"])
    train(random_model(), other, target_modules=["q_proj", "lm_head"])
    assert "lm_head.weight in full, which cannot have the weight 0.5" in refusal(base, f"{whole}=0.5")
    for pair in ((whole, other), (other, whole), (whole, whole)):
        message = refusal(base, *map(str, pair))
        assert "both change lm_head.weight, and one has it in full" in message
    train(random_model(), tmp_path / "tokens", target_modules=["q_proj"], trainable_token_indices=[3])
    assert "both change model.embed_tokens.weight" in refusal(base, *[str(tmp_path / "tokens")] * 2)
    edit(tmp_path / "tokens", trainable_token_indices=[512])
    assert "go beyond the 512 tokens of the model" in refusal(base, str(tmp_path / "tokens"))


def test_every_type_of_peft_is_known_or_refused(base: Checkpoint, adapter: Path) -> None:
    for kind in peft.PeftType:
        edit(adapter, peft_type=kind.value)
        if kind != peft.PeftType.LORA:
            assert f"of the type {kind.value}, and only LoRA" in refusal(base, str(adapter))


def test_notes(base: Checkpoint, adapter: Path) -> None:
    edit(
        adapter, base_model_name_or_path="somebody/Qwen3.5-4B", target_modules=["q_proj", "up_proj", "k_proj"]
    )
    (adapter / "chat_template.jinja").write_text("another")
    shutil.copy(base.root / "tokenizer.json", adapter)
    notes = with_adapters(base, [str(adapter)]).notes
    assert len(notes) == 3
    assert "says that it is for somebody/Qwen3.5-4B, and is merged into" in notes[0]
    assert (
        "no tensors for modules that its target_modules name: model.layers.3.self_attn.k_proj: they"
        in notes[1]
    )
    assert "has a chat_template.jinja of its own" in notes[2]
    edit(
        adapter, base_model_name_or_path=f"/elsewhere/{base.root.name}/", target_modules=["q_proj", "up_proj"]
    )
    (adapter / "chat_template.jinja").unlink()
    assert not with_adapters(base, [str(adapter)]).notes
