"""Vision-language artifacts against transformers in float32, both lowerings: features, logits, tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import onnxruntime_genai as og
import pytest
import torch
from click.testing import CliRunner
from qwen_export.backends.onnx.graphs import build_graphs
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.cli import main
from qwen_profiles.schema import load_profile

from benchmarks.support.artifacts import float_profile, make_artifact
from benchmarks.support.session import cosine
from tests.support.random_checkpoints import VISION_TOKENS, random_vision_model, write_vision_checkpoint

LOWERINGS = ("fused", "portable")
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {},
    "untied, wide heads, one block": {
        "tie_word_embeddings": False,
        "vision": {"depth": 1, "hidden_size": 80, "num_heads": 2, "num_position_embeddings": 16},
    },
    "mixture of experts": {"num_experts": 8},
}
NEW_TOKENS = 16


@pytest.fixture(scope="module", params=SHAPES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A checkpoint folder and transformers' float32 model of it."""
    folder = write_vision_checkpoint(tmp_path_factory.mktemp("checkpoint"), **SHAPES[request.param])
    return folder, random_vision_model(**SHAPES[request.param])


@pytest.fixture(scope="module", params=LOWERINGS)
def artifact(request: pytest.FixtureRequest, case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("artifact") / "float"
    return make_artifact(case[0], float_profile(request.param), output, all_logits=False)


def session(artifact: Path, name: str) -> ort.InferenceSession:
    return ort.InferenceSession(artifact / name, providers=["CPUExecutionProvider"])


def patches(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, height, width]).normal(size=(height * width, 96)).astype(np.float32)


