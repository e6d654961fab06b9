"""What verification costs: seconds and peak memory, apart from the process that runs the artifact.

    python -m benchmarks.verify [--sizes tiny 0.8B] [--folder FOLDER]

0.8B needs 2.5 GB of disk. Memory is VmHWM (Linux). The checkpoints beyond tiny have random weights, so their
quality says nothing; what verification takes does not depend on it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.export import export
from qwen_profiles.schema import load_profile

from benchmarks.geometry import GEOMETRIES, write_checkpoint
from tests.support.artifacts import Quiet

_TINY = Path(__file__).parents[1] / "tests" / "checkpoints" / "tiny-dense"
# __name__ is not __main__ in the process that runs the artifact.
_VERIFY = """
import sys
from pathlib import Path
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.verify.verification import verify
from tests.support.artifacts import Quiet
if __name__ == "__main__":
    verify(Path(sys.argv[1]), Checkpoint.open(sys.argv[2]), Quiet())
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["tiny", "0.8B"])
    parser.add_argument("--folder", type=Path, help="Where to put the checkpoints, one at a time.")
    asked = parser.parse_args()
    print("| model | seconds | peak, MB | artifact's process, MB |")
    print("| --- | --- | --- | --- |")
    for size in asked.sizes:
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            print(_row(size, Path(folder)), flush=True)


def _row(size: str, folder: Path) -> str:
    checkpoint = _TINY
    if size != "tiny":
        checkpoint = write_checkpoint(folder / "checkpoint", GEOMETRIES[size])
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(_TINY / name, checkpoint)
    artifact = folder / "artifact"
    export(Checkpoint.open(str(checkpoint)), load_profile("cpu"), artifact, Quiet())
    script = folder / "verify_one.py"
    script.write_text(_VERIFY)
    start = time.perf_counter()
    output = subprocess.check_output([sys.executable, script, artifact, checkpoint], text=True)
    seconds = time.perf_counter() - start
    peak = int(output.split("VmHWM:")[1].split()[0]) * 1024
    loaded = json.loads((artifact / "report.json").read_text())["run"]["load_bytes"]
    return f"| {size} | {seconds:.0f} | {peak / 1e6:.0f} | {loaded / 1e6:.0f} |"


if __name__ == "__main__":
    main()
