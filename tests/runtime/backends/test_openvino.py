"""What reads and runs an OpenVINO artifact: its pipeline, its logits, `inspect`, `verify`, `bench`, images.

In an environment of its own, as the exporter's. Truth is transformers in float32.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from qwen_common.errors import BELOW_THE_BAR, UserError
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.checkpoint.tensors.tensor import float32
from qwen_export.cli import main
from qwen_profiles.schema import load_profile
from qwen_runtime import Guidance, Model, Sampling
from qwen_runtime.bench import bench
from qwen_runtime.child import child
from qwen_runtime.grammar import make_guidance
from qwen_runtime.load_options import LoadOptions
from qwen_runtime.serve.parser import AnswerParser
from qwen_runtime.tokenizer import Tokenizer
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.support.artifacts import FLOAT, make_artifact
from benchmarks.support.checkpoints import TINY, TINY_MOE, TINY_VL
from tests.checkpoints.drawings import Drawing, drawing
from tests.runtime.test_tokenizer import corpus
from tests.support.schemas import EVERY_DAY
from tests.support.threads import read_of_threads

pytestmark = pytest.mark.openvino
pytest.importorskip("openvino_genai")

GREEDY = Sampling(temperature=0)
FIRST_HELD_OUT = 1_000_000_000  # checkpoints/train.py draws from 0 on
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
TEXT = "The assert statement checks a condition. If it is false, an AssertionError is raised. " * 12


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = load_profile("intel-lunar-lake")
    update = {"weights": FLOAT, "activation_dtype": "float32", "provider_options": EXACT}
    return make_artifact(TINY, base.model_copy(update=update), tmp_path_factory.mktemp("exact") / "artifact")


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(TINY, load_profile("intel-lunar-lake"), tmp_path_factory.mktemp("int4") / "artifact")


@pytest.fixture(scope="module")
def reference() -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def test_pipeline_and_logits_are_those_of_transformers(exact: Path, reference: AutoModelForCausalLM) -> None:
    """What the paged pipeline finds likely, and what the same IR shows when plain OpenVINO runs it."""
    with Model.load(exact) as model:
        assert model.scores_apart
        ids = model.encode(TEXT)[:150]
        with torch.no_grad():
            expected = torch.log_softmax(reference(torch.tensor([ids])).logits[0], -1).numpy()
        found = model.logprobs(ids)
        np.testing.assert_allclose(found, expected[np.arange(len(ids) - 1), ids[1:]], atol=2e-3)
        logits = np.stack(list(model.score(ids, 140)))
    shown = torch.log_softmax(torch.from_numpy(logits), -1).numpy()
    np.testing.assert_allclose(shown, expected[139:], atol=2e-3)


@pytest.mark.parametrize("name", EVERY_DAY)
def test_schemas_of_every_day(shipped: Path, name: str) -> None:
    """xgrammar refuses some of their patterns, tuples and bounds, but not what is given to it of them."""
    with Model.load(shipped) as model:
        guidance = make_guidance(thinking=False, schema=EVERY_DAY[name])
        answer = model.generate("JSON:", max_tokens=40, sampling=GREEDY, guidance=guidance)
        assert answer.run().startswith("{") and len(answer.tokens) > 1


def test_logprobs_and_bias(exact: Path) -> None:
    with Model.load(exact) as model:
        plain = model.generate("The", max_tokens=12, sampling=GREEDY)
        text = "".join(plain)
        told = model.generate("The", max_tokens=12, sampling=GREEDY, logprobs=3)
        assert "".join(told) == text and len(told.logprobs) == len(told.tokens)
        for entry in told.logprobs:
            assert entry.top[0][:2] == (entry.text, entry.logprob) and len(entry.top) == 3
        first = plain.tokens[0]
        without = model.generate(
            "The", max_tokens=12, sampling=Sampling(temperature=0, logit_bias={first: -100})
        )
        assert "".join(without) and first not in without.tokens
        drawn = [
            "".join(
                model.generate("The", max_tokens=12, sampling=Sampling(temperature=1, seed=seed), logprobs=0)
            )
            for seed in (1, 1, 2)
        ]
        assert drawn[0] == drawn[1] != drawn[2]
        with pytest.raises(UserError, match="an answer has guidance, or logprobs"):
            model.generate("The", guidance=Guidance("regex", "a+"), logprobs=0)


@pytest.mark.parametrize("checkpoint", [TINY, TINY_MOE, TINY_VL], ids=lambda path: path.name)
def test_inspect_says_what_is_stored(checkpoint: Path, tmp_path: Path) -> None:
    artifact = make_artifact(checkpoint, load_profile("intel-lunar-lake"), tmp_path / "artifact")
    result = CliRunner().invoke(main, ["inspect", str(artifact), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert {role: entry["bytes"] for role, entry in found["roles"].items()} == manifest["bytes_by_role"]
    body = "experts" if checkpoint == TINY_MOE else "mlp"
    assert found["roles"][body]["precision"].startswith("int4") and found["stored"][body].keys() == {"u4"}
    assert found["roles"]["attention"]["precision"] == "int8, one scale a row, zero points"
    assert found["stored"]["attention"].keys() == {"u8"}
    assert found["devices"]["cpu"]["runs"] and not found["devices"]["npu"]["runs"]
    assert "one scale a row" in CliRunner().invoke(main, ["inspect", str(artifact)]).stdout

    from qwen_export.backends.openvino.stored import artifact_weights

    source = Checkpoint.open(str(checkpoint))
    specs = source.config.tensors()
    tensors = artifact_weights(artifact, source.config, specs).tensors
    named = {name for name, spec in specs.items() if len(spec.shape) > 1 and "conv1d" not in name}
    assert named - tensors.keys() <= {
        name for name in named if name.endswith("gate.weight")
    }  # never stored low
    for name, tensor in tensors.items():
        rows = tensor.shape[0]
        expected, read = float32(source.tensors[name].read(0, rows)), tensor.read(0, rows)
        bits = {"mlp": 0.1, "experts": 0.1}.get(tensor.role, 0.01)
        assert np.linalg.norm(read - expected) < bits * np.linalg.norm(expected), name
        np.testing.assert_array_equal(tensor.read(rows // 2, rows), read[rows // 2 :])


def test_export_is_verified(tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    command = ["--profile", "intel-lunar-lake", str(TINY), "-o", str(output), "--json"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)["verification"]
    assert report["passed"] and report["run"]["provider"] == "openvino-cpu"
    assert report["weights"]["kl_divergence"] == pytest.approx(report["run"]["kl_divergence"], rel=0.05)
    assert report["run"]["answering_perplexity"] == pytest.approx(report["run"]["perplexity"], rel=0.01)
    costs = {role["role"]: role["kl_divergence"] or 0 for role in report["roles"]}
    assert max(costs, key=costs.__getitem__) == "mlp"
    assert "shows no logits" in (output / "REPORT.md").read_text()
    assert f"{report['run']['kl_divergence']:.4f}" in (output / "README.md").read_text()
    Model.load(output, verify=True).close()


def test_a_damaged_checkpoint_fails(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(TINY, damaged)
    weights = load_file(damaged / "model.safetensors")
    for name, weight in weights.items():
        if "layers.5." in name and weight.ndim == 2:
            weights[name] = (weight.astype(np.float32) * 30).astype(weight.dtype)
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    artifact = make_artifact(damaged, load_profile("intel-lunar-lake"), tmp_path / "artifact")
    result = CliRunner().invoke(main, ["verify", str(artifact), "--against", str(TINY), "--tokens", "256"])
    assert result.exit_code == BELOW_THE_BAR, result.output
    report = json.loads((artifact / "report.json").read_text())
    assert report["findings"][0].startswith("Layer 5 is not the checkpoint's")


WEATHER = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {
            "unit": {"enum": ["C", "F"]},
            "days": {"type": "integer", "enum": [1, 2, 3]},
            "precise": {"type": "boolean"},
        },
        "required": ["unit", "days"],
    },
}


def test_forced_calls(shipped: Path) -> None:
    """Arguments that leave the model no room to write on, taken apart by the server's parser."""
    tools = [{"type": "function", "function": WEATHER}]
    messages = [{"role": "user", "content": "Weather?"}]
    with Model.load(shipped) as model:
        for seed in range(3):
            guidance = make_guidance(thinking=False, tools=tools, several=False)
            options = {"max_tokens": 400, "sampling": Sampling(temperature=1.0, seed=seed)}
            answer = "".join(model.generate(messages, tools=tools, guidance=guidance, **options))
            parser = AnswerParser(False, tools)
            parser.feed(answer)
            parser.finish()
            (call,) = parser.message["tool_calls"]
            arguments = json.loads(call["function"]["arguments"])
            assert call["function"]["name"] == "weather"
            assert arguments["unit"] in ("C", "F") and arguments["days"] in (1, 2, 3)
            assert arguments.keys() <= {"unit", "days", "precise"}
        guidance = make_guidance(thinking=True, tools=tools)
        begun = "".join(model.generate("Hm.", guidance=guidance, max_tokens=30, sampling=GREEDY))
        assert "<tool_call>" not in begun.partition("</think>")[0]


