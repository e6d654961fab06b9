"""`qwen-export matrix`: what has changed is made, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from qwen_export.backends.onnx.resume import Journal
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.cli.program import main
from qwen_export.export import export
from qwen_profiles.schema import load_profile

from benchmarks.support.artifacts import Quiet
from benchmarks.support.checkpoints import TINY
from tests.exporter.test_push import REPO
from tests.support.adapters import train
from tests.support.files import hashes
from tests.support.hub_server import COMMIT, HubServer
from tests.support.random_checkpoints import load_tensors, save_shards, write_random_checkpoint
from tests.support.registry_server import registry_alone

THREE = '["cpu", "strix-halo", {profile = "cpu", set = ["weights.body=int8"], name = "cpu-8"}]'


def matrix(folder: Path, text: str, *options: str) -> Result:
    (folder / "release.toml").write_text(text)
    arguments = ["matrix", str(folder / "release.toml"), "--no-progress", *options]
    return CliRunner().invoke(main, arguments)


def rows(result: Result, code: int = 0) -> dict[str, dict[str, Any]]:
    assert result.exit_code == code, result.output
    return {row["label"]: row for row in json.loads(result.stdout)}


def refusal(result: Result) -> str:
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    return line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a checkpoint in it."""
    shutil.copytree(TINY, tmp_path / "tiny")
    return tmp_path


RELEASE = f"""
profiles = {THREE}
checks = {{verify = false}}
[[release]]
checkpoints = ["tiny"]
"""


def test_three_profiles_are_as_single_exports(folder: Path) -> None:
    planned = rows(matrix(folder, RELEASE, "--dry-run", "--json"))
    assert [row["reasons"] for row in planned.values()] == [["new"]] * 3
    assert not (folder / "artifacts").exists()
    made = rows(matrix(folder, RELEASE, "--json"))
    assert list(made) == ["tiny for cpu", "tiny for strix-halo", "tiny for cpu-8"]
    assert {row["state"] for row in made.values()} == {"made"}
    export(Checkpoint.open(str(folder / "tiny")), load_profile("strix-halo"), folder / "alone", Quiet())
    assert hashes(folder / "artifacts" / "tiny-strix-halo") == hashes(folder / "alone")
    size = sum(path.stat().st_size for path in (folder / "alone").iterdir())
    assert planned["tiny for strix-halo"]["disk"] == pytest.approx(size, rel=0.1)


def test_only_what_has_changed_is_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = 'checks = {verify = false}\n[[release]]\ncheckpoints = ["tiny"]\nname = "it"\nprofiles = ["cpu"]\n'
    artifact = folder / "artifacts" / "it-cpu"
    rows(matrix(folder, one, "--json"))
    before = artifact.stat().st_ino

    def reasons(text: str = one) -> list[str]:
        (row,) = rows(matrix(folder, text, "--dry-run", "--json")).values()
        return row["reasons"]

    def made(text: str = one) -> None:
        (row,) = rows(matrix(folder, text, "--json")).values()
        assert row["state"] == "made"
        assert reasons(text) == []

    (row,) = rows(matrix(folder, one, "--json")).values()
    assert row["state"] == "unchanged" and artifact.stat().st_ino == before

    shard = folder / "tiny" / "model.safetensors"
    os.utime(shard, ns=(1, 1))
    assert reasons() == ["checkpoint changed"]
    made()
    with (folder / "tiny" / "tokenizer_config.json").open("a") as file:
        file.write("\n")
    assert reasons() == ["checkpoint changed"]
    made()
    changed = one.replace('["cpu"]', '[{profile = "cpu", set = ["weights.body=int8", "mtp=false"]}]')
    assert reasons(changed) == ["profile changed: weights.mlp.precision, weights.experts.precision, mtp"]
    made(changed)
    longer = changed + "max_context = 1024\n"
    assert reasons(longer) == ["profile changed: context_length"]
    made(longer)
    with (artifact / "model.onnx").open("ab") as file:
        file.write(b"x")
    (reason,) = reasons(longer)
    assert reason.startswith("damaged: ") and "model.onnx changed since the export" in reason
    made(longer)
    manifest = json.loads((artifact / "manifest.json").read_text())
    (artifact / "manifest.json").write_text(json.dumps({**manifest, "qwen_edge": "0.0.9"}))
    assert reasons(longer) == ["exporter changed: qwen-edge 0.0.9 made it"]
    made(longer)


