"""lm-eval against the server: it finds what it finds in transformers.

lm-eval has many requirements, so it has an environment of its own; see docs/testing.md.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from qwen_profiles.schema import load_profile

from benchmarks.support.artifacts import float_profile
from benchmarks.support.checkpoints import TINY
from tests.support.exported import Exported
from tests.support.servers import serving

LM_EVAL = os.environ.get("QWEN_EDGE_LM_EVAL")  # the command
QUESTIONS = 30
TASK = """task: continuations
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: label
metric_list:
  - metric: acc
  - metric: acc_norm
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(LM_EVAL is None, reason="QWEN_EDGE_LM_EVAL is not set"),
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A question as HellaSwag has them: how does a text that was held out of the training go on?"""
    folder = tmp_path_factory.mktemp("tasks")
    text = (TINY.parent / "eval.txt").read_text(encoding="utf-8")
    sentences = [" ".join(found.split()) for found in re.findall(r"[A-Z][^.!?]{40,200}\.", text)]
    chosen = random.Random(1)
    lines = []
    for at in chosen.sample(range(len(sentences)), QUESTIONS):
        words = sentences[at].split()
        cut = len(words) // 2
        others = chosen.sample([other for other in sentences if other != sentences[at]], 3)
        endings = [" ".join(words[cut:])]
        endings += [" ".join(other.split()[len(other.split()) // 2 :]) for other in others]
        label = chosen.randrange(4)
        endings[0], endings[label] = endings[label], endings[0]
        lines.append(json.dumps({"context": " ".join(words[:cut]), "endings": endings, "label": label}))
    (folder / "test.jsonl").write_text("\n".join(lines))
    (folder / "continuations.yaml").write_text(TASK.format(data=folder / "test.jsonl"))
    return folder


def evaluate(tasks: Path, output: Path, kind: str, **arguments: Any) -> tuple[dict[str, float], list[float]]:
    """The task's figures, and the log likelihood of every ending of every question."""
    assert LM_EVAL is not None
    given = ",".join(f"{name}={value}" for name, value in arguments.items())
    command = [LM_EVAL, "run", "--model", kind, "--model_args", given, "--tasks", "continuations"]
    command += [
        "--include_path",
        str(tasks),
        "--output_path",
        str(output),
        "--log_samples",
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    [results] = output.rglob("results_*.json")
    figures = json.loads(results.read_text())["results"]["continuations"]
    [samples] = output.rglob("samples_*.jsonl")
    rows = sorted((json.loads(line) for line in samples.open()), key=lambda row: row["doc_id"])
    return figures, [float(each[0]) for row in rows for each in row["filtered_resps"]]


@pytest.fixture(scope="module")
def expected(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, float], list[float]]:
    output = tmp_path_factory.mktemp("transformers")
    return evaluate(tasks, output, "hf", pretrained=TINY, dtype="float32")


@pytest.mark.parametrize("kind", ["float", "cpu", "cpu-int4"])
def test_figures_are_those_of_transformers(
    exported: Exported,
    tasks: Path,
    tmp_path: Path,
    expected: tuple[dict[str, float], list[float]],
    kind: str,
) -> None:
    profile = float_profile("fused") if kind == "float" else load_profile(kind)
    with serving(exported(TINY, profile)) as server:
        figures, scores = evaluate(
            tasks,
            tmp_path / "out",
            "local-completions",
            model="tiny",
            base_url=f"{server.url}/v1/completions",
            tokenizer=TINY,
            tokenizer_backend="huggingface",
            max_length=2048,
        )
    assert len(scores) == len(expected[1]) == 4 * QUESTIONS
    apart = [abs(one - other) for one, other in zip(scores, expected[1], strict=True)]
    accuracy = {name: figures[f"{name},none"] for name in ("acc", "acc_norm")}
    wanted = {name: expected[0][f"{name},none"] for name in accuracy}
    print(kind, accuracy, "transformers", wanted, "mean", sum(apart) / len(apart), "largest", max(apart))
    if kind == "float":
        assert accuracy == wanted and max(apart) < 0.01
    else:  # what the quantised weights cost a model this small
        most = {"cpu": 2.0, "cpu-int4": 3.0}[kind]  # nats for a whole ending
        assert sum(apart) / len(apart) < most
        for name, value in accuracy.items():
            assert abs(value - wanted[name]) <= 4 / QUESTIONS
