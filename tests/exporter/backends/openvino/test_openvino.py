"""The OpenVINO backend, in an environment of its own: its tools exclude the transformers of the other tests.

Truth is transformers in float32. See docs/testing.md for the command.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qwen_common.errors import UserError
from qwen_export.backends.openvino.compress import compress
from qwen_export.backends.openvino.convert import convert
from qwen_export.backends.openvino.load import load_model
from qwen_export.backends.openvino.placeholder import Placeholders, TensorSlice
from qwen_export.backends.openvino.repair import repair
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.export import export
from qwen_profiles.schema import Profile, load_profile
from qwen_runtime import Guidance, Model, Sampling
from transformers import AutoModelForCausalLM, Qwen3_5ForConditionalGeneration

from benchmarks.support.artifacts import FLOAT, Quiet, float_profile, make_artifact
from benchmarks.support.checkpoints import TINY, TINY_VL
from benchmarks.support.session import cosine
from tests.support.greedy import check_greedy_answers
from tests.support.random_checkpoints import store_head, write_random_checkpoint

pytestmark = pytest.mark.openvino
ov = pytest.importorskip("openvino")
pytest.importorskip("openvino_genai")

GREEDY = Sampling(temperature=0)
# OpenVINO's own choice is bfloat16 where the CPU has AMX, and a KV cache of 8 bits.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
# Clear-cut tokens: "What is yield?" begins with a choice by 0.035 of a logit, which paged kernels turn round.
QUESTION = [{"role": "user", "content": "What is assert?"}]


def exact_profile() -> Profile:
    """A profile that quantises nothing and rounds nothing."""
    base = load_profile("intel-lunar-lake")
    return base.model_copy(
        update={"weights": FLOAT, "activation_dtype": "float32", "provider_options": EXACT}
    )


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(TINY, exact_profile(), tmp_path_factory.mktemp("exact") / "artifact")


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(TINY, load_profile("intel-lunar-lake"), tmp_path_factory.mktemp("int4") / "artifact")


def logits(artifact: Path, *pieces: list[int]) -> np.ndarray:
    """Logits [tokens, vocab] of the stateful IR, run piece by piece."""
    request = ov.Core().compile_model(artifact / "openvino_model.xml", "CPU", EXACT).create_infer_request()
    found, at = [], 0
    for piece in pieces:
        inputs = {
            "input_ids": np.array([piece], np.int64),
            "attention_mask": np.ones((1, at + len(piece)), np.int64),
            "position_ids": np.arange(at, at + len(piece), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        found.append(request.infer(inputs)["logits"][0].copy())
        at += len(piece)
    return np.concatenate(found)


@pytest.mark.parametrize(
    "kind", ["trained", "dense", "experts", "experts in bfloat16", "untied", "own head", "equal"]
)
def test_uncompressed_logits_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    shapes: dict[str, dict[str, Any]] = {
        "dense": {},
        "experts": {"num_experts": 8},
        "experts in bfloat16": {"num_experts": 8, "dtype": torch.bfloat16},
        "untied": {"tie_word_embeddings": False},
        "own head": {},
        "equal": {},
    }
    checkpoint = TINY if kind == "trained" else write_random_checkpoint(tmp_path / "c", **shapes[kind])
    if kind in ("own head", "equal"):
        store_head(checkpoint, equal=kind == "equal")
    artifact = make_artifact(checkpoint, exact_profile(), tmp_path / "artifact")
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    prompt = np.random.default_rng(5).integers(0, 500, 90).tolist()
    with torch.no_grad():
        expected = reference(torch.tensor([prompt])).logits[0].numpy()
    found = logits(artifact, prompt[:50], prompt[50:51], prompt[51:])
    assert cosine(found, expected).min() > 0.99999
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.98
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


def test_greedy_answers_are_those_of_transformers(exact: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    with Model.load(exact) as model:
        check_greedy_answers(model, TINY, reference)


def test_the_same_conversation_on_both_backends(exact: Path, tmp_path: Path) -> None:
    onnx = make_artifact(TINY, float_profile("fused"), tmp_path / "onnx", all_logits=False)
    said = []
    for artifact in (exact, onnx):
        messages = list(QUESTION)
        with Model.load(artifact) as model:
            for question in ("And return?", "What is a class?", None):
                answer = "".join(model.generate(messages, max_tokens=50, sampling=GREEDY))
                messages += [
                    {"role": "assistant", "content": answer},
                    {"role": "user", "content": question},
                ]
        said.append(messages)
    assert said[0] == said[1]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from qwen_runtime.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_same_answer_from_the_command_line(exact: Path, tmp_path: Path) -> None:
    onnx = make_artifact(TINY, float_profile("fused"), tmp_path / "onnx", all_logits=False)
    options = ("What is assert?", "--max-tokens", "40", "--temperature", "0", "--json")
    found, expected = (json.loads(run(artifact, *options).stdout) for artifact in (exact, onnx))
    assert found["provider"] == "openvino-cpu"
    assert expected["provider"] == "cpu"
    assert found["reason"] != expected["reason"]
    for same in ("text", "finish_reason", "usage"):
        assert found[same] == expected[same]


def test_recipe_by_role(shipped: Path) -> None:
    model = ov.Core().read_model(shipped / "openvino_model.xml")
    kinds = {
        node.get_friendly_name(): node.get_element_type().get_type_name()
        for node in model.get_ops()
        if node.get_type_name() == "Constant"
    }
    manifest = json.loads((shipped / "manifest.json").read_text())
    int4 = [name for name, kind in kinds.items() if kind == "u4" and "zero_point" not in name]
    int8 = [name for name, kind in kinds.items() if kind == "u8" and "zero_point" not in name]
    assert len(int4) == 3 * 8 and all(".mlp." in name for name in int4)
    assert len(int8) == 3 * 6 + 4 * 2 + 1  # Gated DeltaNet, attention, the tied embedding
    assert manifest["recipe"]["mlp"]["precision"] == "int4"
    assert manifest["bytes_by_role"]["mlp"] < 0.7 * 3 * 8 * 192 * 384


def test_scale_estimation_keeps_the_recipe(tmp_path: Path, shipped: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    profile = load_profile("intel-lunar-lake", ["compression=scale-estimation"])
    checkpoint = Checkpoint.open(str(TINY))
    with pytest.raises(UserError, match="give a text of 128"):
        export(checkpoint, profile, tmp_path / "artifact", Quiet(), calibration=short)
    export(checkpoint, profile, tmp_path / "artifact", Quiet())
    found, expected = (stored(artifact) for artifact in (tmp_path / "artifact", shipped))
    assert [kind for kind, _ in found] == [kind for kind, _ in expected]
    same = [np.array_equal(one[1], other[1]) for one, other in zip(found, expected, strict=True)]
    assert 0 < sum(same) < len(same) - 20  # every 4-bit weight has other scales


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(TINY_VL, exact_profile(), tmp_path_factory.mktemp("vision") / "artifact")


def request(artifact: Path, name: str) -> Any:
    return (
        ov.Core().compile_model(artifact / f"openvino_{name}_model.xml", "CPU", EXACT).create_infer_request()
    )


def test_uncompressed_vision_model_is_that_of_transformers(seeing: Path) -> None:
    """Features of an image, embedded tokens, and logits for three different position streams."""
    reference = Qwen3_5ForConditionalGeneration.from_pretrained(TINY_VL, dtype=torch.float32).eval()
    tower, rng = reference.model.visual, np.random.default_rng(3)
    grid = torch.tensor([[1, 6, 10]])
    pixels = rng.standard_normal((60, 3 * 2 * 16 * 16), np.float32)
    positions = np.stack([np.arange(30), *rng.integers(0, 40, (3, 30))])[:, None]
    with torch.no_grad():
        features = tower(torch.from_numpy(pixels), grid_thw=grid).pooler_output.numpy()
        embedded = reference.get_input_embeddings()(torch.arange(30)[None]).numpy()
        mixed = np.concatenate([embedded[:, :15], features[None]], axis=1)
        positions = positions[:, :, : mixed.shape[1]]
        expected = (
            reference(inputs_embeds=torch.from_numpy(mixed), position_ids=torch.from_numpy(positions))
            .logits[0]
            .numpy()
        )
        places, turns = tower.fast_pos_embed_interpolate(grid).numpy(), tower.rot_pos_emb(grid).numpy()
    (patches,) = request(seeing, "vision_embeddings").infer([pixels]).values()
    merger = request(seeing, "vision_embeddings_merger")
    inputs = {
        "hidden_states": patches + places,
        "attention_mask": np.zeros((1, 60, 60), np.float32),
        "rotary_pos_emb": turns,
    }
    assert cosine(merger.infer(inputs)["last_hidden_state"], features).min() > 0.99999
    (found,) = request(seeing, "text_embeddings").infer([np.arange(30)[None]]).values()
    np.testing.assert_array_equal(found, embedded)
    inputs = {
        "inputs_embeds": mixed,
        "attention_mask": np.ones(mixed.shape[:2], np.int64),
        "position_ids": positions,
        "beam_idx": np.zeros(1, np.int32),
    }
    language = ov.Core().compile_model(seeing / "openvino_language_model.xml", "CPU", EXACT)
    assert cosine(language.create_infer_request().infer(inputs)["logits"][0], expected).min() > 0.99999


def test_vision_in_int8(tmp_path: Path) -> None:
    profile = load_profile("intel-lunar-lake", ["weights.vision=int8"])
    artifact = make_artifact(TINY_VL, profile, tmp_path / "artifact")
    model = ov.Core().read_model(artifact / "openvino_vision_embeddings_merger_model.xml")
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    kinds = [node.get_element_type().get_type_name() for node in constants]
    assert kinds.count("i8") == 4 * 4 + 2
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert set(manifest["bytes_by_role"]) == set(profile.weights) - {"experts", "shared_expert"}
    assert manifest["runtime"]["model"]["vision"]["config_filename"] in manifest["files"]


@pytest.mark.parametrize("kind", ["dense in float32", "experts in bfloat16", "untied in bfloat16"])
def test_weights_filled_in_one_by_one_are_those_of_nncf_on_the_whole_model(kind: str, tmp_path: Path) -> None:
    shapes: dict[str, dict[str, Any]] = {
        "dense in float32": {},
        "experts in bfloat16": {"num_experts": 8, "dtype": torch.bfloat16},
        "untied in bfloat16": {"tie_word_embeddings": False, "dtype": torch.bfloat16},
    }
    checkpoint = Checkpoint.open(str(write_random_checkpoint(tmp_path / "c", **shapes[kind])))
    profile = load_profile("intel-lunar-lake", ["weights.linear_attention.symmetric=true"])
    write_whole(checkpoint, profile, tmp_path / "whole")
    export(checkpoint, profile, tmp_path / "artifact", Quiet())
    found, expected = (stored(tmp_path / name) for name in ("artifact", "whole"))
    assert len(found) == len(expected) > 60
    assert {kind for kind, _ in found} >= {"u4", "i8", "u8", "f16"}
    for one, other in zip(found, expected, strict=True):
        assert one[0] == other[0]
        np.testing.assert_array_equal(one[1], other[1])


def write_whole(checkpoint: Checkpoint, profile: Profile, folder: Path) -> None:
    """The IR with all of the weights in memory, compressed by NNCF's public function."""
    recipe = dict(profile.weights)
    if checkpoint.config.tie_word_embeddings:
        recipe["embedding"] = recipe["lm_head"]
    model, _ = load_model(checkpoint)
    convert(model, folder, lambda traced, _: repair(compress(traced, recipe)))


