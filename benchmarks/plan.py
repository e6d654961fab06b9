"""The planner against the truth: size on disk, and memory of a process that loads it, peak and after.

    python -m benchmarks.plan [--sizes tiny 0.8B 4B] [--profile cpu] [--runs 3] [--folder FOLDER]

4B needs 12 GB of disk and 5 GB of memory. Memory is VmHWM and VmRSS (Linux), with the runtime on the CPU.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.export import export
from qwen_export.planner.models import configured
from qwen_export.planner.predictions import predict
from qwen_profiles.schema import load_profile

from benchmarks.geometry import GEOMETRIES, write_checkpoint
from benchmarks.support.artifacts import Quiet
from benchmarks.support.checkpoints import TINY, copy_tokenizer

_LOAD = (
    "import sys; from qwen_runtime import Model; model = Model.load(sys.argv[1]);"
    "print(*(line for line in open('/proc/self/status') if line.startswith(('VmHWM', 'VmRSS'))))"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["tiny", "0.8B", "4B"])
    parser.add_argument("--profile", default="cpu")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="Where to put the checkpoints, one at a time.")
    asked = parser.parse_args()
    columns = (f"{what}, predicted MB | measured | error" for what in ("disk", "load", "resident"))
    print(f"| model | {' | '.join(columns)} |\n|{' --- |' * 10}")
    for size in asked.sizes:
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            print(_row(size, asked.profile, Path(folder), asked.runs), flush=True)


def _row(size: str, profile_name: str, folder: Path, runs: int) -> str:
    checkpoint, profile = TINY, load_profile(profile_name)
    if size != "tiny":
        checkpoint = write_checkpoint(folder / "checkpoint", GEOMETRIES[size])
        copy_tokenizer(TINY, checkpoint)
    predicted = predict(configured(str(checkpoint)), profile).estimate
    assert predicted is not None
    artifact = folder / "artifact"
    export(Checkpoint.open(str(checkpoint)), profile, artifact, Quiet())
    disk = sum(path.stat().st_size for path in artifact.iterdir())
    peaks, kept = [], []
    for _ in range(runs):
        output = subprocess.check_output([sys.executable, "-c", _LOAD, artifact], text=True).split()
        peaks.append(1024 * int(output[output.index("VmHWM:") + 1]))
        kept.append(1024 * int(output[output.index("VmRSS:") + 1]))
    pairs = (
        (predicted.disk, disk),
        (predicted.load, statistics.median(peaks)),
        (predicted.resident, statistics.median(kept)),
    )
    cells = [f"{was / 1e6:.1f} | {real / 1e6:.1f} | {was / real - 1:+.2%}" for was, real in pairs]
    return f"| {size} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
