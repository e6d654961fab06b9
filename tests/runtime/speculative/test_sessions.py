"""The graphs against PyTorch, and exact speculative decoding against ONNX Runtime GenAI's own answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.export import export
from qwen_profiles.schema import Profile, load_profile
from qwen_runtime import Model, Sampling
from qwen_runtime.speculative.drafts import Head
from qwen_runtime.speculative.sessions import StatefulSession, exact_rows, zeros
from safetensors.torch import load_file, save_file

from benchmarks.support.artifacts import Quiet, float_profile, make_artifact
from benchmarks.support.checkpoints import TINY, TRAINED_HEAD
from benchmarks.support.mtp import with_head
from benchmarks.support.session import cosine
from tests.support.mtp import MtpHead
from tests.support.random_checkpoints import random_model, write_random_checkpoint

GREEDY = Sampling(temperature=0)
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {"vocab_size": 2048},
    "dense, untied": {"vocab_size": 2048, "tie_word_embeddings": False},
    "mixture of experts": {"vocab_size": 2048, "num_experts": 8},
    "full attention alone": {
        "vocab_size": 2048,
        "num_hidden_layers": 2,
        "layer_types": ["full_attention"] * 2,
    },
}
PROMPTS = [
    "The",
    "A class definition is",
    "def f(x):\n    return",
    "Explain numbers.",
    "The global statement",
    "import os\n\n",
    "What is yield?",
    "Strings are immutable sequences of",
]


def random_head(model, seed: int = 5) -> MtpHead:
    """A head in which no weight keeps its trivial initial value."""
    torch.manual_seed(seed)
    head = MtpHead(model).eval()
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(0.0, 0.2)
            else:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
    return head


def named(head: MtpHead) -> dict[str, torch.Tensor]:
    return {f"mtp.{name}": value.contiguous() for name, value in head.state_dict().items()}


def with_mtp(profile: Profile) -> Profile:
    return profile.model_copy(update={"mtp": True})


@pytest.fixture(scope="module", params=SHAPES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """transformers' model, a head for it, and the checkpoint folder of both."""
    folder = tmp_path_factory.mktemp("checkpoint")
    shape = SHAPES[request.param]
    write_random_checkpoint(folder / "body", **shape)
    model = random_model(**shape)
    head = random_head(model)
    return model, head, with_head(folder / "body", named(head), folder / "whole")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained checkpoint with its trained head."""
    return with_head(TINY, load_file(TRAINED_HEAD), tmp_path_factory.mktemp("trained") / "tiny-dense")


@pytest.fixture(scope="module")
def trained_artifact(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As it ships: INT4 and INT8 weights, activations quantised to INT8."""
    return make_artifact(trained, load_profile("cpu"), tmp_path_factory.mktemp("artifact") / "cpu", False)


def run(artifact: Path, file: str, capacity: int = 600) -> StatefulSession:
    session = ort.InferenceSession(artifact / file, providers=["CPUExecutionProvider"])
    rows = exact_rows(session) if file == "pairs.onnx" else {}
    return StatefulSession(session, zeros(session, capacity), inputs=rows)


def test_head_and_hidden_states_agree_with_pytorch(case, tmp_path: Path) -> None:
    """A prompt in pieces: the model's hidden states, and the head's logits; and the same in pairs."""
    model, head, checkpoint = case
    artifact = make_artifact(checkpoint, with_mtp(float_profile("fused")), tmp_path / "out")
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, 41)
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor(ids[None, :-1])).last_hidden_state
        logits = model.lm_head(hidden).numpy()
        guesses = head(model, torch.tensor(ids[None, 1:]), hidden).numpy()
    for file, ends in ("model.onnx", (1, 20, 21, 23, 40)), ("pairs.onnx", range(2, 41, 2)):
        decoder, mtp = run(artifact, file), run(artifact, "mtp.onnx")
        start = 0
        for end in ends:
            found = decoder(ids[start:end].tolist())
            decoder.keep(end - start)
            assert cosine(found["hidden_states"], hidden[:, start:end].numpy()).min() > 0.99999
            assert cosine(found["logits"], logits[:, start:end]).min() > 0.99999
            guessed = mtp(ids[start + 1 : end + 1].tolist(), hidden_states=found["hidden_states"])["logits"]
            mtp.keep(end - start)
            assert cosine(guessed, guesses[:, end - 1 : end]).min() > 0.99999
            start = end


