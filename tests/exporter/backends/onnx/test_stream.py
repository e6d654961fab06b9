"""Exports of one checkpoint in step: each tensor is read once, and no artifact is another one for it."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from qwen_common.errors import UserError
from qwen_export.backends.onnx.resume import Journal
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.checkpoint.tensors.plain import PlainTensor
from qwen_export.export import Export, export, export_together
from qwen_profiles.schema import Profile, load_profile

from benchmarks.geometry import write_checkpoint
from benchmarks.support.artifacts import Quiet, directml_profile
from benchmarks.support.checkpoints import TINY, TINY_MOE, copy_tokenizer
from tests.support.files import hashes
from tests.support.random_checkpoints import load_tensors, save_shards, write_random_checkpoint

# Two lowerings, three precisions, float32 and float16.
PROFILES = (
    load_profile("cpu"),
    directml_profile(),
    load_profile("cpu", ["weights.body=int8", "weights.attention=float", "mtp=false"]),
)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Rows that were read of each stored tensor."""
    rows: Counter[str] = Counter()
    columns = PlainTensor.columns

    def counted(
        self: PlainTensor, first: int, last: int, start: int = 0, stop: int | None = None
    ) -> np.ndarray:
        found = columns(self, first, last, start, stop)
        rows[self.name] += len(found)
        return found

    monkeypatch.setattr(PlainTensor, "columns", counted)
    yield rows


def together(checkpoint: Checkpoint, folder: Path, profiles: tuple[Profile, ...] = PROFILES) -> list[object]:
    exports = [Export(checkpoint, profile, folder / str(n)) for n, profile in enumerate(profiles)]
    return [made for _, made in sorted(export_together(exports, Quiet()), key=lambda found: found[0])]


@pytest.mark.parametrize("source", [TINY, TINY_MOE], ids=["dense", "mixture"])
def test_three_profiles_read_each_tensor_once(source: Path, tmp_path: Path, read: Counter[str]) -> None:
    checkpoint = Checkpoint.open(str(source))
    read.clear()  # to see whether embedding and lm_head are the same
    made = together(checkpoint, tmp_path)
    assert [type(one) for one in made] == [dict] * 3
    assert read == {tensor.name: tensor.shape[0] for tensor in checkpoint.tensors.values()}
    for number, profile in enumerate(PROFILES):
        export(checkpoint, profile, tmp_path / "alone" / str(number), Quiet())
        assert hashes(tmp_path / str(number)) == hashes(tmp_path / "alone" / str(number))


def test_one_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "checkpoint")
    tensors = load_tensors(folder)
    tensors["model.layers.1.input_layernorm.weight"][3] = 1e6  # more than float16 holds
    save_shards(folder, tensors, 1)
    checkpoint = Checkpoint.open(str(folder))
    first, fault, third = together(checkpoint, tmp_path)
    assert isinstance(fault, UserError) and "more than float16 holds" in str(fault)
    assert isinstance(first, dict) and isinstance(third, dict)
    assert not (tmp_path / "1").exists()
    export(checkpoint, PROFILES[0], tmp_path / "alone", Quiet())
    assert hashes(tmp_path / "0") == hashes(tmp_path / "alone")


def test_what_one_has_already_is_read_for_the_others_alone(
    tmp_path: Path, read: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two was stopped in the middle of its weights."""
    checkpoint = Checkpoint.open(str(TINY))
    with monkeypatch.context() as patch:
        patch.setattr("qwen_export.backends.onnx.stream._SYNC_BYTES", 1)
        add = Journal.add

        def stopped(self: Journal, names: list[str]) -> None:
            if len(self.done) > 20:
                raise KeyboardInterrupt
            add(self, names)

        patch.setattr(Journal, "add", stopped)
        with pytest.raises(KeyboardInterrupt):
            export(checkpoint, PROFILES[0], tmp_path / "0", Quiet())
    read.clear()
    progress = Quiet()
    exports = [Export(checkpoint, PROFILES[0], tmp_path / str(n)) for n in range(2)]
    assert all(isinstance(made, dict) for _, made in export_together(exports, progress))
    assert any("going on after 21 weights" in note for note in progress.notes)
    assert read == {tensor.name: tensor.shape[0] for tensor in checkpoint.tensors.values()}
    assert hashes(tmp_path / "0") == hashes(tmp_path / "1")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_is_that_of_one(tmp_path: Path) -> None:
    """Five exports in step take at most a quarter more than one: graphs, and what waits to be written."""
    geometry = {
        "vocab_size": 100_000,
        "hidden_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 3072,
        "linear_num_value_heads": 16,
        "tie_word_embeddings": True,
    }
    checkpoint = write_checkpoint(tmp_path / "checkpoint", geometry)
    copy_tokenizer(TINY, checkpoint)
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from benchmarks.support.artifacts import Quiet\n"
        "from qwen_export.checkpoint.checkpoint import Checkpoint\n"
        "from qwen_export.export import Export, export_together\n"
        "from qwen_profiles.schema import load_profile\n"
        "checkpoint, output, *names = sys.argv[1:]\n"
        "opened = Checkpoint.open(checkpoint)\n"
        "exports = [Export(opened, load_profile(name), Path(output) / name) for name in names]\n"
        "for _, made in export_together(exports, Quiet()): assert isinstance(made, dict), made\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    peaks = []
    names = ("cpu", "strix-halo", "cpu-avx2", "webgpu", "laptop-16gb")
    for count in (1, 5):
        arguments = [sys.executable, "-c", code, str(checkpoint), str(tmp_path / str(count)), *names[:count]]
        output = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
        peaks.append(int(output.split("VmHWM:")[1].split()[0]))
    assert peaks[1] < 1.25 * peaks[0], peaks