def stored(artifact: Path) -> list[tuple[str, np.ndarray]]:
    """Types and values of the constants, in the order in which they are used."""
    model = ov.Core().read_model(artifact / "openvino_model.xml")
    constants = [node for node in model.get_ordered_ops() if node.get_type_name() == "Constant"]
    return [
        (node.get_element_type().get_type_name(), np.array(node.data))
        for node in constants
        if node.get_element_type().get_type_name() in ("i4", "u4", "i8", "u8", "f16", "bf16")
    ]


def test_a_weight_that_is_not_found_in_the_ir_is_an_error() -> None:
    """As when OpenVINO has made one of two of them, or copied one."""
    sources = Checkpoint.open(str(TINY)).tensors
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(2)]
    placeholders = Placeholders(384 * 192, len(names))
    parts = [TensorSlice(name, "mlp", sources[name], 0, 384) for name in names]
    first, second = (placeholders.tensor(part, torch.float32) for part in parts)
    assert first.shape == second.shape == (384, 192) and not torch.equal(first, second)
    assert placeholders.find(first.data_ptr()) == parts[0]
    assert placeholders.find(first.data_ptr() + 4) is None
    with pytest.raises(UserError, match=r"1 weights of the checkpoint are not in .*layers\.1\.mlp\.up_proj"):
        placeholders.check()
    assert placeholders.find(second.data_ptr()) == parts[1]
    placeholders.check()


