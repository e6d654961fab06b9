"""Profiles: what is shipped parses and exports, or is refused with the reason; files, `extends`, `--set`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from qwen_common.errors import UserError
from qwen_common.providers import PROVIDERS
from qwen_export.backends.onnx.graphs import build_graphs
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.cli import main
from qwen_export.graph.recipe import Recipe, check_layers
from qwen_export.graph.targets import target_for
from qwen_export.planner.models import configured, family
from qwen_export.planner.predictions import predict
from qwen_export.quantize.blockwise import Quantization
from qwen_export.verify.verification import verify
from qwen_profiles.documentation import BEGIN, END, fields_table
from qwen_profiles.reading import profile_names
from qwen_profiles.schema import Profile, WeightFormat, load_profile, parse_profile
from qwen_runtime.artifact import Artifact

from benchmarks.support.artifacts import Quiet, make_artifact
from benchmarks.support.checkpoints import TINY, TINY_MOE, TINY_VL
from tests.support.exported import Exported
from tests.support.generate_tokens import greedy

PROFILES = {name: load_profile(name) for name in profile_names()}
# tests/exporter/quantize/test_gptq.py has GPTQ, which no graph depends on and which takes seconds each time.
DATA_FREE = {
    name: profile.model_copy(update={"compression": "data-free"}) if profile.backend == "onnx" else profile
    for name, profile in PROFILES.items()
}
# Those whose artifacts differ in more than names and limits, so that each kind is exported and run once.
KINDS = ["cpu", "intel-n100", "strix-halo", "nvidia-rtx-8gb", "webgpu"]
OLD_PYTHON = os.environ.get("QWEN_EDGE_ORT124_PYTHON")
OPENVINO = [name for name, profile in PROFILES.items() if profile.backend != "onnx"]


def test_all_classes_of_the_plan_are_there() -> None:
    assert set(PROFILES) >= {
        *("strix-halo", "radeon-780m", "radeon-890m"),
        *("intel-lunar-lake", "intel-meteor-lake", "intel-arc-b580", "intel-n100"),
        *("nvidia-rtx-8gb", "nvidia-rtx-24gb", "dgx-spark", "apple-m4"),
        *("cpu", "cpu-avx2", "cpu-avx512", "laptop-16gb", "laptop-32gb", "webgpu"),
    }
    assert OPENVINO == ["intel-arc-b580", "intel-lunar-lake", "intel-meteor-lake"]


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_exports_or_says_what_to_install(name: str, exported: Exported, tmp_path: Path) -> None:
    """Each on the dense checkpoint; the kinds on the others too, below."""
    profile = DATA_FREE[name]
    if name in OPENVINO:
        if find_spec("openvino"):
            pytest.skip("tests/exporter/backends/openvino/test_openvino.py exports it")
        with pytest.raises(UserError, match=r"needs .*: pip install 'qwen-edge\[export,openvino\]'"):
            make_artifact(TINY, profile, tmp_path / "out")
        assert not any(tmp_path.iterdir())
        return
    artifact = Artifact.open(exported(TINY, profile))
    assert artifact.manifest["provider"] == profile.provider
    assert artifact.provider_options(profile.provider) == PROVIDERS[profile.provider].options
    assert artifact.context_length <= profile.context_length
    for python in generations(profile):
        assert len(greedy(python, artifact.root, [1, 2, 3], 4)["tokens"]) == 4


@pytest.mark.parametrize("checkpoint", [TINY_MOE, TINY_VL], ids=["experts", "vision"])
@pytest.mark.parametrize("name", [name for name in PROFILES if name not in OPENVINO])
def test_every_profile_exports_experts_and_vision(name: str, checkpoint: Path, exported: Exported) -> None:
    """Every graph loads on the generations that its profile's provider ships with; each kind runs too."""
    artifact = exported(checkpoint, DATA_FREE[name])
    for python in generations(PROFILES[name]):
        graphs = loaded(python, artifact)
        assert graphs == sorted(path.name for path in artifact.glob("*.onnx"))
        if name in KINDS and checkpoint == TINY_MOE:
            assert len(greedy(python, artifact, [1, 2, 3], 4)["tokens"]) == 4
    further = Artifact.open(artifact).manifest.get("further_graphs", [])
    assert [entry["providers"] for entry in further] == [[key] for key in PROFILES[name].fallbacks]
    for entry in further:
        if OLD_PYTHON and entry["providers"] == ["dml"]:
            assert loaded(OLD_PYTHON, artifact, "*.dml.onnx") == sorted(entry["files"].values())


def families() -> dict[str, Checkpoint]:
    shipped = {path.name: Checkpoint.open(str(path)) for path in (TINY, TINY_MOE, TINY_VL)}
    return family() | shipped