def reference_features(model, values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        found = model.model.get_image_features(torch.tensor(values), torch.tensor(grid)).pooler_output
    return torch.cat(found).numpy()


@pytest.mark.parametrize(
    "height, width", [(8, 8), (4, 20), (22, 6), (2, 2), (2, 40), (14, 14)], ids=lambda side: str(side)
)
def test_image_features(case, artifact: Path, height: int, width: int) -> None:
    """Square, wide and tall, smaller and larger than the square of position embeddings."""
    values, grid = patches(height, width), np.array([[1, height, width]])
    (found,) = session(artifact, "vision.onnx").run(None, {"pixel_values": values, "image_grid_thw": grid})
    expected = reference_features(case[1], values, grid)
    assert found.shape == expected.shape == (height * width // 4, case[1].config.text_config.hidden_size)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_features_of_images_of_one_size(case, artifact: Path) -> None:
    """ONNX Runtime GenAI gives these to the vision tower in one run."""
    values, grid = np.concatenate([patches(6, 10, seed) for seed in range(3)]), np.array([[1, 6, 10]] * 3)
    (found,) = session(artifact, "vision.onnx").run(None, {"pixel_values": values, "image_grid_thw": grid})
    np.testing.assert_allclose(found, reference_features(case[1], values, grid), atol=1e-4)


def test_embedding_takes_features_in_order(case, artifact: Path) -> None:
    image, hidden = VISION_TOKENS["image_token_id"], case[1].config.text_config.hidden_size
    features = np.random.default_rng(0).normal(size=(3, hidden)).astype(np.float32)
    ids = np.array([[5, image, image, 6, image, image, 7]])
    (found,) = session(artifact, "embedding.onnx").run(None, {"input_ids": ids, "image_features": features})
    expected = case[1].model.language_model.embed_tokens(torch.tensor(ids)).detach().numpy()
    expected[0, [1, 2, 4]] = features  # and the last image token, for which there is none, stays a token
    np.testing.assert_allclose(found, expected, atol=1e-6)


def prompt_of(sizes: list[tuple[int, int]], text: int = 9) -> tuple[list[int], dict[str, np.ndarray]]:
    """Random token ids around images of `sizes` in patches, and GenAI's inputs for them."""
    generator = np.random.default_rng(1)
    ids = generator.integers(0, 2000, text).tolist()
    for height, width in sizes:
        ids += [VISION_TOKENS["vision_start_token_id"]]
        ids += [VISION_TOKENS["image_token_id"]] * (height * width // 4)
        ids += [VISION_TOKENS["vision_end_token_id"], *generator.integers(0, 2000, text).tolist()]
    if not sizes:
        return ids, {}
    return ids, {
        "input_ids": np.array([ids], np.int32),
        "pixel_values": np.concatenate([patches(*size, seed) for seed, size in enumerate(sizes)]),
        "image_grid_thw": np.array([[1, *size] for size in sizes], np.int64),
        "num_image_tokens": np.array([sum(h * w // 4 for h, w in sizes)], np.int64),
    }


def genai_model(artifact: Path) -> og.Model:
    config = og.Config(str(artifact))
    config.clear_providers()
    return og.Model(config)


def through_genai(
    model: og.Model, ids: list[int], inputs: dict[str, np.ndarray]
) -> tuple[np.ndarray, list[int]]:
    """The first logits after the prompt, and greedy tokens."""
    parameters = og.GeneratorParams(model)
    length = len(ids) + NEW_TOKENS
    parameters.set_search_options(do_sample=False, min_length=length, max_length=length)
    generator = og.Generator(model, parameters)
    if inputs:
        tensors = og.NamedTensors()
        for name, value in inputs.items():
            tensors[name] = value
        generator.set_inputs(tensors)
    else:
        generator.append_tokens(np.array(ids, np.int32))
    logits = generator.get_logits()[0, -1]
    for _ in range(NEW_TOKENS):
        generator.generate_next_token()
    return logits, generator.get_sequence(0)[len(ids) :].tolist()


def through_transformers(
    model, ids: list[int], inputs: dict[str, np.ndarray]
) -> tuple[np.ndarray, list[int]]:
    tensors = {name: torch.tensor(inputs[name]) for name in inputs if name.startswith(("pixel", "image"))}
    if tensors:
        is_image = np.array([ids]) == VISION_TOKENS["image_token_id"]
        tensors["mm_token_type_ids"] = torch.tensor(is_image.astype(np.int64))
    with torch.no_grad():
        found = model.generate(
            torch.tensor([ids]),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            **tensors,
        )
    return found.logits[0][0].numpy(), found.sequences[0, len(ids) :].tolist()


PROMPTS = {
    "square": [(8, 8)],
    "wide": [(4, 30)],
    "tall": [(26, 6)],
    "longer than a chunk": [(18, 20)],
    "two of one size": [(8, 8), (8, 8)],
    "two sizes": [(6, 12), (10, 4)],
    "three sizes": [(12, 12), (2, 30), (2, 2)],
    "text only": [],
}


def test_answers_with_images(case, artifact: Path) -> None:
    """Logits after the prompt and greedy tokens, through ONNX Runtime GenAI."""
    model = genai_model(artifact)
    for name, sizes in PROMPTS.items():
        ids, inputs = prompt_of(sizes)
        (logits, tokens), (expected, expected_tokens) = (
            through_genai(model, ids, inputs),
            through_transformers(case[1], ids, inputs),
        )
        assert cosine(logits, expected) > 0.99999, name
        assert tokens == expected_tokens, name


def test_text_longer_than_a_chunk_and_pad_tokens_in_it(case, artifact: Path) -> None:
    """GenAI's Qwen pipeline would mask pad tokens; they are what <|endoftext|> in a text becomes."""
    ids, _ = prompt_of([], text=150)
    ids[70] = ids[3] = case[1].config.text_config.pad_token_id
    logits, tokens = through_genai(genai_model(artifact), ids, {})
    expected, expected_tokens = through_transformers(case[1], ids, {})
    assert cosine(logits, expected) > 0.99999
    assert tokens == expected_tokens


@pytest.mark.parametrize("profile", ["cpu", "strix-halo"])
def test_shipped_recipes_keep_the_features(profile: str, tmp_path: Path) -> None:
    """INT8 and float16 towers, as the profiles say."""
    checkpoint = write_vision_checkpoint(tmp_path / "checkpoint")
    artifact = make_artifact(checkpoint, load_profile(profile), tmp_path / "artifact")
    values, grid = patches(8, 12), np.array([[1, 8, 12]])
    (found,) = session(artifact, "vision.onnx").run(None, {"pixel_values": values, "image_grid_thw": grid})
    expected = reference_features(random_vision_model(), values, grid)
    assert cosine(found, expected).min() > {"cpu": 0.995, "strix-halo": 0.99999}[profile]


def test_weights_are_stored_once(tmp_path: Path) -> None:
    """A tied embedding is in the decoder's graph and in the embedding model's, at the same place."""
    checkpoint = write_vision_checkpoint(tmp_path / "checkpoint")
    artifact = make_artifact(checkpoint, load_profile("cpu"), tmp_path / "artifact")
    graphs = [
        onnx.load(artifact / name, load_external_data=False).graph
        for name in ("model.onnx", "embedding.onnx")
    ]
    places = [
        {tensor.name: str(tensor.external_data) for tensor in graph.initializer if tensor.external_data}
        for graph in graphs
    ]
    assert places[1]
    assert places[1].items() <= places[0].items()


def test_text_only_export_is_a_text_artifact(tmp_path: Path) -> None:
    checkpoint = write_vision_checkpoint(tmp_path / "checkpoint")
    graphs = build_graphs(Checkpoint.open(str(checkpoint), text_only=True), load_profile("cpu"))
    assert not {"vision.onnx", "embedding.onnx"} & graphs.by_file.keys()
    assert "vision" not in graphs.bytes_by_role()
    whole = build_graphs(Checkpoint.open(str(checkpoint)), load_profile("cpu"))
    assert {"vision.onnx", "embedding.onnx"} < whole.by_file.keys()
    assert whole.bytes_by_role()["vision"] > 0


def test_text_only_at_the_command(tmp_path: Path) -> None:
    checkpoint = write_vision_checkpoint(tmp_path / "checkpoint")
    arguments = [
        "--profile",
        "cpu",
        str(checkpoint),
        "-o",
        str(tmp_path / "out"),
        "--text-only",
        "--json",
        "--no-verify",
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0
    manifest = json.loads(result.stdout)
    assert manifest["model"]["model_type"] == "qwen3_5_text"
    assert not {"vision.onnx", "embedding.onnx", "processor_config.json"} & manifest["files"].keys()
    logits, _ = through_genai(genai_model(tmp_path / "out"), [5, 6, 7], {})
    assert logits.shape == (2048,)