def test_the_head_drafts_several_tokens_by_its_own_states(case, tmp_path: Path) -> None:
    """After drafts of which nothing, something or all was right: each is that of PyTorch, which has no keys
    and values to cut back."""
    model, mtp, checkpoint = case
    artifact = make_artifact(checkpoint, with_mtp(float_profile("fused")), tmp_path / "out", False)
    ids = torch.tensor(np.random.default_rng(1).integers(0, model.config.vocab_size, (1, 30)))
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state
        session = ort.InferenceSession(artifact / "mtp.onnx", providers=["CPUExecutionProvider"])
        head, seen, compared = Head(session, 40), 0, 0
        for end, count in ((4, 3), (5, 3), (6, 1), (8, 2), (12, 3), (29, 3)):
            head.saw(ids[0, seen:end].tolist(), hidden[:, seen:end].numpy())
            seen = end
            expected, margin = mtp.guesses(model, ids[:, 1 : end + 1], hidden[:, :end], count)
            found = head.draft(int(ids[0, end]), count)
            assert found is not None
            if margin > 1e-3:
                assert list(found.tokens) == expected
                compared += 1
        assert compared >= 5


def test_tokens_that_were_taken_back_leave_no_trace(case, tmp_path: Path) -> None:
    """Runs of several tokens, of which the first ones are kept, against one run of all."""
    model, _, checkpoint = case
    artifact = make_artifact(checkpoint, with_mtp(float_profile("fused")), tmp_path / "out")
    random = np.random.default_rng(3)
    ids = random.integers(0, model.config.vocab_size, 40).tolist()
    has_states = "linear_attention" in model.config.layer_types  # else there is nothing to settle
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    several, at = run(artifact, "speculative.onnx"), 0
    while at < len(ids):
        kept, wrong = (int(random.integers(1, 5)), random.integers(0, 9, int(random.integers(0, 4))).tolist())
        right = ids[at : at + kept]
        settle = not wrong and bool(random.integers(0, 2))
        found = several([*right, *wrong], settle=settle)["logits"][0]
        if not settle:
            several.keep(len(right))
        assert several.pending is (has_states and not settle)
        assert cosine(found[: len(right)], expected[at : at + len(right)]).min() > 0.99999
        at += len(right)


def test_a_wrong_guess_leaves_no_trace(case, tmp_path: Path) -> None:
    model, _, checkpoint = case
    artifact = make_artifact(checkpoint, with_mtp(float_profile("fused")), tmp_path / "out")
    ids = np.random.default_rng(2).integers(0, model.config.vocab_size, 30).tolist()
    straight, astray = run(artifact, "pairs.onnx"), run(artifact, "pairs.onnx")
    for at in range(0, 30, 2):
        expected = straight(ids[at : at + 2])
        straight.keep(2)
        for row in (0, 1):
            astray([1, 2])  # dropped as a whole
            found = astray([ids[at + row], 3])
            astray.keep(1)
            for name, value in expected.items():
                np.testing.assert_array_equal(value[:, row], found[name][:, 0])


@pytest.fixture(scope="module", params=["trained", *SHAPES])
def shipped(request: pytest.FixtureRequest, trained_artifact: Path, tmp_path_factory) -> Path:
    """Profile cpu as it ships, which quantises activations to INT8."""
    if request.param == "trained":
        return trained_artifact
    folder = tmp_path_factory.mktemp("shipped")
    shape = SHAPES[request.param]
    write_random_checkpoint(folder / "body", **shape)
    checkpoint = with_head(folder / "body", named(random_head(random_model(**shape))), folder / "whole")
    return make_artifact(checkpoint, load_profile("cpu"), folder / "cpu", False)


