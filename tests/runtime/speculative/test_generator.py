"""Speculative answers against plain decoding: to the bit where they are exact, else in distribution."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from PIL import Image
from qwen_common.errors import UserError
from qwen_profiles.schema import load_profile
from qwen_runtime import Generation, Model, Sampling
from qwen_runtime.backends.ort import Ort
from qwen_runtime.grammar import make_guidance
from qwen_runtime.guidance import Guidance
from qwen_runtime.prefill import append
from qwen_runtime.speculative import Speculative
from qwen_runtime.speculative.generator import SpeculativeOrt
from qwen_runtime.speculative.switch import Switch
from qwen_runtime.states import StateSettings
from safetensors.torch import load_file

from benchmarks.support.artifacts import float_profile, make_artifact
from benchmarks.support.checkpoints import TINY, TRAINED_HEAD
from benchmarks.support.mtp import with_head
from tests.runtime.speculative.test_sessions import SHAPES, named, random_head, with_mtp
from tests.support.random_checkpoints import random_model, write_random_checkpoint, write_vision_checkpoint

GREEDY = Sampling(temperature=0)
PROMPTS = [
    "The",
    "def f(x):\n    return",
    "Explain numbers.",
    "import os\n\n",
    "What is yield?",
    "Strings are immutable sequences of",
]
REPEATED = "The global statement is a declaration which holds for the entire code block. " * 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained checkpoint with its trained head, as it ships: INT4 and INT8, INT8 activations."""
    folder = tmp_path_factory.mktemp("trained")
    checkpoint = with_head(TINY, load_file(TRAINED_HEAD), folder / "tiny-dense")
    return make_artifact(checkpoint, load_profile("cpu"), folder / "cpu", False)


@contextmanager
def checking(artifact: Path, how: Speculative, **options: Any) -> Iterator[Model]:
    """A model that checks every draft, whether it pays or not."""
    with Model.load(artifact, speculative=how, **options) as model:
        backend = model._backend
        assert isinstance(backend, SpeculativeOrt)
        backend.switch = Switch(backend.sessions.most, always=True)
        yield model


def assert_same(plain: Model, model: Model, prompt: Any, tokens: int, **options: Any) -> Generation:
    """Both answers are the same; returns the speculative one."""
    options = {"max_tokens": tokens, "sampling": GREEDY, **options}
    expected, found = plain.generate(prompt, **options), model.generate(prompt, **options)
    assert ("".join(expected), expected.finish_reason) == ("".join(found), found.finish_reason)
    assert found.acceptance is not None and expected.acceptance is None
    assert expected.tokens == found.tokens
    return found


def assert_same_and_guessed(plain: Model, model: Model, prompts: list[str], tokens: int) -> None:
    """So is each of these, and many drafts are right."""
    drafted = accepted = 0
    for prompt in prompts:
        acceptance = assert_same(plain, model, prompt, tokens).acceptance
        assert acceptance is not None
        drafted += acceptance.drafted
        accepted += acceptance.accepted
    assert accepted > 0.2 * drafted > 0


@pytest.mark.parametrize("how", Speculative)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_greedy_output_is_the_same_with_any_drafts(
    shape: dict[str, Any], how: Speculative, tmp_path: Path
) -> None:
    """An untrained head drafts wrong nearly always: every way of going on after that is taken."""
    write_random_checkpoint(tmp_path / "body", **shape)
    checkpoint = with_head(tmp_path / "body", named(random_head(random_model(**shape))), tmp_path / "whole")
    artifact = make_artifact(checkpoint, with_mtp(float_profile("fused")), tmp_path / "out", False)
    with Model.load(artifact) as plain, checking(artifact, how) as model:
        for prompt in (PROMPTS[0], REPEATED):
            assert_same(plain, model, prompt, 40)


@pytest.mark.parametrize("how", [True, "quick"])
def test_another_way_is_refused(how: Any, cpu_artifact: Path) -> None:
    with pytest.raises(UserError, match="must be one of Speculative"):
        Model.load(cpu_artifact, speculative=how)


@pytest.mark.parametrize("how", Speculative)
def test_without_a_head(cpu_artifact: Path, how: Speculative) -> None:
    """Drafts come from the prompt and the answer alone."""
    with Model.load(cpu_artifact) as plain, checking(cpu_artifact, how) as model:
        assert_same_and_guessed(plain, model, [REPEATED], 60)


