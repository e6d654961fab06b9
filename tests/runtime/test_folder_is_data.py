"""A model folder is data: a stranger's folder, whose manifest fits it, names no code and no file elsewhere.

The attacker writes what he likes into a finished artifact, and a new manifest.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner
from onnx.external_data_helper import set_external_data
from qwen_common import manifest as manifests
from qwen_common.errors import UserError
from qwen_export.cli import main as export_main
from qwen_profiles.schema import load_profile
from qwen_runtime.artifact import Artifact
from qwen_runtime.cli import main as run_main
from qwen_runtime.model import Model

from benchmarks.support.checkpoints import TINY
from tests.support.exported import Exported

LIBRARY = """
#include <stdio.h>
__attribute__((constructor)) static void run(void) { FILE *f = fopen(PROOF, "w"); if (f) fclose(f); }
void *RegisterCustomOps(void *options, void *api) { return 0; }
"""
OPEN = "import sys, onnxruntime_genai as og; og.Model(og.Config(sys.argv[1]))"


@pytest.fixture
def artifact(cpu_artifact: Path, tmp_path: Path) -> Path:
    return shutil.copytree(cpu_artifact, tmp_path / "stranger", copy_function=linked)


def linked(source: str, target: str) -> None:
    """Weights are not copied for each test."""
    if source.endswith(".data"):
        Path(target).hardlink_to(source)
    else:
        shutil.copyfile(source, target)


@pytest.fixture
def library(tmp_path: Path) -> tuple[Path, Path]:
    """A shared library, and the file that it makes when it is loaded."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, made, proof = tmp_path / "evil.c", tmp_path / "evil.so", tmp_path / "it-ran"
    source.write_text(LIBRARY)
    subprocess.run(
        [compiler, "-shared", "-fPIC", f'-DPROOF="{proof}"', "-o", str(made), str(source)], check=True
    )
    return made, proof


def put(artifact: Path, name: str, content: bytes) -> None:
    manifests.put_files(artifact, manifests.read(artifact), {name: content})


def edit(artifact: Path, change: Callable[[dict[str, Any]], object], name: str = "genai_config.json") -> None:
    content = json.loads((artifact / name).read_text())
    change(content)
    put(artifact, name, json.dumps(content).encode())