@pytest.mark.parametrize("name", ["strix-halo", "radeon-780m", "radeon-890m"])
def test_directml_gets_an_even_number_of_blocks(name: str) -> None:
    """Their folders have a graph for it. It reads zero points with rows padded to an even count, and answers
    wrongly where it is odd."""
    seen = 0
    assert PROFILES[name].fallbacks == ("webgpu", "dml")
    for checkpoint in families().values():
        for weight, _ in build_graphs(checkpoint, PROFILES[name]).placed:
            if isinstance(form := weight.storage, Quantization):
                assert weight.shape[-1] % (2 * form.block_size) == 0, (checkpoint.source, weight.name)
                assert not form.symmetric
                seen += 1
    assert seen > 1000


@pytest.mark.parametrize("features", [48, 72, 96, 112, 160, 192, 240, 384, 1000, 1056])
@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_odd_numbers_of_blocks_are_never_chosen_for_directml(features: int, precision: str) -> None:
    for block_size in (16, 32, 64, 128, 256):
        form = WeightFormat(precision=precision, block_size=block_size)
        recipe = Recipe({"mlp": form}, target_for("portable", "dml"), np.dtype(np.float16))
        storage = recipe.storage("mlp", features)
        if isinstance(storage, Quantization):
            assert features % (2 * storage.block_size) == 0
        else:
            assert features % 32, "blocks of 16 would do"


def generations(profile: Profile) -> list[str]:
    """Interpreters that have the ONNX Runtimes which `profile`'s artifacts must load on."""
    return [sys.executable, *([OLD_PYTHON] if OLD_PYTHON and profile.lowering == "portable" else [])]


def loaded(python: str, artifact: Path, pattern: str = "*.onnx") -> list[str]:
    """The graphs of `artifact` that `python`'s ONNX Runtime made a session of: all, or it fails."""
    code = (
        "import sys, pathlib, onnxruntime as ort;"
        "graphs = sorted(pathlib.Path(sys.argv[1]).glob(sys.argv[2]));"
        "[ort.InferenceSession(graph, providers=['CPUExecutionProvider']) for graph in graphs];"
        "print(*[graph.name for graph in graphs])"
    )
    return subprocess.check_output([python, "-c", code, artifact, pattern], text=True).split()


def test_openvino_profiles_export_for_directml_as_they_advise(tmp_path: Path) -> None:
    profile = load_profile("intel-lunar-lake", ["backend=onnx", "provider=dml"])
    assert Artifact.open(make_artifact(TINY, profile, tmp_path / "out")).manifest["provider"] == "dml"


def test_overrides() -> None:
    sets = ["weights.body=int8", "weights.lm_head.block_size=64", "context_length=65536", 'description="x=y"']
    profile, base = load_profile("strix-halo", sets), PROFILES["strix-halo"]
    assert profile.weights["mlp"] == base.weights["mlp"].model_copy(update={"precision": "int8"})
    assert profile.weights["experts"].precision == "int8"
    assert profile.weights["lm_head"].block_size == 64 and profile.weights["lm_head"].precision == "int8"
    assert profile.weights["attention"] == base.weights["attention"]
    assert profile.context_length == 65536 and profile.description == "x=y"
    both = load_profile("cpu", ["weights.body=int8", "weights.mlp=float"])
    assert (both.weights["mlp"].precision, both.weights["experts"].precision) == ("float", "int8")