@pytest.mark.parametrize("count", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_exact_answers_are_the_same(trained: Path, count: int) -> None:
    prompts = [text.strip()[:200] for text in list(topics.values())[:count]]
    with Model.load(trained) as plain, checking(trained, Speculative.EXACT) as model:
        assert_same_and_guessed(plain, model, prompts, 60)


def test_fast_answers_are_the_same_but_for_rounding(trained: Path) -> None:
    """Where one goes another way the two best logits are as close as rounding takes them."""
    prompts = [text.strip()[:200] for text in list(topics.values())[:8]]
    same = 0
    with Model.load(trained) as plain, checking(trained, Speculative.FAST) as model:
        for prompt in prompts:
            answers = [m.generate(prompt, max_tokens=60, sampling=GREEDY) for m in (plain, model)]
            one, other = ([list(answer), answer.tokens][1] for answer in answers)
            same += one == other
            if one != other:
                at = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
                tokens = [*plain.encode(prompt), *one[:at]]
                logits = list(plain.score(tokens, len(tokens)))[-1]
                best = np.sort(logits)[-2:]
                assert best[1] - best[0] < 0.1, (prompt, at)
    assert same >= 6


SAMPLINGS = {
    "temperature": Sampling(temperature=0.8, seed=3),
    "top-k and top-p": Sampling(temperature=1.0, top_k=20, top_p=0.8, seed=4),
    "min-p": Sampling(temperature=1.2, min_p=0.1, seed=5),
    "penalties": Sampling(
        temperature=0.5, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.2, seed=6
    ),
    "bias": Sampling(temperature=0, logit_bias={300: 3.0, 301: -100.0}),
}


@pytest.mark.parametrize("case", SAMPLINGS)
def test_exact_sampling_draws_the_same_tokens(trained: Path, case: str) -> None:
    """With the same seed as plain decoding in ONNX Runtime itself, and their log probabilities."""
    with (
        Model.load(trained, states=StateSettings()) as plain,
        checking(trained, Speculative.EXACT) as model,
    ):
        accepted = 0
        for prompt in (PROMPTS[0], REPEATED):
            options = {"sampling": SAMPLINGS[case], "logprobs": 2}
            found = assert_same(plain, model, prompt, 40, **options)
            expected = plain.generate(prompt, max_tokens=40, **options)
            list(expected)
            assert expected.logprobs == found.logprobs
            assert found.acceptance is not None
            accepted += found.acceptance.accepted
        assert accepted > 3


def test_fast_sampling_has_the_models_distribution(trained: Path) -> None:
    """Three tokens, each of the three likeliest: how often each sequence is drawn against its probability by
    plain decoding's logits."""
    prompt, count, top, draws = REPEATED + "The global statement", 3, 3, 300

    def probabilities(plain: Model, tokens: list[int]) -> dict[int, float]:
        logits = list(plain.score(tokens, len(tokens)))[-1]
        likeliest = np.argsort(-logits)[:top]
        weights = np.exp((logits[likeliest] - logits[likeliest[0]]) / 1.5)
        return dict(zip(likeliest.tolist(), weights / weights.sum(), strict=True))

    with Model.load(trained) as plain:
        begin, expected = plain.encode(prompt), {(): 1.0}
        for _ in range(count):
            expected = {
                (*before, token): chance * share
                for before, chance in expected.items()
                for token, share in probabilities(plain, [*begin, *before]).items()
            }
    drawn: Counter[tuple[int, ...]] = Counter()
    with checking(trained, Speculative.FAST, keep=1) as model:
        accepted = 0
        for seed in range(draws):
            sampling = Sampling(temperature=1.5, top_k=top, top_p=1.0, seed=seed)
            answer = model.generate(prompt, max_tokens=count, sampling=sampling)
            list(answer)
            drawn[tuple(answer.tokens)] += 1
            assert answer.acceptance is not None
            accepted += answer.acceptance.accepted
    assert accepted > draws / 4
    assert drawn.keys() <= expected.keys()
    cells = [({outcome}, chance) for outcome, chance in expected.items() if chance * draws >= 5]
    seldom = expected.keys() - {outcome for outcomes, _ in cells for outcome in outcomes}
    cells.append((set(seldom), sum(expected[outcome] for outcome in seldom)))
    freedom = len(cells) - 1
    assert freedom > 8
    statistic = sum(
        (sum(drawn[outcome] for outcome in outcomes) - draws * chance) ** 2 / (draws * chance)
        for outcomes, chance in cells
    )
    # The 0.999 quantile of chi-square by Wilson and Hilferty's cube.
    spread = 2 / (9 * freedom)
    assert statistic < freedom * (1 - spread + 3.09 * spread**0.5) ** 3


@pytest.mark.parametrize("how", Speculative)
def test_guidance(trained: Path, how: Speculative) -> None:
    """What a grammar rules out is never chosen, and it need not be taken back: only chosen tokens step it."""
    guidance = Guidance("regex", r"(The global (statement|name) is [a-z ]{3,12}\. ){3}")
    with Model.load(trained, states=StateSettings()) as plain, checking(trained, how) as model:
        found = assert_same(plain, model, REPEATED, 60, guidance=guidance)
        assert found.acceptance is not None and found.acceptance.accepted


def test_what_a_grammar_forces_is_drafted(trained: Path) -> None:
    names = ["first_of_the_names", "second_of_the_names", "third_of_the_names"]
    schema = {
        "type": "object",
        "properties": {name: {"type": "boolean"} for name in names},
        "required": names,
        "additionalProperties": False,
    }
    guidance = make_guidance(thinking=False, schema=schema)
    with (
        Model.load(trained, states=StateSettings()) as plain,
        checking(trained, Speculative.FAST) as model,
    ):
        found = assert_same(plain, model, "The", 200, guidance=guidance)
        assert json.loads(found.text).keys() == set(names)
        assert found.acceptance is not None and found.acceptance.accepted > len(found.tokens) / 2


def test_prompts_and_single_tokens_leave_the_same_states(trained: Path, tmp_path: Path) -> None:
    """To the bit: the graph for several tokens reads prompts too, so that weights are loaded once, and what
    plain decoding has kept is good for it."""
    tokens, states, found = [5 * n % 1900 for n in range(700)], StateSettings(folder=tmp_path), []
    for how in (None, Speculative.FAST):
        with Model.load(trained, states=states, speculative=how, keep=1) as model:
            backend = model._backend
            assert isinstance(backend, Ort)
            if isinstance(backend, SpeculativeOrt):
                assert backend.decoder is backend.sessions.decoder
            generator = backend.generator({"do_sample": False}, None, len(tokens) + 4)
            append(generator, tokens, backend.chunk_size, lambda done: False)
            logits = []
            for _ in range(3):  # so early nothing is drafted
                generator.generate_next_token()
                logits.append(generator.get_logits().copy())
            assert not np.array_equal(logits[-1], logits[-2])
            states_now = {
                name: generator.get_output(name.replace("past_key_values", "present"))
                for name in backend.states
            }
            found.append({**states_now, "logits": np.concatenate(logits)})
            answer = model.generate(REPEATED, max_tokens=8, sampling=GREEDY)
            list(answer)
            assert (answer.cached_tokens > 0) is (how is not None)
            model.flush_states()
    one, other = found
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])


