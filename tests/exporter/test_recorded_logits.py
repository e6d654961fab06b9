"""The reference and the artifacts against logits that transformers computed once: nothing is shared, not even
the reading of the checkpoint, and no PyTorch is needed.

`tests/support/record_logits.py` says how they were made.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from qwen_export.checkpoint import Checkpoint
from qwen_export.export import export
from qwen_export.reference import Weights, forward, logits

from benchmarks.support.artifacts import Quiet, float_profile
from benchmarks.support.session import Session, cosine
from tests.support.record_logits import CHECKPOINTS, recorded


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_reference(name: str) -> None:
    expected = recorded(name)
    checkpoint = Checkpoint.open(str(CHECKPOINTS[name]), text_only=True)
    weights = Weights(checkpoint.tensors)
    *_, hidden = forward(checkpoint.config, weights, expected.ids[None])
    found = logits(checkpoint.config, weights, hidden)[0]
    assert cosine(found[:, expected.columns], expected.logits).min() > 0.999999
    np.testing.assert_array_equal(found.argmax(-1), expected.best)


@pytest.mark.parametrize("lowering", ["fused", "portable"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_artifact_that_quantises_nothing(name: str, lowering: str, tmp_path: Path) -> None:
    expected = recorded(name)
    checkpoint = Checkpoint.open(str(CHECKPOINTS[name]), text_only=True)
    export(checkpoint, float_profile(lowering), tmp_path / "out", Quiet(), all_logits=True)
    found = Session(tmp_path / "out").run(expected.ids)[0]
    assert cosine(found[:, expected.columns], expected.logits).min() > 0.999999
    np.testing.assert_array_equal(found.argmax(-1), expected.best)