def test_int2_is_for_providers_that_have_shown_a_kernel() -> None:
    known = {name for name, profile in PROFILES.items() if 2 in profile.weight_bits}
    assert known == {name for name, profile in PROFILES.items() if profile.provider == "cpu"}
    for override, field in (
        ("weights.experts=int2", "weights.experts"),
        ("layer_weights.3.experts=int2", "layer_weights.3.experts"),
    ):
        assert load_profile("cpu", [override]).weight_bits == {2, 4, 8}
        for name, who in (
            ("strix-halo", "provider amdgpu has no proven kernel for int2 weights"),
            ("webgpu", "provider webgpu has no proven kernel for int2 weights"),
            ("intel-lunar-lake", "backend openvino takes no int2 weights"),
        ):
            with pytest.raises(UserError) as raised:
                load_profile(name, [override])
            assert str(raised.value) == f"profile '{name}': {who}: set {field} to int4 or int8"
    with pytest.raises(UserError, match="provider webgpu has no proven kernel for int2 weights"):
        load_profile("cpu", ["weights.experts=int2", 'fallbacks=["webgpu"]'])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("weights.mpl=int4", "field 'weights.mpl': Input should be 'mlp'"),
        ("weights.mlp=int3", "field 'weights.mlp.precision': Input should be 'int2', 'int4'"),
        (
            "weights.mlp={precision = 'int2', block_size = 16}",
            "field 'weights.mlp': int2 has no quick kernel for blocks of 16: set block_size to 32 or more",
        ),
        ("weights.mlp.block_size=33", "field 'weights.mlp.block_size': Input should be 16"),
        ("context_length=long", "field 'context_length': Input should be a valid integer"),
        ("hardware.memory_budget_gb=-1", "field 'hardware.memory_budget_gb': Input should be greater than 0"),
        ("context_lenght=1", "'context_lenght': there is no such field: did you mean 'context_length'?"),
        (" Context_Length=1", "there is no such field: did you mean 'context_length'?"),
        ("weights.mlp.blocksize=32", "there is no such field: did you mean 'block_size'?"),
        ("bandwidth_gb_s=5", "there is no such field: did you mean 'hardware.bandwidth_gb_s'?"),
        ("zzz=1", "there is no such field: `qwen-export profiles --json` shows all"),
        ("name=mine", "field 'name': leave it off: a profile is called as its file is"),
        ("context_length=true", "field 'context_length': Input should be a valid integer"),
        ("context_length=1e3", "field 'context_length': Input should be a valid integer"),
        ("context_length=1", "field 'context_length': Input should be greater than or equal to 2"),
        ("context_length=4096\nprefill_chunk=16", "field 'context_length': Input should be a valid integer"),
        ("accuracy_level=true", "field 'accuracy_level': Input should be a valid integer"),
        ("spin_us=true", "field 'spin_us': Input should be a valid integer"),
        ("hardware.memory_budget_gb=true", "memory_budget_gb': Input should be a valid number"),
        ("hardware.memory_budget_gb=1e300", "memory_budget_gb': Input should be less than or equal to"),
        ("hardware.bandwidth_gb_s=1e308", "bandwidth_gb_s': Input should be less than or equal to"),
        ("quality.min_top1_agreement=true", "min_top1_agreement': Input should be a valid number"),
        ("frequent_tokens={share=true, precision='int8'}", "frequent_tokens.share': Input should be"),
        ('hardware.recognise.cpu=["("]', "recognise.cpu.0': Input should be a regular expression"),
        ("fallbacks=cpu", 'field \'fallbacks\': Input should be a list, such as ["a", "b"]'),
        ("hardware=1", "field 'hardware': Input should be a table"),
        ("layer_weights.-1.mlp=int8", "field 'layer_weights.-1': Input should be greater than or equal to 0"),
        (
            "layer_weights.0.lm_head=int8",
            "field 'layer_weights': lm_head is in no layer: set weights.lm_head",
        ),
        ("layer_weights.0.mlp=" + 5000 * "[", "weights.0.mlp.precision': Input should be 'int2'"),
        ("cache_dtype=float16", "cache_dtype must be activation_dtype, float32, or int8"),
        ("cache_dtype=int4", "field 'cache_dtype': Input should be 'float32', 'float16' or 'int8'"),
        (
            "hardware.memory_budget_gb=inf",
            "memory_budget_gb': Input should be a finite number",
        ),
        (
            "provider=tpu",
            "'provider': Input should be 'cpu', 'cuda', 'amdgpu', 'dml', ",
        ),
        ("backend=tvm", "field 'backend': Input should be 'onnx' or 'openvino'"),
        ("scale_dtype=int8", "field 'scale_dtype': Input should be 'float32' or 'float16'"),
        ("provider=dml", "provider dml has no kernels for lowering fused"),
        ("context_length", "'context_length' sets nothing: write field=value"),
        ("=1", "'=1' sets nothing"),
    ],
)
def test_wrong_overrides_are_named(override: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        load_profile("cpu", [override])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_profile_of_ones_own_extends_a_shipped_one(tmp_path: Path) -> None:
    path = tmp_path / "kiosk.toml"
    path.write_text(
        'extends = "cpu-avx2"\ndescription = "lobby"\ncontext_length = 2048\n[weights]\nbody = "int8"\n'
    )
    output = tmp_path / "out"
    arguments = [
        "--profile",
        str(path),
        str(TINY),
        "-o",
        str(output),
        "--json",
        "--no-verify",
        "--set",
        "prefill_chunk=64",
    ]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    manifest = json.loads(done.stdout)
    assert manifest["profile"] == "kiosk" and manifest["recipe"]["mlp"]["precision"] == "int8"
    artifact = Artifact.open(output)
    assert (artifact.context_length, artifact.chunk_size) == (2048, 64)
    for text, message in {
        'extends = "cpux"': "no profile 'cpux': did you mean 'cpu'",
        "extends = 1": "'extends': give the name of one shipped profile",
        'extends = "cpu"\nweights = 3': "field 'weights'",
        'extends = "cpu"\nname = "x"': "field 'name': leave it off",
        f"a = {5000 * '['}": "profile 'mine' is not valid TOML",
    }.items():
        with pytest.raises(UserError) as raised:
            parse_profile("mine", text)
        assert message in str(raised.value)
    with pytest.raises(UserError, match=r"cannot read the profile .*missing\.toml"):
        load_profile(str(tmp_path / "missing.toml"))
    assert load_profile(str(path.rename(tmp_path / "KIOSK.TOML"))).name == "KIOSK"
    with pytest.raises(UserError, match=r"mine\.json is no profile: give a file whose name ends in \.toml"):
        load_profile(str((tmp_path / "KIOSK.TOML").rename(tmp_path / "mine.json")))


@pytest.mark.parametrize(
    ("content", "length"),
    [(b"\xef\xbb\xbf", 2048), (b"", 2048), (b"\xff\xfe", "cannot read the profile .*: it is not UTF-8")],
)
def test_a_profile_as_windows_editors_save_it(tmp_path: Path, content: bytes, length: int | str) -> None:
    path = tmp_path / "kiosk.toml"
    path.write_bytes(content + b'extends = "cpu"\r\ncontext_length = 2048\r\n')
    if isinstance(length, int):
        assert load_profile(str(path)).context_length == length
    else:
        with pytest.raises(UserError, match=length):
            load_profile(str(path))


def test_formats_of_layers_that_are_not_there_are_refused(tmp_path: Path) -> None:
    for override, message in {
        "layer_weights.8.mlp=int8": "layer_weights.8: the model has layers 0 to 7",
        "layer_weights.0.attention=int8": "layer_weights.0.attention: that layer has .*linear_attention, mlp",
        "layer_weights.3.linear_attention=int8": "layer_weights.3.linear_attention: that layer has attention",
    }.items():
        with pytest.raises(UserError, match=message):
            make_artifact(TINY, load_profile("cpu", [override]), tmp_path / "out")
    check_layers(
        load_profile("cpu", ["layer_weights.0.body=int8"]).layer_weights,
        Checkpoint.open(str(TINY)).config.tensors(),
    )


@pytest.mark.parametrize(
    "override, message",
    [
        ("threads=-1", "'threads': Input should be a number from 0 to 1024, or 'performance'"),
        ("threads=2000", "'threads': Input should be a number"),
        ("threads=true", "'threads': Input should be a number"),
        ("threads=eco", "'threads': Input should be a number"),
        ("spin_us=maybe", "spin_us.*integer"),
        ("spin_us=-1", "spin_us.*greater than or equal to 0"),
    ],
)
def test_threads_are_checked(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_profile("cpu", [override])
    with pytest.raises(UserError, match="spin_us is for ONNX Runtime"):
        load_profile("intel-lunar-lake", ["spin_us=0"])


def test_every_field_is_documented() -> None:
    document = (Path(__file__).parents[2] / "docs" / "profiles.md").read_text(encoding="utf-8")
    assert f"{BEGIN}{fields_table()}{END}" in document
    assert "|  |" not in fields_table()


@pytest.mark.parametrize("checkpoint", [TINY, TINY_MOE], ids=lambda path: path.name)
def test_float16_scales_are_half_the_bytes_and_the_same_model(checkpoint: Path, tmp_path: Path) -> None:
    """On the CPU, where activations are float32: what runs is the reference with the weights as stored."""
    alone = ["accuracy_level=0", "speculative=false"]  # one graph, whose casts weigh less than scales
    usual = load_profile("cpu", alone)
    small = load_profile("cpu", [*alone, "scale_dtype=float16"])
    sizes, losses = [], []
    for profile in (usual, small):
        artifact = make_artifact(checkpoint, profile, tmp_path / str(len(sizes)), all_logits=False)
        predicted = predict(configured(str(checkpoint)), profile).estimate
        sizes.append(sum(file.stat().st_size for file in artifact.iterdir()))
        assert predicted is not None and predicted.disk == pytest.approx(sizes[-1], rel=0.01)
        report = verify(artifact, Checkpoint.open(str(checkpoint)), Quiet(), tokens=256)
        assert report["run"]["kl_divergence"] == pytest.approx(report["weights"]["kl_divergence"], rel=1e-3)
        losses.append(report["run"]["kl_divergence"])
    graphs = build_graphs(Checkpoint.open(str(checkpoint)), usual)
    scales = sum(t.nbytes for _, tensors in graphs.placed for t in tensors if t.name.endswith(".scales"))
    assert sizes[0] - sizes[1] == pytest.approx(scales / 2, rel=0.05)
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
