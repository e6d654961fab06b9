"""An export that was stopped goes on: which weights are on disk, and whether they are of the same export."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from qwen_common.version import own_version
from qwen_profiles.schema import Profile

from qwen_export.backends.onnx.graphs import Graphs
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.graph.builder import DATA_FILE
from qwen_export.output import STAGED
from qwen_export.progress import Progress


class Journal:
    """Names of the weights that are safely in the data file, one JSON line each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.done: set[str] = set()
        if path.exists():
            for line in path.read_bytes().split(b"\n")[:-1]:  # a killed process may leave half a line
                try:
                    self.done.add(str(json.loads(line)))
                except ValueError:  # a power cut may leave anything: what follows is written once more
                    break

    def add(self, names: Sequence[str]) -> None:
        """Record `names`; call only once their bytes have been synced."""
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(name) + "\n" for name in names)
            file.flush()
            os.fsync(file.fileno())
        self.done.update(names)


def open_journal(work: Path, fingerprint: str, progress: Progress) -> Journal:
    """Open the journal of an earlier export of the same thing, or start over."""
    staged, journal_path, mark = work / STAGED, work / "journal.jsonl", work / "fingerprint"
    if mark.exists() and mark.read_text() == fingerprint and (staged / DATA_FILE).exists():
        journal = Journal(journal_path)
        progress.note(f"an earlier export did not finish: going on after {len(journal.done)} weights")
    else:
        if mark.exists() and mark.read_text() != fingerprint:
            progress.note("an earlier export of something else did not finish: starting over")
        mark.unlink(missing_ok=True)
        shutil.rmtree(staged, ignore_errors=True)
        journal_path.unlink(missing_ok=True)
        staged.mkdir()
        mark.write_text(fingerprint)
        journal = Journal(journal_path)
    for path in staged.iterdir():
        if path.name != DATA_FILE:
            path.unlink()
    return journal


def fingerprint(checkpoint: Checkpoint, profile: Profile, graphs: Graphs, text: np.ndarray | None) -> str:
    """Changes when any byte of the data file could: shards, adapters, profile, layout, text, our code."""
    shards = sorted({file for source in checkpoint.tensors.values() for file in source.files})
    streamed = checkpoint.streamed
    identity = {
        "qwen_edge": own_version(),
        "shards": [
            (streamed.repo, streamed.root.name, path.name)
            if streamed and streamed.has(path)
            else (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
            for path in shards
        ],
        "adapters": [checkpoint.adapters, [adapter.described for adapter in checkpoint.switched_adapters]],
        "profile": profile.model_dump(),
        "layout": [repr(entry) for _, tensors in graphs.placed for entry in tensors],
        "text": None if text is None else text.tolist(),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