@pytest.mark.parametrize("how", Speculative)
def test_images(how: Speculative, tmp_path: Path) -> None:
    """The decoder for one token takes embeddings, made by another graph; that for several takes tokens."""
    write_vision_checkpoint(tmp_path / "body")
    head = random_head(random_model(vocab_size=2048))
    folder = with_head(tmp_path / "body", named(head), tmp_path / "whole")
    artifact = make_artifact(folder, with_mtp(float_profile("fused")), tmp_path / "out", False)
    image = {"type": "image", "image": Image.new("RGB", (64, 96), "red")}
    question = {"role": "user", "content": [image, {"type": "text", "text": REPEATED}]}
    with Model.load(artifact) as plain, checking(artifact, how) as model:
        assert_same(plain, model, PROMPTS[0], 40)
        assert_same(plain, model, [question], 40)


@pytest.mark.parametrize("how", Speculative)
def test_a_prompt_in_pieces(how: Speculative, tmp_path: Path) -> None:
    """A prompt longer than a run, stop strings, and the end of the context."""
    checkpoint = with_head(TINY, load_file(TRAINED_HEAD), tmp_path / "tiny-dense")
    profile = with_mtp(float_profile("fused", prefill_chunk=16)).model_copy(update={"context_length": 130})
    artifact = make_artifact(checkpoint, profile, tmp_path / "out", False)
    with Model.load(artifact) as plain, checking(artifact, how) as model:
        assert len(assert_same(plain, model, REPEATED, 4096).tokens) == 130 - len(plain.encode(REPEATED))
        assert_same(plain, model, REPEATED, 100, stop=["name"])