def refused(artifact: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        Model.load(artifact)
    assert str(raised.value).isprintable()


def session(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["model"]["decoder"]["session_options"]
    return found


def test_a_library_of_the_folder_is_not_loaded(artifact: Path, library: tuple[Path, Path]) -> None:
    """GenAI runs it; none of our commands does."""
    made, proof = library
    put(artifact, "evil.so", made.read_bytes())
    edit(artifact, lambda config: session(config).update(custom_ops_library="evil.so"))
    subprocess.run([sys.executable, "-c", OPEN, str(artifact)], capture_output=True)
    assert proof.exists(), "the attack is none: GenAI did not load the library"
    proof.unlink()
    refused(artifact, "sets 'model.decoder.session_options.custom_ops_library', which")
    for program, command in (
        (run_main, [str(artifact), "Hello"]),
        (run_main, ["serve", str(artifact)]),
        (run_main, ["bench", str(artifact)]),
        (export_main, ["inspect", str(artifact)]),
        (export_main, ["verify", str(artifact), "--against", str(TINY)]),
    ):
        done = CliRunner().invoke(program, command)
        assert done.exit_code == 2 and "custom_ops_library" in done.output, (command, done.output)
    assert not proof.exists()


def test_a_name_that_stands_twice(artifact: Path, library: tuple[Path, Path]) -> None:
    """Of two of a name Python keeps the last, and GenAI reads both."""
    made, proof = library
    put(artifact, "evil.so", made.read_bytes())
    text = (artifact / "genai_config.json").read_text()
    evil = '"session_options": {"custom_ops_library": "evil.so"}, "session_options":'
    put(artifact, "genai_config.json", text.replace('"session_options":', evil, 1).encode())
    subprocess.run([sys.executable, "-c", OPEN, str(artifact)], capture_output=True)
    assert proof.exists(), "the attack is none: GenAI did not load the library"
    proof.unlink()
    refused(artifact, "genai_config.json is not valid JSON")
    assert not proof.exists()


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda it: it["model"].update(embedding={"session_options": {}}), "sets 'model.embedding.session_o"),
        (lambda it: session(it).update(enable_profiling="/etc/x"), "sets '.*enable_profiling'"),
        (lambda it: session(it).update(config_entries={"a": "b"}), "sets '.*config_entries'"),
        (lambda it: it["model"]["decoder"].update(pipeline=[]), "sets 'model.decoder.pipeline'"),
        (lambda it: it.update(runtime_profiles=[]), "sets 'runtime_profiles'"),
        (lambda it: it["search"].update(chunk_size={"a": 1}), "has no valid 'search.chunk_size'"),
        (lambda it: it["search"].update(note="text"), "has no valid 'search.note'"),
        (lambda it: it["model"]["decoder"].update(filename="/etc/passwd.onnx"), "does not list /etc/passwd"),
        (lambda it: it["model"]["decoder"].update(filename="../model.onnx"), "does not list ../model.onnx"),
        (lambda it: it["model"]["decoder"].update(filename="model.ort"), "has no valid '.*filename'"),
        (lambda it: it["model"]["decoder"].update(filename=["model.onnx"]), "has no valid '.*filename'"),
        (lambda it: it["model"]["decoder"]["inputs"].update(past_key_names="%s%n"), "no valid '.*past_key"),
        (lambda it: it["model"]["decoder"]["inputs"].update(past_key_names="%d%d"), "no valid '.*past_key"),
        (lambda it: it["model"].update({"a\nb": 1}), r"sets 'model.a\\nb'"),
    ],
)
def test_what_a_configuration_may_not_say(
    artifact: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(artifact, change)
    refused(artifact, message)


@pytest.mark.parametrize(
    "provider,options",
    [
        ("qnn", {"backend_path": "evil.so"}),
        ("cuda", {"gpu_external_alloc": "140000000"}),
        ("webgpu", {"dawnProcTable": "140000000"}),
        ("openvino", {"load_config": "options.json"}),
        ("openvino", {"cache_dir": "/etc"}),
        ("openvino", {"CONFIG_FILE": "kernels.xml"}),
        ("openvino", {"precision": "../../evil"}),
        ("dml", {"enable_graph_capture": "/etc/passwd"}),
    ],
)
def test_what_may_not_be_asked_of_a_provider(artifact: Path, provider: str, options: dict[str, str]) -> None:
    edit(artifact, lambda config: session(config).update(provider_options=[{provider: options}]))
    refused(artifact, f"{provider}.*may (not|set)")


def test_a_profile_cannot_ask_it_either() -> None:
    assert load_profile("webgpu", ["provider_options.powerPreference=low-power"]).provider_options
    with pytest.raises(
        UserError, match="'dawnProcTable' of webgpu is not an option that an artifact may set"
    ):
        load_profile("webgpu", ["provider_options.dawnProcTable=p123"])


def test_an_overlay_says_no_more(exported: Exported, library: tuple[Path, Path], tmp_path: Path) -> None:
    made, proof = library
    artifact = shutil.copytree(exported(TINY, load_profile("strix-halo")), tmp_path / "overlay")
    put(artifact, "evil.so", made.read_bytes())
    evil = {"custom_ops_library": "evil.so"}
    edit(
        artifact,
        lambda config: config["model"]["decoder"].update(session_options=evil),
        "genai_config.dml.json",
    )
    manifest = manifests.read(artifact)
    manifest["further_graphs"][0]["providers"] = ["cpu"]  # so that it is taken here
    manifests.write(artifact, manifest)
    with pytest.raises(UserError, match=r"genai_config\.dml\.json sets '.*custom_ops_library'"):
        Model.load(artifact, "cpu")
    assert not proof.exists()


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "secret", "*/_ORT_MEM_ADDR_/*"])
@pytest.mark.parametrize("place", ["initializer", "constant", "body"])
def test_weights_from_elsewhere(artifact: Path, tmp_path: Path, location: str, place: str) -> None:
    for folder in (tmp_path, artifact):
        (folder / "secret").write_bytes(bytes(64))
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    tensor = onnx.TensorProto(data_type=onnx.TensorProto.FLOAT, dims=[4], name="stranger")
    tensor.raw_data = bytes(16)
    set_external_data(tensor, location, 0, 16)
    tensor.ClearField("raw_data")
    constant = onnx.NodeProto(op_type="Constant", output=["stranger"])
    constant.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)
    if place == "initializer":
        model.graph.initializer.append(tensor)
    elif place == "constant":
        model.graph.node.append(constant)
    else:
        body = onnx.NodeProto(op_type="If")
        body.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g.node.append(constant)
        model.functions.add(name="f", domain="").node.append(body)
    put(artifact, "model.onnx", model.SerializeToString())
    (artifact / "secret").unlink()
    refused(artifact, "takes weights from .*, which is not listed")


