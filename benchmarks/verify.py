"""What verification costs: seconds and peak memory, apart from the process that runs the artifact.

    python -m benchmarks.verify [--sizes tiny 0.8B] [--folder FOLDER]

0.8B needs 2.5 GB of disk. Memory is VmHWM (Linux). The checkpoints beyond tiny have random weights, so their
quality says nothing; what verification takes does not depend on it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.export import export
from qwen_export.verify.verification import verify
from qwen_profiles.schema import load_profile

from benchmarks.geometry import GEOMETRIES, write_checkpoint
from benchmarks.support.artifacts import Quiet
from benchmarks.support.checkpoints import TINY, copy_tokenizer

_VERIFY = (sys.executable, "-m", "benchmarks.verify", "--verify")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["tiny", "0.8B"])
    parser.add_argument("--folder", type=Path, help="Where to put the checkpoints, one at a time.")
    parser.add_argument("--verify", nargs=2, metavar=("ARTIFACT", "CHECKPOINT"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.verify:  # in a process of its own, so that its peak memory is its own
        artifact, checkpoint = asked.verify
        verify(Path(artifact), Checkpoint.open(checkpoint), Quiet())
        print(Path("/proc/self/status").read_text())
        return
    print("| model | seconds | peak, MB | artifact's process, MB |")
    print("| --- | --- | --- | --- |")
    for size in asked.sizes:
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            print(_row(size, Path(folder)), flush=True)


def _row(size: str, folder: Path) -> str:
    checkpoint = TINY
    if size != "tiny":
        checkpoint = write_checkpoint(folder / "checkpoint", GEOMETRIES[size])
        copy_tokenizer(TINY, checkpoint)
    artifact = folder / "artifact"
    export(Checkpoint.open(str(checkpoint)), load_profile("cpu"), artifact, Quiet())
    start = time.perf_counter()
    output = subprocess.check_output([*_VERIFY, artifact, checkpoint], text=True)
    seconds = time.perf_counter() - start
    peak = int(output.split("VmHWM:")[1].split()[0]) * 1024
    loaded = json.loads((artifact / "report.json").read_text())["run"]["load_bytes"]
    return f"| {size} | {seconds:.0f} | {peak / 1e6:.0f} | {loaded / 1e6:.0f} |"


if __name__ == "__main__":
    main()
