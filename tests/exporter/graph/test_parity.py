"""Unquantised graphs against transformers in float32: logits, states, greedy tokens, both lowerings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3_5ForCausalLM
from transformers.cache_utils import DynamicCache

from benchmarks.support.artifacts import float_profile, make_artifact
from benchmarks.support.checkpoints import TINY, TINY_MOE
from benchmarks.support.session import Session, cosine
from tests.support.random_checkpoints import random_model, write_random_checkpoint

LOWERINGS = ("fused", "portable")
SHAPES: dict[str, dict[str, Any]] = {
    "twice the value heads": {},
    "three times the value heads": {"linear_num_value_heads": 6},
    "as many value heads as key heads": {"linear_num_value_heads": 2},
    "untied embeddings": {"tie_word_embeddings": False},
    "hidden size that no block divides": {"hidden_size": 72, "intermediate_size": 100},
    "wide values, odd kernel": {"linear_value_head_dim": 24, "linear_conv_kernel_dim": 3},
    "one query head for each key head": {"num_attention_heads": 2},
    "Gated DeltaNets at the end": {"num_hidden_layers": 6},
    "one attention in two layers": {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "only attention": {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
    "attention first": {"num_hidden_layers": 3, "layer_types": ["full_attention", *["linear_attention"] * 2]},
    "every second layer": {
        "num_hidden_layers": 5,
        "layer_types": (["linear_attention", "full_attention"] * 3)[:5],
    },
    "whole heads rotated": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "partial_rotary_factor": 1.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        }
    },
}
TRAINED = {"trained": TINY, "trained experts": TINY_MOE}
MAX_RUN = 512


@pytest.fixture(scope="module", params=[*SHAPES, *TRAINED])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A checkpoint folder and transformers' float32 model of it."""
    if folder := TRAINED.get(request.param):
        return folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    folder = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(folder, **SHAPES[request.param])
    return folder, random_model(**SHAPES[request.param])


@pytest.fixture(scope="module", params=LOWERINGS)
def session(request: pytest.FixtureRequest, case, tmp_path_factory: pytest.TempPathFactory) -> Session:
    output = tmp_path_factory.mktemp("artifact") / "float"
    return Session(make_artifact(case[0], float_profile(request.param, prefill_chunk=MAX_RUN), output))


def tokens(model: Qwen3_5ForCausalLM, count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, count)


def reference(model: Qwen3_5ForCausalLM, ids: np.ndarray, cache: DynamicCache | None = None) -> np.ndarray:
    with torch.no_grad():
        return model(
            torch.tensor(np.atleast_2d(ids)), past_key_values=cache, use_cache=cache is not None
        ).logits.numpy()


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert cosine(found, expected).min() > 0.99999


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 500])
def test_logits_at_every_position(case, session: Session, length: int) -> None:
    _, model = case
    ids = tokens(model, length)
    session.reset()
    assert_same(session.run(ids), reference(model, ids))


def test_prompt_at_once_in_pieces_and_token_by_token(case, session: Session) -> None:
    _, model = case
    ids = tokens(model, 100)
    cache = DynamicCache(config=model.config)
    expected = reference(model, ids, cache)
    for cuts in ([100], [1, 99], [37, 38, 99], [64], list(range(1, 100))):
        session.reset()
        parts = [session.run(part) for part in np.split(ids, cuts) if len(part)]
        assert_same(np.concatenate(parts, axis=1), expected)
        assert_states(session, cache)


def assert_states(session: Session, cache: DynamicCache) -> None:
    """Every carried state equals transformers' after the same tokens."""
    for name, found in session.state.items():
        _, layer, kind = name.split(".")
        theirs = cache.layers[int(layer)]
        if kind in ("key", "value"):
            expected = {"key": theirs.keys, "value": theirs.values}[kind].numpy()
        elif kind == "recurrent_state":
            expected = _only(theirs.recurrent_states)
        else:
            expected = _only(theirs.conv_states)[..., -found.shape[-1] :]
        np.testing.assert_allclose(found, expected, atol=2e-4 * max(1, np.abs(expected).max()))


def _only(states) -> np.ndarray:
    """transformers keeps each of a layer's states in a list of one."""
    return (states[0] if isinstance(states, (list, tuple, dict)) else states).numpy()


def test_greedy_tokens(case, session: Session) -> None:
    """64 greedy steps; transformers' own choice must be at least as likely as any other, and be made."""
    _, model = case
    ids = tokens(model, 20, seed=2)
    with torch.no_grad():
        expected = model.generate(
            torch.tensor(ids)[None], max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0
        )[0, 20:].tolist()
    # generate() forbids end tokens until min_new_tokens; the same here.
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    session.reset()
    logits = session.run(ids)
    found = []
    for _ in range(64):
        last = logits[0, -1].copy()
        last[ends] = -np.inf
        found.append(int(last.argmax()))
        logits = session.run(found[-1:])
    assert found == expected


def test_batch_of_two(case, session: Session) -> None:
    _, model = case
    ids = np.stack([tokens(model, 40, seed) for seed in (3, 4)])
    session._batch = 2
    try:
        session.reset()
        # GroupQueryAttention refuses several tokens after a past for a batch, so the rest comes singly.
        found = np.concatenate([session.run(part) for part in np.split(ids, [38, 39], axis=1)], axis=1)
    finally:
        session._batch = 1
    assert_same(found, reference(model, ids))


def test_repeated_keys_keep_their_precision(tmp_path: Path) -> None:
    """One token again and again makes every key alike: powers of the system matrix would overflow float32."""
    write_random_checkpoint(tmp_path / "checkpoint")
    model = random_model()
    ids = np.full(256, 7)
    session = Session(
        make_artifact(tmp_path / "checkpoint", float_profile("portable", prefill_chunk=256), tmp_path / "out")
    )
    assert_same(session.run(ids), reference(model, ids))


def test_portable_refuses_a_run_that_is_too_long(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "checkpoint")
    profile = float_profile("portable", prefill_chunk=64)
    session = Session(make_artifact(tmp_path / "checkpoint", profile, tmp_path / "out"))
    assert session.run(np.zeros(64, np.int64)).shape[1] == 64
    session.reset()
    with pytest.raises(Exception, match="a_run_takes_at_most_64_tokens"):
        session.run(np.zeros(65, np.int64))


def test_height_and_width_positions(tmp_path: Path) -> None:
    """The three position streams go to the frequencies that transformers gives them."""
    write_random_checkpoint(tmp_path / "checkpoint")
    model = random_model()
    ids = tokens(model, 30)
    positions = np.stack([np.arange(30), np.arange(30) // 5, np.arange(30) % 7])[:, None]
    with torch.no_grad():
        expected = model(torch.tensor(ids)[None], position_ids=torch.tensor(positions)).logits.numpy()
    for lowering in LOWERINGS:
        session = Session(
            make_artifact(tmp_path / "checkpoint", float_profile(lowering), tmp_path / lowering)
        )
        assert_same(session.run(ids, positions), expected)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_float16_activations(lowering: str, tmp_path: Path) -> None:
    """Half precision keeps the trained model's predictions."""
    model = Qwen3_5ForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    ids = tokens(model, 200)
    session = Session(make_artifact(TINY, float_profile(lowering, "float16", 256), tmp_path / "out"))
    found, expected = session.run(ids), reference(model, ids)
    assert cosine(found, expected).min() > 0.9995
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.97