def test_a_compiled_blob_is_no_graph(artifact: Path) -> None:
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    for domain, operator, shown in (
        ("com.microsoft", "EPContext", "EPContext"),
        ("evil", "Run", r"evil::\*"),
    ):
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        changed.graph.node.append(onnx.NodeProto(op_type=operator, domain=domain))
        put(artifact, "model.onnx", changed.SerializeToString())
        refused(artifact, rf"has the operator {shown}, which an artifact may not")


@pytest.mark.parametrize(
    "content",
    [
        b"ORTM",
        b"\x0e",
        b"\x3a\x05",
        b"\x00\x00",
        b"\xff" * 20,
        b"\x08",
        b"\x09\x00",
        b"\xba\x80\x80\x80\x10\x00",
    ],
)
def test_what_is_no_graph(artifact: Path, content: bytes) -> None:
    """Cut off, with groups, without field numbers, or with one that protobuf's reader takes for another."""
    put(artifact, "model.onnx", content)
    refused(artifact, "is no ONNX graph")


def test_graphs_that_are_nested_for_ever(artifact: Path) -> None:
    content = b""
    for _ in range(2000):  # graph, node, attribute, graph
        for number in (6, 5, 1):
            content = bytes([number << 3 | 2]) + length(len(content)) + content
    put(artifact, "model.onnx", b"\x3a" + length(len(content)) + content)
    refused(artifact, "nested too deeply")


def length(value: int) -> bytes:
    found = b""
    while value > 0x7F:
        found, value = found + bytes([value & 0x7F | 0x80]), value >> 7
    return found + bytes([value])


def test_the_graphs_of_every_kind_pass(exported: Exported) -> None:
    found = Artifact.open(exported(TINY, load_profile("strix-halo")), verify=True)
    assert "model.dml.onnx" in found.manifest["files"]


def test_files_that_the_manifest_does_not_name(artifact: Path) -> None:
    """A library may look for any name; notes and what systems leave behind stay."""
    for name in ("NOTES.md", ".DS_Store", "Thumbs.db", "desktop.ini", "report.json", "report-kl.png"):
        (artifact / name).write_text("{}")
    (artifact / ".git").mkdir()
    Artifact.open(artifact)
    for name in (
        "tokenizer_module.json",
        "chat_template.json",
        "evil.so",
        "model.ort",
        "evil.py",
        "mtp.onnx",
    ):
        (artifact / name).write_text("{}")
        refused(artifact, f"{name} is in .* and not in its manifest")
        (artifact / name).unlink()


def test_links_are_no_files_of_the_folder(artifact: Path, tmp_path: Path) -> None:
    for name in ("manifest.json", "tokenizer.json"):
        outside = tmp_path / name
        shutil.move(artifact / name, outside)
        (artifact / name).symlink_to(outside)
        refused(artifact, "is a link|names a file outside the folder")
        (artifact / name).unlink()
        shutil.move(outside, artifact / name)
    (artifact / "stray.json").symlink_to("/etc/passwd")
    refused(artifact, "stray.json is in .* and not in its manifest")
