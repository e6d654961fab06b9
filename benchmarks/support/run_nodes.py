"""Graphs without states on one provider: python run_nodes.py FOLDER PROVIDER [OPTIONS]

PROVIDER and OPTIONS as in plugin_run.py. Each `NAME.onnx` of the folder takes its inputs from `NAME.npz`.
Prints as JSON, by NAME, which providers ran nodes, and writes the outputs to `NAME.out.npz`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from plugin_run import profiled, ran


def main() -> None:
    folder, provider, *options = sys.argv[1:]
    found = {}
    for graph in sorted(Path(folder).glob("*.onnx")):
        session = profiled(graph, provider, json.loads(options[0]) if options else {})
        results = session.run(None, dict(np.load(graph.with_suffix(".npz"))))
        names = [value.name for value in session.get_outputs()]
        np.savez(graph.with_suffix(".out.npz"), **dict(zip(names, results, strict=True)))
        found[graph.stem] = sorted(ran(session))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