def test_another_adapter(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    for seed in (1, 2):
        model = AutoModelForCausalLM.from_pretrained(TINY)
        train(model, folder / f"lora{seed}", seed, r=4, target_modules=["down_proj"])

    def text(*adapters: str) -> str:
        return (
            'checks = {verify = false}\nprofiles = ["cpu"]\n[[release]]\ncheckpoints = ["tiny"]\n'
            f"adapters = {json.dumps(adapters)}\n"
        )

    assert rows(matrix(folder, text(), "--json"))
    for adapters in (["lora1"], ["lora2"], ["lora2=0.5"], []):
        (row,) = rows(matrix(folder, text(*adapters), "--dry-run", "--json")).values()
        assert row["reasons"] == ["adapter changed"]
        rows(matrix(folder, text(*adapters), "--json"))
        (row,) = rows(matrix(folder, text(*adapters), "--dry-run", "--json")).values()
        assert row["reasons"] == []
    # A fine-tune beside its base, in one group: both as single exports.
    both = text() + '[[release]]\nname = "tuned"\ncheckpoints = ["tiny"]\nadapters = ["lora1"]\n'
    assert rows(matrix(folder, both, "--json"))["tuned for cpu"]["state"] == "made"
    arguments = ["--profile", "cpu", str(folder / "tiny"), "--adapter", str(folder / "lora1")]
    CliRunner().invoke(main, [*arguments, "-o", str(folder / "alone"), "--no-verify", "--no-progress"])
    assert hashes(folder / "artifacts" / "tuned-cpu") == hashes(folder / "alone")


def test_verified_and_judged(folder: Path) -> None:
    text = """
profiles = ["cpu", {profile = "cpu", set = ["quality.max_kl_divergence=1e-9"], name = "strict"}]
push = "My Org/{name}"
[checks]
tokens = 64
[[release]]
checkpoints = ["tiny"]
"""
    assert "both go to" in refusal(matrix(folder, text))
    text = text.replace('push = "My Org/{name}"\n', "")
    rows(matrix(folder, text.replace("tokens = 64", "verify = false"), "--json"))
    planned = rows(matrix(folder, text, "--dry-run", "--json")).values()
    assert [(row["make"], row["verify"]) for row in planned] == [(False, True)] * 2
    for _ in range(2):  # nothing is measured again
        done = rows(matrix(folder, text, "--json"), code=3)
        assert {label: (row["state"], row["passed"]) for label, row in done.items()} == {
            "tiny for cpu": ("unchanged", True),
            "tiny for strict": ("unchanged", False),
        }
        planned = rows(matrix(folder, text, "--dry-run", "--json")).values()
        assert [(row["make"], row["verify"]) for row in planned] == [(False, False)] * 2


def test_one_failure_among_others(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "tiny")
    tensors = load_tensors(checkpoint)
    tensors["model.layers.1.input_layernorm.weight"][3] = 1e6
    save_shards(checkpoint, tensors, 1)
    result = matrix(tmp_path, RELEASE, "--json")
    made = rows(result, code=2)
    assert [row["state"] for row in made.values()] == ["made", "failed", "made"]
    assert "more than float16 holds" in made["tiny for strix-halo"]["error"]
    result = matrix(tmp_path, RELEASE)
    assert result.exit_code == 2
    assert "tiny for strix-halo: weight" in result.stderr and "unchanged" in result.stdout


ANOTHER = '[[release]]\nname = "x"\n'


def outside(folder: Path) -> None:
    (folder / "artifacts" / "tiny-cpu-8").mkdir(parents=True)
    (folder / "artifacts" / "tiny-cpu-8" / "mine.txt").write_text("mine")


def no_tokenizer(folder: Path) -> None:
    (folder / "tiny" / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("before", "text", "message"),
    [
        (None, RELEASE + '[[release]]\nname = "x"\ncheckpoints = ["none"]\n', "x for cpu: no folder none"),
        (
            None,
            RELEASE + '[[release]]\nname = "x"\ncheckpoints = ["tiny"]\nadapters = ["none"]\n',
            "x for cpu: ",
        ),
        (None, 'push = "nowhere-{profile}"' + RELEASE, "is no repository on the hub"),
        (None, 'push = "oci://host/Up per:{profile}"' + RELEASE, "names nothing in a registry"),
        (outside, RELEASE, "tiny for cpu-8: "),
        (no_tokenizer, RELEASE.replace("false", "true"), "tiny for cpu: "),
    ],
)
def test_everything_is_looked_at_first(
    before: Callable[[Path], None] | None, text: str, message: str, folder: Path
) -> None:
    if before:
        before(folder)
    assert message in refusal(matrix(folder, text))
    assert not (folder / "artifacts" / "tiny-cpu").exists()


def test_ctrl_c_and_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = Journal.add

    def stopped(self: Journal, names: list[str]) -> None:
        if len(self.done) > 20:
            raise KeyboardInterrupt
        add(self, names)

    with monkeypatch.context() as patch:
        patch.setattr("qwen_export.backends.onnx.stream._SYNC_BYTES", 1)
        patch.setattr(Journal, "add", stopped)
        assert matrix(folder, RELEASE).exit_code == 130
    assert {path.name for path in (folder / "artifacts").iterdir()} == {
        ".tiny-cpu.partial",
        ".tiny-strix-halo.partial",
        ".tiny-cpu-8.partial",
    }
    result = matrix(folder, RELEASE)
    assert "going on after 21 weights" in result.stderr
    assert {path.name for path in (folder / "artifacts").iterdir()} == {
        "tiny-cpu",
        "tiny-strix-halo",
        "tiny-cpu-8",
    }
    export(Checkpoint.open(str(folder / "tiny")), load_profile("cpu"), folder / "alone", Quiet())
    assert hashes(folder / "artifacts" / "tiny-cpu") == hashes(folder / "alone")


def serve(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache"))


def test_one_download_for_three_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 1536, "num_hidden_layers": 4}
    repository = write_random_checkpoint(tmp_path / "repository", shards=4, **geometry)
    header = 128 * 1024  # is fetched when a checkpoint is looked at, and when it is exported
    with HubServer(repository, "someone/tiny").serving() as hub:
        serve(hub, tmp_path, monkeypatch)
        text = RELEASE.replace('"tiny"', '"someone/tiny@main"')
        made = rows(matrix(tmp_path, text, "--json"))
        assert {row["state"] for row in made.values()} == {"made"}
        shards = {path.name: path.stat().st_size for path in repository.glob("*.safetensors")}
        assert len(shards) == 4 and min(shards.values()) > 4 * header
        assert all(size <= hub.fetched[name] <= size + 2 * header for name, size in shards.items())
        hub.fetched.clear()
        assert {row["state"] for row in rows(matrix(tmp_path, text, "--json")).values()} == {"unchanged"}
        assert all(hub.fetched[name] <= header for name in shards)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    for name in ("cpu", "strix-halo"):
        export(Checkpoint.open(str(repository)), load_profile(name), tmp_path / name, Quiet())
        ours, alone = (hashes(path) for path in (tmp_path / "artifacts" / f"tiny-{name}", tmp_path / name))
        assert {file for file in ours if ours[file] != alone[file]} <= {"manifest.json", "README.md"}


def test_pushed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "repository").mkdir()
    with HubServer(folder / "repository", REPO).serving() as hub:
        hub.exists = False
        serve(hub, folder, monkeypatch)
        text = f'push = "{REPO}"' + RELEASE.replace(THREE, '["cpu"]')
        (row,) = rows(matrix(folder, text, "--json")).values()
        assert row["pushed"] == COMMIT and hub.visibility == "private"
        there = len(hub.commits)
        (row,) = rows(matrix(folder, text, "--json")).values()
        assert row["state"] == "unchanged" and row["pushed"] == COMMIT
        assert len(hub.commits) == there
        hub.token = "another"
        made = rows(matrix(folder, text, "--json"), code=2)
        assert "the hub did not take" in made["tiny for cpu"]["error"]


def test_pushed_to_a_registry(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with registry_alone(folder / "docker", monkeypatch) as server:
        text = f'push = "oci://{server.host}/Team/{{name}}:{{profile}}"' + RELEASE.replace(THREE, '["cpu"]')
        assert "names nothing in a registry" in refusal(matrix(folder, text))  # what is not a field stays
        (row,) = rows(matrix(folder, text.replace("Team", "team"), "--json")).values()
        assert row["push"] == f"oci://{server.host}/team/tiny:cpu"
        assert row["pushed"].startswith("sha256:")
        (again,) = rows(matrix(folder, text.replace("Team", "team"), "--json")).values()
        assert (again["state"], again["pushed"]) == ("unchanged", row["pushed"])
