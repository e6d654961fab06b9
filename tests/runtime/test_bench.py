"""`qwen-run bench` on the trained checkpoint. How fast is not tested; what the figures mean is."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image
from qwen_common.errors import USER_ERROR
from qwen_runtime.bench import bench
from qwen_runtime.cli import main


def test_figures_agree(cpu_artifact: Path, tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(cpu_artifact, tmp_path / "artifact"))
    (artifact / "report.json").write_text(json.dumps({"decode_bytes": 4_000_000}))
    said: list[str] = []
    found = bench(artifact, contexts=[64, 16], tokens=4, rounds=2, note=said.append)
    assert [point.context for point in found.points] == [16, 64]
    assert found.provider == "cpu" and found.rounds == 2 and found.decode_bytes == 4_000_000
    for point in found.points:
        assert math.isclose(point.prefill_rate * point.first_token_seconds, point.context)
        assert point.ceiling_share is not None
        assert math.isclose(point.ceiling_share * found.bandwidth / 4_000_000, point.decode_rate)
    files = sum(path.stat().st_size for path in artifact.iterdir())
    assert files == found.artifact_bytes < found.load_bytes <= found.peak_bytes < 10**9
    assert sum(message.startswith("round ") for message in said) == 2 * 2


def test_command(cpu_artifact: Path, tmp_path: Path) -> None:
    picture = tmp_path / "speed.png"
    options = ["bench", str(cpu_artifact), "--contexts", "16", "--tokens", "2", "--rounds", "1"]
    result = CliRunner().invoke(main, [*options, "--json", "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["points"][0]["context"] == 16 and found["points"][0]["ceiling_share"] is None
    assert Image.open(picture).size > (500, 100)
    shown = CliRunner().invoke(main, options).stdout
    assert "prefill, tokens/s" in shown and "CPU: the artifact was made for it" in shown
    assert "no report" in shown


@pytest.mark.parametrize(
    "options,says",
    [
        (
            ["--contexts", "1000000"],
            "a prompt of 1000000 tokens is not possible: choose --contexts from 1 to",
        ),
        (["--contexts", "12,x"], "such as 128,512"),
        (["--threads", "2,x"], "no number of threads 'x': give a number"),
        (["--threads", "2,2"], "give each number once"),
        (["--threads", "2,1", "--plot", "x.png"], "--plot draws one number of threads"),
        (["--provider", "cuda"], "install onnxruntime-genai-cuda"),
    ],
)
def test_mistakes(cpu_artifact: Path, options: list[str], says: str) -> None:
    result = CliRunner().invoke(main, ["bench", str(cpu_artifact), *options])
    assert result.exit_code == USER_ERROR and says in " ".join(result.stderr.split())


def test_plot_without_matplotlib(cpu_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    options = ["--contexts", "16", "--tokens", "1", "--rounds", "1", "--plot", str(tmp_path / "speed.png")]
    result = CliRunner().invoke(main, ["bench", str(cpu_artifact), *options])
    assert result.exit_code == USER_ERROR and "pip install 'qwen-edge[plot]'" in result.stderr