@pytest.mark.parametrize("reads", [1, 10**9])
def test_rows_of_half_of_all_experts(reads: int, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(write_random_checkpoint(tmp_path / "c", num_experts=8)))
    source = checkpoint.tensors["model.layers.0.mlp.experts.gate_up_proj"]
    whole = source.read(0, 8)
    half = whole.shape[1] // 2
    part = TensorSlice("up", "experts", source, half, 2 * half)
    found = np.concatenate(list(part.rows(reads)))
    assert part.shape == (8, half, whole.shape[2])
    np.testing.assert_array_equal(found.reshape(part.shape), whole[:, half:].astype(np.float32))


def test_a_weight_that_no_group_fits_is_refused(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "c", intermediate_size=72)
    with pytest.raises(UserError, match=r"down_proj.* has rows of 72, .* the recipe says int4 for mlp"):
        make_artifact(checkpoint, load_profile("intel-lunar-lake"), tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


def test_stop_strings_seed_penalty_and_length(shipped: Path) -> None:
    with Model.load(shipped) as model:
        assert model.info.reason.startswith(
            "OpenVINO on CPU: OpenVINO finds no GPU on this machine, only CPU;"
        )
        whole = "".join(model.generate("The", max_tokens=60, sampling=GREEDY))
        cut = model.generate("The", max_tokens=60, sampling=GREEDY, stop=whole[20:31])
        assert "".join(cut) == whole[:20] and cut.finish_reason == "stop"
        short = model.generate("The", max_tokens=5, sampling=GREEDY)
        assert whole.startswith("".join(short)) and short.finish_reason == "length"
        assert len(short.tokens) == 5 and short.prompt_tokens == len(model.encode("The"))

        def sampled(**options: Any) -> str:
            sampling = Sampling(temperature=1.0, top_k=50, **options)
            return "".join(model.generate("The", max_tokens=30, sampling=sampling))

        assert sampled(seed=1) == sampled(seed=1)
        assert whole.startswith(sampled(seed=1, min_p=1.0))  # the likeliest alone
        assert len({sampled(seed=seed) for seed in range(5)}) > 1
        assert len({sampled() for _ in range(5)}) > 1
        counts = []
        for penalty in (0.0, 2.0):
            sampling = Sampling(temperature=0, presence_penalty=penalty, frequency_penalty=penalty)
            generation = model.generate("The", max_tokens=60, sampling=sampling)
            assert "".join(generation)
            counts.append(len(set(generation.tokens)))
        assert counts[1] > counts[0]


def test_cancelled_in_the_answer_and_in_the_prompt(shipped: Path) -> None:
    with Model.load(shipped) as model:
        generation = model.generate("The", sampling=GREEDY)
        next(generation)
        threading.Thread(target=generation.cancel).start()
        for _ in generation:
            pass
        assert generation.finish_reason == "cancelled"
        early = model.generate("The statement. " * 500, sampling=GREEDY)
        early.cancel()
        assert list(early) == [] and early.finish_reason == "cancelled"
        assert "".join(model.generate("The", max_tokens=5, sampling=GREEDY))


def test_answers_at_the_same_time(exact: Path) -> None:
    with Model.load(exact) as model:
        prompts = ["What is", "The global statement", "A class"]
        expected = ["".join(model.generate(text, max_tokens=40, sampling=GREEDY)) for text in prompts]
        found: dict[str, str] = {}

        def answer(text: str) -> None:
            found[text] = "".join(model.generate(text, max_tokens=40, sampling=GREEDY))

        threads = [threading.Thread(target=answer, args=(text,)) for text in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found[text] for text in prompts] == expected


def test_a_kept_history_changes_nothing(exact: Path) -> None:
    messages = [{"role": "user", "content": "What is yield? " * 40}]
    with Model.load(exact) as plain, Model.load(exact, keep=2) as keeping:
        for _ in range(3):
            expected = "".join(plain.generate(messages, max_tokens=30, sampling=GREEDY))
            assert "".join(keeping.generate(messages, max_tokens=30, sampling=GREEDY)) == expected
            messages += [
                {"role": "assistant", "content": expected},
                {"role": "user", "content": "Go on."},
            ]


def test_text_and_tokens_as_with_the_other_backend(shipped: Path, cpu_artifact: Path) -> None:
    text = "a🙂b é 中文 <|im_start|>ünï</think>"
    with Model.load(shipped) as model, Model.load(cpu_artifact) as other:
        tokens = model.encode(text)
        assert tokens == other.encode(text)
        assert model.decode(tokens) == other.decode(tokens)
        pieces, expected = (
            [stream.decode(token) for token in tokens]
            for stream in (m._backend.tokenizer.create_stream() for m in (model, other))
        )
        assert "".join(pieces) == "".join(expected)
        assert "🙂" in pieces and "中" in pieces


def test_guidance(shipped: Path) -> None:
    with Model.load(shipped) as model:
        guidance = Guidance("regex", "(yes|no)")
        assert "".join(model.generate("Is it?", guidance=guidance, sampling=GREEDY)) in ("yes", "no")
        schema = Guidance("json_schema", json.dumps({"type": "object", "properties": {}}))
        answer = "".join(model.generate("Is it?", guidance=schema, max_tokens=40, sampling=GREEDY))
        assert answer.lstrip().startswith("{")
        with pytest.raises(UserError, match="takes no llguidance grammar"):
            model.generate("Is it?", guidance=Guidance("lark_grammar", 'start: "a"'))
        with pytest.raises(UserError, match=r"the guidance is not valid: .*Unsupported type"):
            model.generate("Is it?", guidance=Guidance("json_schema", '{"type": "nope"}'))
        assert "".join(model.generate("Is it?", guidance=guidance, sampling=GREEDY)) in ("yes", "no")


def test_refused(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for provider, message in {
        "gpu": "OpenVINO finds no GPU on this machine, only CPU",
        "npu": "OpenVINO finds no NPU on this machine, only CPU",
        "cuda": "no OpenVINO device 'cuda': there are auto, cpu, gpu, npu",
    }.items():
        with pytest.raises(UserError, match=message):
            Model.load(shipped, provider=provider)
    monkeypatch.setattr("qwen_runtime.backends.openvino.version", lambda _: "2025.4.0")
    with pytest.raises(
        UserError, match=r"was made with OpenVINO 20\d\d\.\d.*, and this is 2025.4.0: install"
    ):
        Model.load(shipped)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "openvino_genai", None)
    with pytest.raises(UserError, match=r"needs OpenVINO: pip install 'qwen-edge\[openvino\]'"):
        Model.load(shipped)


def test_a_torchvision_for_another_pytorch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(UserError, match=r"another PyTorch .*nms.*: pip uninstall torchvision"):
        make_artifact(TINY, exact_profile(), tmp_path / "artifact")


def test_each_backend_imports_its_own_library_only(exact: Path, cpu_artifact: Path) -> None:
    program = """
import sys
from qwen_runtime import Model
with Model.load(sys.argv[1]) as model:
    "".join(model.generate("The", max_tokens=2))
print(*(name in sys.modules for name in ("openvino_genai", "onnxruntime_genai", "onnxruntime", "torch")))
"""
    for artifact, expected in (exact, "True False False False"), (cpu_artifact, "False True"):
        command = [sys.executable, "-c", program, str(artifact)]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert found.startswith(expected)
