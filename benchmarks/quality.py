"""How much of the trained tiny checkpoint each recipe keeps, beside ONNX Runtime GenAI's model builder.

    python -m benchmarks.quality [--tokens 8192] [--json quality.json]

Every artifact reads the held-out text in windows, and each next-token distribution is compared with that of
transformers in float32: KL divergence in nats, how often the likeliest token is the same, perplexity.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from qwen_profiles.schema import ROLES, Profile, WeightFormat, load_profile
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, Qwen3_5ForCausalLM

from benchmarks.builder import build, wrap
from tests.artifacts import Session, float_profile, make_artifact
from tests.random_checkpoints import TINY

EVALUATION = TINY.parent / "eval.txt"
WINDOW = 512
# The builder's options for what its users choose between; its default block size is 32.
BUILDER = {
    "builder, default": [],
    "builder, rtn": ["algo_config=rtn"],
    "builder, k_quant": ["algo_config=k_quant"],
    "builder, k_quant_mixed": ["algo_config=k_quant_mixed"],
    "builder, k_quant_linear": ["algo_config=k_quant_linear"],
    "builder, block 128": ["block_size=128"],
}


def uniform(precision: str, block: int, symmetric: bool) -> Profile:
    """Every projection in one format; the gates of the recurrence stay float, as in every recipe."""
    form = WeightFormat(precision=precision, block_size=block, symmetric=symmetric)
    weights = {role: form for role in ROLES} | {"gate": WeightFormat(precision="float")}
    return load_profile("cpu").model_copy(update={"weights": weights, "accuracy_level": 0})


def recipes() -> Iterator[tuple[str, Profile]]:
    yield "float32", float_profile("fused")
    yield "profile cpu", load_profile("cpu")
    yield "profile strix-halo", load_profile("strix-halo")
    yield "all int8, block 128", uniform("int8", 128, True)
    for symmetric in (True, False):
        for block in (32, 64, 128):
            yield (
                f"all int4, block {block}{'' if symmetric else ', asymmetric'}",
                uniform("int4", block, symmetric),
            )


def windows(tokens: int) -> np.ndarray:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ids = tokenizer(EVALUATION.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    count = min(tokens, len(ids)) // WINDOW
    return np.asarray(ids[: count * WINDOW]).reshape(count, WINDOW)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return torch.log_softmax(torch.from_numpy(logits.astype(np.float32)), -1).numpy()


def measure(artifact: Path, texts: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    session = Session(artifact)
    divergences, agreements, surprises = [], [], []
    for ids, expected in zip(texts, reference, strict=True):
        session.reset()
        # In pieces that every artifact's chunked recurrence takes.
        found = np.concatenate([session.run(part)[0] for part in np.split(ids, WINDOW // 128)])
        found = log_softmax(found[:, : expected.shape[-1]])
        divergences.append((np.exp(expected) * (expected - found)).sum(-1))
        agreements.append(found.argmax(-1) == expected.argmax(-1))
        surprises.append(-found[np.arange(WINDOW - 1), ids[1:]])
    size = sum(path.stat().st_size for path in artifact.glob("*.onnx*"))
    return {
        "bytes": size,
        "kl": float(np.mean(divergences)),
        "top1": float(np.mean(agreements)),
        "perplexity": float(np.exp(np.mean(surprises))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    texts = windows(arguments.tokens)
    model = Qwen3_5ForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = [model(torch.from_numpy(ids)[None]).logits[0].numpy() for ids in texts]
    reference = np.stack([log_softmax(part) for part in logits])
    surprise = np.mean(
        [-part[np.arange(WINDOW - 1), ids[1:]] for part, ids in zip(reference, texts, strict=True)]
    )
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, profile in recipes():
            results[name] = measure(make_artifact(TINY, profile, Path(folder, name)), texts, reference)
        wrapped = wrap(TINY, Path(folder, "wrapped"))
        for name, extra in BUILDER.items():
            built = build(wrapped, Path(folder, name.replace(", ", "-")), *extra)
            results[name] = measure(built, texts, reference)

    parameters = sum(value.numel() for value in model.parameters())
    table = Table("artifact", "MB", "bits per weight", "KL, nats", "top-1", "perplexity")
    table.add_row("transformers float32", "", "", "0", "100.0%", f"{np.exp(surprise):.3f}")
    for name, row in results.items():
        table.add_row(
            name,
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['bytes'] * 8 / parameters:.2f}",
            f"{row['kl']:.5f}",
            f"{row['top1']:.1%}",
            f"{row['perplexity']:.3f}",
        )
    Console(width=100).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