@pytest.mark.parametrize("how", Speculative)
def test_kept_states(trained: Path, how: Speculative) -> None:
    """The next turn is read from where it begins to differ."""
    first = [{"role": "user", "content": REPEATED}]
    with Model.load(trained) as plain, checking(trained, how, keep=2) as model:
        answer = assert_same(plain, model, first, 30)
        turn = [*first, {"role": "assistant", "content": answer.text}, {"role": "user", "content": "Why?"}]
        assert assert_same(plain, model, turn, 30).cached_tokens > 50
        assert assert_same(plain, model, turn, 30).cached_tokens > 50


def test_what_comes_from_a_prediction_is_counted_apart(trained: Path) -> None:
    question = [{"role": "user", "content": "What is assert?"}]
    options: dict[str, Any] = {"max_tokens": 60, "sampling": GREEDY}
    with checking(trained, Speculative.EXACT) as model:

        def counts(prediction: str) -> tuple[int, int]:
            found = model.generate(question, prediction=prediction, **options)
            answers.append(found.run())
            counted = found.acceptance
            assert counted is not None
            assert counted.predicted <= counted.drafted
            assert counted.accepted_predicted <= min(counted.accepted, counted.predicted)
            return counted.predicted, counted.accepted_predicted

        answers: list[str] = []
        assert counts("") == (0, 0)
        _, chosen = counts(answers[0])
        assert chosen > 0
        half = answers[0][:40]
        tried, chosen = counts(f"{half} quite otherwise, {half} and otherwise again")
        assert 0 < chosen < tried
        assert len(set(answers)) == 1


def test_it_switches_itself_off_and_on(trained: Path) -> None:
    """Whatever it does, an exact answer is the same."""
    with Model.load(trained) as plain, Model.load(trained, speculative=Speculative.EXACT) as model:
        for prompt in PROMPTS[:3]:
            assert_same(plain, model, prompt, 40)
        assert_same(plain, model, REPEATED, 100)


def test_cancelled(trained: Path) -> None:
    with checking(trained, Speculative.FAST) as model:
        generation = model.generate("The", max_tokens=100)
        next(generation)
        generation.cancel()
        list(generation)
        assert generation.finish_reason == "cancelled" and len(generation.tokens) < 10


def test_refused_where_it_is_not_possible(trained: Path, tmp_path: Path) -> None:
    without = make_artifact(TINY, load_profile("cpu", ["speculative=false"]), tmp_path / "none", False)
    with pytest.raises(UserError, match=r"cannot decode speculatively.*export it again"):
        Model.load(without, speculative=Speculative.FAST)
    with pytest.raises(UserError, match="leave one off"):
        Model.load(trained, speculative=Speculative.FAST, prepacked=tmp_path / "prepacked")
    with pytest.raises(UserError, match=r"runs on the CPU only, not on CUDA.*leave --speculative off"):
        Model.load(trained, "cuda", speculative=Speculative.FAST)


def test_artifacts_of_earlier_versions_are_refused(trained: Path, tmp_path: Path) -> None:
    """Their `speculative.onnx` is what `pairs.onnx` is now."""
    artifact = shutil.copytree(trained, tmp_path / "old")
    (artifact / "pairs.onnx").unlink()
    manifest = json.loads((artifact / "manifest.json").read_text())
    del manifest["files"]["pairs.onnx"]
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"made by an earlier version.*export it again"):
        Model.load(artifact, speculative=Speculative.EXACT)


def test_the_command_reports_the_acceptance_rate(trained: Path) -> None:
    command = [sys.executable, "-c", "from qwen_runtime.cli import main; main()"]
    command += [str(trained), REPEATED, "--raw", "--max-tokens", "60", "--temperature", "0", "--speculative"]
    plain = subprocess.run(command[:-1], capture_output=True, text=True, check=True)
    shown = subprocess.run([*command, "--exact"], capture_output=True, text=True, check=True)
    assert shown.stdout == plain.stdout
    assert "drafted tokens accepted" in shown.stderr and "%" in shown.stderr
    asked = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    usage = json.loads(asked.stdout)["usage"]
    assert usage["acceptance_rate"] == usage["accepted_tokens"] / max(1, usage["drafted_tokens"])
    alone = subprocess.run([*command[:-1], "--exact"], capture_output=True, text=True, check=False)
    assert alone.returncode == 2 and "--exact needs --speculative" in alone.stderr
