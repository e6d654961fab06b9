"""Damaged files, and files of other models: one line before the work begins."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from qwen_common.errors import UserError
from qwen_export.export import export
from qwen_export.gguf.file import read_gguf
from qwen_export.opening import open_checkpoint
from qwen_profiles.schema import load_profile

from benchmarks.support.artifacts import Quiet
from tests.support.gguf_checkpoints import write_gguf
from tests.support.random_checkpoints import write_random_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint")


@pytest.fixture(scope="module")
def octets(source: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(source, tmp_path_factory.mktemp("whole") / "model.gguf").read_bytes()


def set_number(octets: bytes, at: int, form: str, value: int) -> bytes:
    return octets[:at] + struct.pack(form, value) + octets[at + struct.calcsize(form) :]


def after(octets: bytes, name: bytes) -> int:
    return octets.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)


DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda octets: b"", "is not a GGUF file"),
    "another format": (lambda octets: b"PK\3\4" + octets[4:], "is not a GGUF file"),
    "cut in the header": (lambda octets: octets[:3000], "is truncated or damaged"),
    "cut in the data": (lambda octets: octets[:-100], "goes past the end of the file"),
    "cut after the magic": (lambda octets: octets[:6], "header goes past the end"),
    "version 1": (lambda octets: set_number(octets, 4, "<I", 1), "is of version 1, which is not supported"),
    "version 9": (lambda octets: set_number(octets, 4, "<I", 9), "is of version 9, which is not supported"),
    "big-endian": (lambda octets: set_number(octets, 4, ">I", 3), "is big-endian, which is not supported"),
    "tensors without end": (lambda octets: set_number(octets, 8, "<Q", 1 << 60), "header goes past the end"),
    "keys without end": (lambda octets: set_number(octets, 16, "<Q", 1 << 60), "header goes past the end"),
    "a type of values": (
        lambda octets: set_number(octets, after(octets, b"qwen35.block_count"), "<I", 77),
        "has a value of type 77",
    ),
    "a type of tensors": (
        lambda octets: set_number(octets, after(octets, b"output_norm.weight") + 4 + 8, "<I", 999),
        "output_norm.weight is of type 999, which the installed package gguf does not know",
    ),
    "an offset": (
        lambda octets: set_number(octets, after(octets, b"output_norm.weight") + 4 + 8 + 4, "<Q", 1 << 40),
        "output_norm.weight goes past the end of the file",
    ),
    "a crooked offset": (
        lambda octets: set_number(octets, after(octets, b"output_norm.weight") + 4 + 8 + 4, "<Q", 3),
        "does not lie at a multiple of 32 bytes",
    ),
    "axes": (
        lambda octets: set_number(octets, after(octets, b"output_norm.weight"), "<I", 9),
        "output_norm.weight has 9 axes",
    ),
    "a shape": (
        lambda octets: set_number(octets, after(octets, b"output_norm.weight") + 4, "<Q", 32),
        "model.norm.weight has shape",
    ),
    "a text": (lambda octets: octets.replace(b"attn_gate", b"\xff\xfettn_gat"), "is not UTF-8"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_files_are_refused(what: str, octets: bytes, tmp_path: Path) -> None:
    damage, message = DAMAGED[what]
    path = tmp_path / "model.gguf"
    path.write_bytes(damage(octets))
    with pytest.raises(UserError, match=message) as caught:
        export(open_checkpoint(str(path)), load_profile("cpu"), tmp_path / "out", Quiet())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_any_changed_byte_of_the_header_is_read_or_refused(octets: bytes, tmp_path: Path) -> None:
    path, rng = tmp_path / "model.gguf", np.random.default_rng(0)
    end = after(octets, b"blk.3.ffn_up.weight")
    keys = [after(octets, name) for name in (b"qwen35.block_count", b"qwen35.rope.dimension_count")]
    for at in [*rng.integers(4, end, 60), *range(keys[0], keys[0] + 8), *range(keys[1], keys[1] + 8)]:
        changed = bytearray(octets)
        changed[at] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        try:
            open_checkpoint(str(path))
        except UserError as error:
            assert "\n" not in str(error)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"general.architecture": "llama"}, "is llama, which is not Qwen3.5"),
    "no layers": ({"qwen35.block_count": None}, "has no qwen35.block_count"),
    "layers in words": ({"qwen35.block_count": "four"}, "block_count is four, which is no number above 0"),
    "no heads": ({"qwen35.attention.head_count": 0}, "head_count is 0, which is no number above 0"),
    "odd heads": ({"qwen35.attention.head_count_kv": 3}, "num_key_value_heads must divide"),
    "too many layers": ({"qwen35.block_count": 1 << 30}, "num_hidden_layers"),
    "heads of each layer": ({"qwen35.attention.head_count_kv": [0, 1, 2, 3]}, "num_key_value_heads"),
    "other sections": ({"qwen35.rope.dimension_sections": [2, 1, 1, 5]}, "dimension_sections"),
    "linear scaling": ({"qwen35.rope.scaling.type": "linear"}, "rope.scaling.type linear is not supported"),
    "no tokenizer": ({"tokenizer.ggml.model": "none"}, "has no tokenizer"),
    "SentencePiece": ({"tokenizer.ggml.model": "llama"}, "its tokenizer is llama, qwen35, which is not"),
    "another splitting": ({"tokenizer.ggml.pre": "gpt-4o"}, "its tokenizer is gpt2, gpt-4o"),
    "a first token": ({"tokenizer.ggml.add_bos_token": True}, "add_bos_token is true"),
    "an end out of range": ({"tokenizer.ggml.eos_token_id": 99999}, "eos_token_id is 99999"),
    "no merges": ({"tokenizer.ggml.merges": None}, "merges is no list of texts"),
    "strange merges": (
        {"tokenizer.ggml.merges": ["xx yy"]},
        "its merge of 'xx' and 'yy' is not of its tokens",
    ),
    "types missing": ({"tokenizer.ggml.token_type": [1, 1]}, "token_type is no list as long"),
    "a template": ({"tokenizer.chat_template": "{% if %}"}, "chat template is not valid"),
    "another size": ({"qwen35.embedding_length": 96}, "has shape"),
    "other heads": ({"qwen35.ssm.group_count": 4}, "ssm_conv1d|attn_qkv"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_the_metadata_say_is_checked(what: str, source: Path, tmp_path: Path) -> None:
    metadata, message = WRONG[what]
    path = write_gguf(source, tmp_path / "model.gguf", metadata=metadata)
    with pytest.raises(UserError, match=message) as caught:
        export(open_checkpoint(str(path)), load_profile("cpu"), tmp_path / "out", Quiet())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_missing_and_strange_tensors(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    octets = write_gguf(source, path).read_bytes()
    path.write_bytes(octets.replace(b"blk.3.attn_q.weight", b"blk.3.attn_x.weight"))
    found = open_checkpoint(str(path))
    assert "not read, because the model has no such tensors: blk.3.attn_x.weight" in found.notes
    with pytest.raises(UserError, match=r"no tensor model\.layers\.3\.self_attn\.q_proj"):
        export(found, load_profile("cpu"), tmp_path / "out", Quiet())
    path.write_bytes(octets.replace(b"blk.3.attn_k.weight", b"blk.3.attn_qq.scale"))
    with pytest.raises(UserError, match="is a scale of NVFP4's, which is not supported yet"):
        open_checkpoint(str(path))
    with pytest.raises(UserError, match="no file"):
        open_checkpoint(str(tmp_path / "other.gguf"))
    with pytest.raises(UserError, match="--revision is for hub ids"):
        open_checkpoint(str(path), "main")


def test_metadata_is_read_as_the_library_reads_it(octets: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(octets)
    ours, theirs = read_gguf(path), GGUFReader(path)
    assert ours.metadata == {
        key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")
    }
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert (found.kind, found.offset, found.nbytes) == (
            tensor.tensor_type,
            tensor.data_offset,
            tensor.n_bytes,
        )
        assert found.shape == tuple(reversed(tensor.shape.tolist()))