def test_pairs_have_the_bits_of_single_tokens(shipped: Path) -> None:
    """Every logit of a run of two tokens is that of ONNX Runtime GenAI's runs of one."""
    with Model.load(shipped) as model:
        ids = model.encode("The global statement is a declaration which holds for the entire code block.")
        expected = list(model.score(ids, 1))
    pairs = run(shipped, "pairs.onnx")
    assert len(expected) == len(ids) > 10
    for at in range(0, len(ids) - 1, 2):
        found = pairs(ids[at : at + 2])["logits"][0]
        pairs.keep(2)
        np.testing.assert_array_equal(found, expected[at : at + 2])


def test_rows_are_taken_apart_where_a_kernel_rounds_them_otherwise(trained_artifact: Path) -> None:
    """What `exact_rows` finds holds, and what it leaves apart would not have."""
    session = ort.InferenceSession(trained_artifact / "pairs.onnx", providers=["CPUExecutionProvider"])
    rows = exact_rows(session)
    assert set(rows) == {"rows.int4.32", "rows.int8.128", "rows.float"}

    def outcome(rows: dict[str, np.ndarray]) -> np.ndarray:
        return StatefulSession(session, zeros(session, 2), inputs=rows)([7, 8])["logits"]

    apart = outcome(dict.fromkeys(rows, np.array([1, 1])))
    np.testing.assert_array_equal(outcome(rows), apart)
    for name, counts in rows.items():
        if counts.tolist() == [1, 1]:
            assert not np.array_equal(outcome(rows | {name: np.array([2, 0])}), apart), name


def test_the_ordinary_graph_and_its_weights_are_untouched(trained_artifact: Path, cpu_artifact: Path) -> None:
    """It tells its hidden states, and else is the same. The head's weights come after all others, and the
    four graphs share one file."""
    told, plain = (
        onnx.load(artifact / "model.onnx", load_external_data=False).graph
        for artifact in (trained_artifact, cpu_artifact)
    )
    assert [output.name for output in told.output if output.name != "hidden_states"] == [
        output.name for output in plain.output
    ]
    names = {
        told_name: plain_name
        for one, other in zip(told.node, plain.node, strict=True)
        for told_name, plain_name in zip(one.output, other.output, strict=True)
    }
    assert [told_name for told_name, name in names.items() if told_name != name] == ["hidden_states"]
    for one, other in zip(told.node, plain.node, strict=True):
        one.input[:] = [names.get(name, name) for name in one.input]
        one.output[:] = [names[name] for name in one.output]
        assert one == other
    ours = (trained_artifact / "model.onnx.data").read_bytes()
    plain = (cpu_artifact / "model.onnx.data").read_bytes()
    assert ours[: len(plain)] == plain
    head = sum(value.numel() for value in load_file(TRAINED_HEAD).values())
    assert len(plain) < len(ours) < len(plain) + 1.2 * head  # one byte for each weight, and scales
    assert not (cpu_artifact / "mtp.onnx").exists()
    assert (cpu_artifact / "speculative.onnx").exists()


def notes(checkpoint: Path, profile: Profile, output: Path) -> list[str]:
    """Of an export within the checkpoint's context, of which there would be a note too."""
    quiet = Quiet()
    profile = profile.model_copy(update={"context_length": 2048})
    export(Checkpoint.open(str(checkpoint)), profile, output, quiet)
    assert not (output / "mtp.onnx").exists()
    return quiet.notes


def test_dropped_with_a_line_where_it_cannot_be_used(trained: Path, tmp_path: Path) -> None:
    assert notes(trained, load_profile("strix-halo"), tmp_path / "portable") == [
        "no MTP head to draft tokens: profile strix-halo's runtime cannot use it"
    ]
    assert notes(TINY, load_profile("cpu"), tmp_path / "none") == []


def test_dropped_with_a_line_where_it_is_incomplete(trained: Path, tmp_path: Path) -> None:
    tensors = load_file(TRAINED_HEAD)
    del tensors["mtp.norm.weight"]
    folder = with_head(TINY, tensors, tmp_path / "incomplete")
    (note,) = notes(folder, load_profile("cpu"), tmp_path / "out")
    assert "no tensor mtp.norm.weight" in note
    config = json.loads((folder / "config.json").read_text())
    save_file(load_file(TRAINED_HEAD), folder / "model-00002-of-00002.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"mtp_num_hidden_layers": 2}))
    (note,) = notes(folder, load_profile("cpu"), tmp_path / "deep")
    assert "not one layer" in note
