"""Where the time goes from starting Python to the first token, each run in a new process.

    python -m benchmarks.cold_start ARTIFACT [ARTIFACT ...] [--prompt 64] [--rounds 5]

The files are in the page cache but for the first run, which is left out. Medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

# The steps of Model.load apart. Repacking of the weights is a part of creating the session.
_CHILD = """
import json, sys, time
from pathlib import Path
started = float(sys.argv[3])
marks = [("Python", time.time())]
from qwen_runtime import Model
import onnxruntime_genai as og
marks.append(("import", time.time()))
from qwen_runtime.artifact import Artifact
from qwen_runtime.resident import release_mapped
artifact = Artifact.open(sys.argv[1])
marks.append(("artifact checked", time.time()))
model = og.Model(og.Config(sys.argv[1]))
marks.append(("graph, weights, repacking", time.time()))
release_mapped(Path(sys.argv[1]))
tokenizer = og.Tokenizer(model)
marks.append(("tokenizer", time.time()))
import numpy
ids = numpy.resize(tokenizer.encode("A list is mutable, and a tuple is not. "), int(sys.argv[2]))
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=len(ids) + 1, do_sample=False)
generator = og.Generator(model, parameters)
generator.append_tokens(ids.astype(numpy.int32))
generator.generate_next_token()
marks.append(("first prompt", time.time()))
found = {name: later - earlier for (_, earlier), (name, later) in zip([("", started), *marks], marks)}
found["total"] = marks[-1][1] - started
print(json.dumps(found))
"""
# Memory once the model is loaded by the product's own way, and the most until then.
_LOAD = """
import sys
from qwen_runtime import Model
model = Model.load(sys.argv[1])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(*(1024 * int(status[name].split()[0]) for name in ("VmRSS", "VmHWM")))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    for artifact in asked.artifacts:
        runs = [_run(artifact, asked.prompt) for _ in range(asked.rounds + 1)][1:]
        table = Table("step", "seconds", title=str(artifact))
        for name in runs[0]:
            table.add_row(name, f"{statistics.median(run[name] for run in runs):.3f}")
        Console().print(table)
        size = sum(path.stat().st_size for path in artifact.iterdir())
        resident, peak = _memory(artifact)
        share = f"{resident / size:.2f} times"
        print(
            f"files {size / 1e6:.1f} MB; loaded {resident / 1e6:.1f} MB resident ({share}), "
            f"{peak / 1e6:.1f} MB while loading"
        )


def _run(artifact: Path, prompt: int) -> dict[str, float]:
    command = [sys.executable, "-c", _CHILD, str(artifact), str(prompt), repr(time.time())]
    found: dict[str, float] = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    return found


def _memory(artifact: Path) -> tuple[int, int]:
    """Bytes resident after loading, and at most until then."""
    output = subprocess.check_output([sys.executable, "-c", _LOAD, str(artifact)], text=True)
    resident, peak = map(int, output.split()[-2:])
    return resident, peak


if __name__ == "__main__":
    main()
