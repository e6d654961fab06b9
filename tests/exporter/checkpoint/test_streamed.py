"""Checkpoints from a hub, shard by shard: the hub's own client, and a server that speaks its API."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from click.testing import CliRunner, Result
from qwen_common.errors import UserError
from qwen_export.adapters.adapter import Adapter
from qwen_export.backends.onnx import artifact as onnx_artifact
from qwen_export.backends.onnx import stream as onnx_stream
from qwen_export.checkpoint import Checkpoint, streamed
from qwen_export.cli.program import main
from qwen_export.export import export
from qwen_export.verify.verification import verify
from qwen_profiles.schema import load_profile
from safetensors.torch import save_file

from benchmarks.support.artifacts import Quiet
from tests.support.adapters import train
from tests.support.files import hashes
from tests.support.hub_server import COMMIT, HubServer
from tests.support.random_checkpoints import load_tensors, random_model, write_random_checkpoint

REPO = "someone/tiny"
LAYERS = 4
GEOMETRY: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 1536,
    "num_hidden_layers": LAYERS,
    "tie_word_embeddings": False,
}


def write_shards(folder: Path, by_name: bool = False) -> None:
    """A shard for each layer, the first with the embedding, the last with norm and lm_head; or, `by_name`,
    names in alphabetical order, dealt out so that layers lie in two or three of them."""
    tensors = load_tensors(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for number, name in enumerate(sorted(tensors)):
        layer = re.search(r"layers\.(\d+)\.", name)
        place = int(layer[1]) + 1 if layer else 0 if "embed" in name else LAYERS + 1
        if by_name:
            place = number * (LAYERS + 2) // len(tensors)
        shards.setdefault(f"model-{place + 1:05}-of-{LAYERS + 2:05}.safetensors", {})[name] = tensors[name]
    for file, part in shards.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(made, dtype=torch.bfloat16, **GEOMETRY)
    write_shards(made)
    (made / "training_state.pt").write_bytes(b"x" * 1000)
    return made


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the export of the folder itself writes."""
    output = tmp_path_factory.mktemp("local") / "out"
    export(Checkpoint.open(str(folder)), load_profile("cpu"), output, Quiet())
    return of_weights(output)


def of_weights(artifact: Path) -> dict[str, str]:
    """All but manifest and model card, which have the checkpoint's name."""
    return {
        name: found
        for name, found in hashes(artifact).items()
        if not name.endswith(("README.md", "manifest.json"))
    }


def shard_bytes(folder: Path) -> list[int]:
    return [path.stat().st_size for path in folder.glob("*.safetensors")]


class Hub(NamedTuple):
    server: HubServer
    cache: Path

    def cached(self) -> list[str]:
        """Shards that are in the hub's cache."""
        return sorted(path.name for path in self.cache.rglob("*.safetensors") if "snapshots" in path.parts)

    def left_over(self) -> list[str]:
        """What streaming left there."""
        return [str(path) for path in self.cache.rglob("*") if "qwen-export" in path.parts]


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    cache = tmp_path / "cache"
    with HubServer(folder, REPO).serving() as server:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        # Settled every few weights, and no room kept for files that are larger than this checkpoint.
        monkeypatch.setattr(onnx_stream, "_SYNC_BYTES", 64 * 1024)
        monkeypatch.setattr(onnx_artifact, "_SPARE_BYTES", 0)
        monkeypatch.setattr(streamed, "_SPARE_BYTES", 0)
        yield Hub(server, cache)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["export", "--profile", "cpu", "--no-progress", *arguments])