def test_forced_calls_of_schemas_in_parts(shipped: Path) -> None:
    node = {
        "properties": {"value": {"const": 1}, "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"const": None}]}},
        "required": ["value", "next"],
        "additionalProperties": False,
        "type": "object",
    }
    choices = {"additionalProperties": {"enum": ["km", "mi"]}, "maxProperties": 1, "type": "object"}
    parts = {"allOf": [{"properties": {"a": {"const": "x"}}, "required": ["a"]}]}
    for parameters, names in ({"$ref": "#/$defs/Node", "$defs": {"Node": node}}, 2), (choices, 1), (parts, 1):
        tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
        guidance = make_guidance(thinking=False, tools=tools, several=False)
        with Model.load(shipped) as model:
            options = {"max_tokens": 400, "sampling": Sampling(temperature=1.0, seed=1)}
            answer = "".join(model.generate("Go.", tools=tools, guidance=guidance, **options))
        parser = AnswerParser(False, tools)
        parser.feed(answer)
        parser.finish()
        (call,) = parser.message["tool_calls"]
        if answer.endswith("</tool_call>"):
            assert len(json.loads(call["function"]["arguments"])) == names
        else:  # deep in a model that refers to itself
            assert len(call["function"]["arguments"]) > 10


def test_bench(shipped: Path) -> None:
    found = bench(shipped, contexts=[64], tokens=4, rounds=1)
    assert found.provider == "openvino-cpu"
    (point,) = found.points
    assert point.context == 64 and point.prefill_rate > 0 and point.decode_rate > 0


def asking(item: Drawing, *more: Drawing) -> list[dict]:
    images = [{"type": "image", "image": drawn.image} for drawn in (*more, item)]
    return [{"role": "user", "content": [*images, {"type": "text", "text": item.question}]}]


def test_the_pipelines_own_tokenizer(shipped: Path) -> None:
    """Artifacts that see hand it text: normalised text, for which it gives the ids of tokenizer.json."""
    import openvino_genai

    own, tokenizer = openvino_genai.Tokenizer(shipped), Tokenizer.open(shipped)
    for text in filter(None, corpus()):
        ids = tokenizer.encode(text)
        normalised = tokenizer.decode(ids, special=True)
        assert own.encode(normalised, add_special_tokens=False).input_ids.data[0].tolist() == ids, repr(text)


def working_threads(model: Model) -> int:
    """Threads that computed for an answer, once all had been started."""

    def nanoseconds() -> dict[int, int]:
        return {thread: int(text.split()[0]) for thread, text in read_of_threads("schedstat")}

    list(model.generate(TEXT, max_tokens=8))
    before = nanoseconds()
    list(model.generate(TEXT[::-1], max_tokens=8))
    spent = {thread: time - before.get(thread, 0) for thread, time in nanoseconds().items()}
    return sum(time > 0.1 * max(spent.values()) for time in spent.values())


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or (os.cpu_count() or 1) < 2, reason="counts in /proc"
)
def test_threads(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_INTRA_OP_NUM_THREADS", "1")  # not OpenVINO's
    for asked, working in (None, 2), ("1", 1):
        with child(shipped, LoadOptions("cpu", threads=asked)) as model:
            assert model.loaded.info.threads is not None and not model.loaded.info.threads.processors
            found = model.call(working_threads)
            assert found == working or (asked is None and found > working)


def test_images(tmp_path: Path) -> None:
    """Held-out drawings, as shipped: what only the picture tells. transformers has 95 of 100 right."""
    artifact = make_artifact(TINY_VL, load_profile("intel-lunar-lake"), tmp_path / "artifact")
    items = [drawing(FIRST_HELD_OUT + index) for index in range(20)]
    options = {"max_tokens": 12, "sampling": GREEDY}
    with Model.load(artifact) as model:
        assert model.info.images
        answers = ["".join(model.generate(asking(item), **options)) for item in items]
        assert sum(found == item.answer for found, item in zip(answers, items, strict=True)) >= 18
        assert "".join(model.generate(asking(items[0], items[1]), **options))
        text = "".join(model.generate([{"role": "user", "content": "What is assert?"}], **options))
        assert text and text not in answers
        assert "".join(model.generate(asking(items[2]), **options)) == answers[2]
        with pytest.raises(UserError, match="takes images, or logprobs"):
            model.generate(asking(items[0]), logprobs=1)
        with pytest.raises(UserError, match="<ov_genai_ written in it"):
            parts = [*asking(items[0])[0]["content"], {"type": "text", "text": "<ov_genai_image_0>"}]
            model.generate([{"role": "user", "content": parts}])
