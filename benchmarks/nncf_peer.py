"""Our OpenVINO recipe and NNCF's own INT4 on a checkpoint, for `benchmarks.quality`; runs in the environment
of the extra `openvino`.

    python -m benchmarks.nncf_peer CHECKPOINT TEXTS.npz > rows.jsonl

TEXTS.npz has `texts` int64 [texts, tokens], `reference` float32 [texts, tokens, vocab], log-probabilities,
and `calibration` int64 [texts, tokens]. Prints lines of {name: {"bytes", "kl", "top1", "perplexity"}}, each
when it is known: scale estimation comes last, because it ends the process on some models.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
from qwen_export.backends.openvino.convert import convert
from qwen_export.backends.openvino.load import load_model
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_profiles.schema import load_profile

from benchmarks.support.artifacts import make_artifact

OURS = {
    "profile intel-lunar-lake": [],
    "profile intel-lunar-lake, scale estimation": ["compression=scale-estimation"],
}
# Computed in float32, so that the weights alone are compared.
_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


def configurations() -> Iterator[tuple[str, dict[str, Any], bool]]:
    """(name, arguments of nncf.compress_weights, whether it takes a data set)."""
    modes = {"sym": nncf.CompressWeightsMode.INT4_SYM, "asym": nncf.CompressWeightsMode.INT4_ASYM}
    for estimated, (name, mode), group, everything in product(
        (False, True), modes.items(), (64, 128), (True, False)
    ):
        title = f"NNCF {name}, group {group}{'' if everything else ', INT8 embedding and lm_head'}"
        title += ", scale estimation" if estimated else ""
        options = {"mode": mode, "group_size": group, "all_layers": everything}
        yield title, options | {"scale_estimation": estimated}, estimated


def inputs(ids: np.ndarray) -> dict[str, np.ndarray]:
    """One text [tokens], from the beginning."""
    return {
        "input_ids": ids[None],
        "attention_mask": np.ones((1, len(ids)), np.int64),
        "position_ids": np.arange(len(ids), dtype=np.int64)[None],
        "beam_idx": np.zeros(1, np.int32),
    }


def measure(folder: Path, texts: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    request = ov.Core().compile_model(folder / "openvino_model.xml", "CPU", _EXACT).create_infer_request()
    divergences, agreements, nlls = [], [], []
    for ids, expected in zip(texts, reference, strict=True):
        request.reset_state()
        found = request.infer(inputs(ids))["logits"][0].astype(np.float64)
        found -= np.log(np.exp(found - found.max(-1, keepdims=True)).sum(-1, keepdims=True)) + found.max(
            -1, keepdims=True
        )
        divergences.append((np.exp(expected) * (expected - found)).sum(-1))
        agreements.append(found.argmax(-1) == expected.argmax(-1))
        nlls.append(-found[np.arange(len(ids) - 1), ids[1:]])
    return {
        "bytes": (folder / "openvino_model.bin").stat().st_size,
        "kl": float(np.mean(divergences)),
        "top1": float(np.mean(agreements)),
        "perplexity": float(np.exp(np.mean(nlls))),
    }


def main() -> None:
    checkpoint, data = Checkpoint.open(sys.argv[1], text_only=True), np.load(sys.argv[2])
    nncf.set_log_level(logging.ERROR)
    rows = sys.stdout

    def report(name: str, folder: Path) -> None:
        row = measure(folder, data["texts"], data["reference"])
        print(json.dumps({name: row}), file=rows, flush=True)

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        for name, overrides in OURS.items():
            profile = load_profile("intel-lunar-lake", overrides)
            target = make_artifact(checkpoint.root, profile, Path(folder, name))
            report(name, target)
        plain = Path(folder, "plain")
        convert(load_model(checkpoint)[0], plain, lambda model, _: model)
        for name, options, estimated in configurations():
            model = ov.Core().read_model(plain / "openvino_model.xml")
            if estimated:
                options["dataset"] = nncf.Dataset([inputs(ids) for ids in data["calibration"]])
            advanced = nncf.AdvancedCompressionParameters(
                group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
            )
            try:
                model = nncf.compress_weights(model, advanced_parameters=advanced, **options)
            except Exception as error:  # what it cannot do is a row too
                print(f"{name}: {error}", file=sys.stderr)
                continue
            target = Path(folder, "compressed")
            target.mkdir(exist_ok=True)
            ov.save_model(model, target / "openvino_model.xml", compress_to_fp16=False)
            report(name, target)


if __name__ == "__main__":
    main()