class Disk:
    """Of a size that a test gives: what the hub's cache and the output take of it, and the most of that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, size: int, *folders: Path) -> None:
        self.size, self.folders, self.most = size, folders, 0
        for module in (streamed, onnx_artifact):
            monkeypatch.setattr(module.shutil, "disk_usage", self.usage)

    def used(self) -> int:
        found = 0
        for folder in self.folders:
            for path in folder.rglob("*"):
                try:
                    status = path.lstat()
                except FileNotFoundError:  # by now
                    continue
                found += 512 * status.st_blocks
        self.most = max(self.most, found)
        return found

    def usage(self, path: object) -> Any:
        return shutil._ntuple_diskusage(self.size, self.used(), self.size - self.used())  # type: ignore[attr-defined]


def test_shards_are_fetched_once_and_deleted(
    hub: Hub, folder: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk never holds more than one shard, the next one, and the artifact."""
    disk = Disk(monkeypatch, 10**12, hub.cache, tmp_path / ".out.partial", tmp_path / "out")
    hub.server.watch = lambda: disk.used() and None
    result = invoke(f"{REPO}@v1", "--no-verify", "-o", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert of_weights(tmp_path / "out") == expected
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["source"] == {"checkpoint": REPO, "revision": COMMIT}
    assert hub.cached() == [] and hub.left_over() == []
    assert "training_state.pt" not in hub.server.fetched
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    headers = 128 * 1024
    assert all(size <= hub.server.fetched[name] <= size + headers for name, size in sizes.items())
    artifact = sum(512 * path.stat().st_blocks for path in (tmp_path / "out").iterdir())
    text = sum(path.stat().st_size for path in folder.iterdir() if path.suffix != ".safetensors")
    assert disk.most < artifact + 3 * max(sizes.values()) + 2 * text
    assert disk.most < sum(sizes.values())


@pytest.mark.parametrize("room", [2.5, pytest.param(100, marks=pytest.mark.slow)])
def test_verification_fetches_again_what_the_disk_could_not_keep(
    room: float,
    hub: Hub,
    folder: Path,
    expected: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`room` is that for shards, in sizes of the largest one: there are 6."""
    sizes, output = shard_bytes(folder), tmp_path / "out"
    artifact = 5_500_000
    folders = hub.cache, tmp_path / ".out.partial", output
    disk = Disk(monkeypatch, artifact + int(room * max(sizes)), *folders)
    hub.server.watch = lambda: disk.used() and None
    checkpoint, progress = Checkpoint.open(f"{REPO}@main", streaming=True), Quiet()
    assert checkpoint.streamed
    checkpoint.streamed.needed_again = True
    export(checkpoint, load_profile("cpu"), output, progress)
    assert of_weights(output) == expected
    report = verify(output, checkpoint, progress, tokens=64)
    checkpoint.streamed.finish()
    assert report["weights"]["kl_divergence"] > 0
    assert disk.most <= disk.size
    assert hub.cached() == [] and hub.left_over() == []
    fetched = sum(size for name, size in hub.server.fetched.items() if name.endswith(".safetensors"))
    headers = 128 * 1024 * len(sizes)
    assert (fetched <= headers + sum(sizes)) == (room > len(sizes))
    assert any("are fetched for it" in note for note in progress.notes) == (room < len(sizes))


@pytest.mark.slow
def test_verify_streams_too(hub: Hub, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    export(Checkpoint.open(str(folder)), load_profile("cpu"), output, Quiet())
    arguments = ["verify", str(output), "--against", f"{REPO}@{COMMIT}", "--tokens", "64", "--no-progress"]
    result = CliRunner().invoke(main, arguments)
    assert (output / "report.json").is_file(), result.output
    assert sum(hub.server.fetched.values()) > sum(shard_bytes(folder))
    assert hub.cached() == [] and hub.left_over() == []


def test_shards_in_the_order_of_names(hub: Hub, folder: Path, tmp_path: Path) -> None:
    """Layers that lie in two shards, in another order than the model: still fetched once."""
    other = Path(shutil.copytree(folder, tmp_path / "by name"))
    write_shards(other, by_name=True)
    hub.server.folder = other
    result = invoke(REPO, "--no-verify", "-o", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    for path in other.glob("*.safetensors"):
        assert hub.server.fetched[path.name] <= path.stat().st_size + 128 * 1024


def test_too_small_a_disk_is_refused_before_a_shard_is_fetched(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Disk(monkeypatch, 4_000_000, hub.cache)
    largest = max(shard_bytes(folder))
    result = invoke(REPO, "--no-verify", "-o", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert re.search("GB for shards at a time do not fit", result.output), result.output
    assert (
        max(hub.server.fetched[name] for name in hub.server.fetched if "safetensors" in name)
        <= 128 * 1024
        < largest
    )


def test_keep_download(hub: Hub, folder: Path, expected: dict[str, str], tmp_path: Path) -> None:
    result = invoke(REPO, "--keep-download", "--no-verify", "-o", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert len(hub.cached()) == len(shard_bytes(folder))
    before = dict(hub.server.fetched)
    result = invoke(REPO, "--no-verify", "-o", str(tmp_path / "again"))
    assert result.exit_code == 0, result.output
    assert of_weights(tmp_path / "again") == expected
    assert hub.server.fetched == before
    assert len(hub.cached()) == len(shard_bytes(folder)), "what was there before is the user's"


def test_connection_cut_within_a_shard(
    hub: Hub, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client asks for the rest."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 64 * 1024)
    name = f"model-00003-of-{LAYERS + 2:05}.safetensors"
    hub.server.cuts[name] = [1_000_000, 500_000]
    result = invoke(REPO, "--no-verify", "-o", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert of_weights(tmp_path / "out") == expected
    assert hub.server.cuts[name] == []
    size = (hub.server.folder / name).stat().st_size
    assert hub.server.fetched[name] <= size + 3 * 128 * 1024


def test_stopped_export_goes_on(hub: Hub, folder: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """Ctrl-C in the middle: the weights that are written are not asked for again, and all is deleted."""
    last = f"model-00005-of-{LAYERS + 2:05}.safetensors"

    class Interrupted(Quiet):
        def note(self, message: str) -> None:
            super().note(message)
            if last in message:
                raise KeyboardInterrupt

    checkpoint = Checkpoint.open(REPO, streaming=True)
    with pytest.raises(KeyboardInterrupt):
        export(checkpoint, load_profile("cpu"), tmp_path / "out", Interrupted())
    assert checkpoint.streamed
    checkpoint.streamed._process.release()  # as the end of its process does
    before = dict(hub.server.fetched)
    result = invoke(REPO, "--no-verify", "-o", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert "going on after" in result.output
    assert of_weights(tmp_path / "out") == expected
    first = f"model-00002-of-{LAYERS + 2:05}.safetensors"
    assert hub.server.fetched[first] - before[first] <= 128 * 1024
    assert hub.cached() == [] and hub.left_over() == []


def test_adapter_beside_streamed_shards(hub: Hub, folder: Path, tmp_path: Path) -> None:
    """Its own file is neither fetched nor deleted."""
    lora = tmp_path / "lora"
    train(random_model(**GEOMETRY), lora, r=4, target_modules=["q_proj", "down_proj"])
    before = hashes(lora)
    for source, name in ((str(folder), "local"), (REPO, "out")):
        result = invoke(source, "--adapter", str(lora), "--no-verify", "-o", str(tmp_path / name))
        assert result.exit_code == 0, result.output
    assert of_weights(tmp_path / "out") == of_weights(tmp_path / "local")
    assert hashes(lora) == before
    assert hub.left_over() == []


def test_adapter_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    train(random_model(**GEOMETRY), tmp_path / "lora", r=4, target_modules=["q_proj"])
    hub.server.folder = tmp_path / "lora"
    adapter = Adapter.open(f"{REPO}@v1=0.5")
    assert (adapter.weight, adapter.root.name) == (0.5, COMMIT)
    assert len(adapter.parts) > 0


def test_damaged_shard(hub: Hub, folder: Path, tmp_path: Path) -> None:
    """The hub says one thing in the header, and gives another file."""
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    hub.server.folder = other
    checkpoint = Checkpoint.open(REPO, streaming=True)
    name = f"model-00002-of-{LAYERS + 2:05}.safetensors"
    shutil.copy(other / f"model-00003-of-{LAYERS + 2:05}.safetensors", other / name)
    with pytest.raises(UserError, match=f"{name} is damaged, or is not what the hub said before"):
        export(checkpoint, load_profile("cpu"), tmp_path / "out", Quiet())
    assert not any(path.endswith(name) for path in hub.left_over())


def test_no_safetensors_file_behind_the_name(hub: Hub, folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    hub.server.folder = other
    for content in (b"", b"x", b"<html>" * 100, (2).to_bytes(8, "little") + b"[]"):
        (other / f"model-00002-of-{LAYERS + 2:05}.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=r"no safetensors file|truncated or damaged|is missing") as caught:
            Checkpoint.open(REPO, streaming=True)
        assert "\n" not in str(caught.value)


def test_one_process_at_a_time(hub: Hub) -> None:
    norm = "model.norm.weight"
    first, second = (Checkpoint.open(REPO, streaming=True) for _ in range(2))
    assert first.streamed
    first.read(norm, 0, 1)
    with pytest.raises(UserError, match="another qwen-export is fetching someone/tiny"):
        second.read("model.embed_tokens.weight", 0, 1)
    first.streamed.finish()
    second.read(norm, 0, 1)
    with ThreadPoolExecutor(1) as pool:  # threads of the same process
        pool.submit(second.read, "model.embed_tokens.weight", 0, 1).result()


def test_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.server.token = "hf_secret"
    with pytest.raises(UserError, match="the hub did not give it"):
        Checkpoint.open(REPO, streaming=True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert len(Checkpoint.open(REPO, streaming=True).tensors) > LAYERS


@pytest.mark.parametrize("source", [f"{REPO}@nothing", REPO + "@"])
def test_no_such_revision(hub: Hub, source: str) -> None:
    with pytest.raises(UserError, match=r"did not give it|has no revision"):
        Checkpoint.open(source, streaming=True)


def test_two_revisions(hub: Hub) -> None:
    with pytest.raises(UserError, match="--revision says main: give one of them"):
        Checkpoint.open(f"{REPO}@v1", "main", streaming=True)


def test_offline_takes_what_is_in_the_cache(
    hub: Hub, folder: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Checkpoint.open(REPO)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = invoke(REPO, "--no-verify", "-o", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert of_weights(tmp_path / "out") == expected
    assert len(hub.cached()) == len(shard_bytes(folder))
