"""How much of a trained tiny checkpoint each recipe keeps, beside ONNX Runtime GenAI's builder and NNCF.

    python -m benchmarks.quality [--checkpoint dense|moe|moe128|vl] [--tokens 8192] [--nncf-python PYTHON]
                                 [--llama-python PYTHON] [--only recipes experts auto builder nncf llama]
                                 [--json quality.json] [--plot quality.png]

Every artifact reads the held-out text in windows, and each next-token distribution is compared with that of
transformers in float32: KL divergence in nats, how often the likeliest token is the same, perplexity. Bytes
are those of the weights, graphs not included. Of the vision-language checkpoint this is the language part.
NNCF is measured by the Python of an environment with extras `export` and `openvino`
(`benchmarks.nncf_peer`), on OpenVINO. llama.cpp's own quantisations of a mixture's weights are made by the
Python of `--llama-python` (see benchmarks/decode.py), and transformers reads the text with them, so that its
rounding of activations is not counted (`benchmarks.peers.llama_weights`). With `--json`, what the file has
already stays in the table, so that the parts of `--only` can be measured one after the other.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from qwen_common.errors import UserError
from qwen_export.architecture.models.qwen3_5_moe import MoeTextConfig
from qwen_export.backends.openvino.load import load_model
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.export import export
from qwen_export.quantize.auto_precision import Limits, candidates, measured
from qwen_export.quantize.calibration import calibration_samples
from qwen_export.quantize.gptq import SAMPLES
from qwen_profiles.schema import ROLES, Profile, WeightFormat, load_profile
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedModel

from benchmarks.builder import build, wrap
from benchmarks.support.artifacts import Quiet, float_profile
from benchmarks.support.checkpoints import EVALUATION, TINY, TINY_MOE, TINY_MOE_128, TINY_VL
from benchmarks.support.session import Session

CHECKPOINTS = {"dense": TINY, "moe": TINY_MOE, "moe128": TINY_MOE_128, "vl": TINY_VL}
PARTS = ("recipes", "experts", "auto", "builder", "nncf", "llama")
WINDOW = 512
AUTO_BITS = (4.2, 4.4, 4.6, 4.8, 5.0, 5.25, 5.5, 6.0, 7.0, 8.0)
# The builder's options for what its users choose between; its default block size is 32.
BUILDER = {
    "builder, default": [],
    "builder, rtn": ["algo_config=rtn"],
    "builder, k_quant": ["algo_config=k_quant"],
    "builder, k_quant_mixed": ["algo_config=k_quant_mixed"],
    "builder, k_quant_linear": ["algo_config=k_quant_linear"],
    "builder, block 128": ["block_size=128"],
}

# Forms of llama.cpp. Rows are joined for those whose superblocks a tiny model's rows do not fill, with an
# importance matrix and without; IQ2 and IQ3_XXS want one.
LLAMA = ("Q8_0", "Q4_K_M", "Q4_0", "MXFP4_MOE", "Q2_K")
LLAMA_JOINED = ("Q4_K_M", "Q3_K_M", "Q2_K")
LLAMA_IMPORTANCE = ("Q4_K_M", "Q3_K_M", "IQ3_XXS", "Q2_K", "IQ2_M", "IQ2_XS", "IQ2_XXS")


def uniform(precision: str, block: int, symmetric: bool) -> Profile:
    """Every projection in one format; the gates of the recurrence stay float, as in every recipe."""
    form = WeightFormat(precision=precision, block_size=block, symmetric=symmetric)
    weights = {role: form for role in ROLES} | {"gate": WeightFormat(precision="float")}
    return load_profile("cpu").model_copy(update={"weights": weights, "accuracy_level": 0})


def recipes() -> Iterator[tuple[str, Profile]]:
    yield "float32", float_profile("fused")
    yield "profile cpu", load_profile("cpu")
    yield "profile strix-halo", load_profile("strix-halo")
    yield "profile cpu-int4", load_profile("cpu-int4")
    for name in ("cpu", "strix-halo"):
        yield f"profile {name}, compression=gptq", load_profile(name, ["compression=gptq"])
    yield "all int8, block 128", uniform("int8", 128, True)
    for symmetric in (True, False):
        for block in (32, 64, 128):
            yield (
                f"all int4, block {block}{'' if symmetric else ', asymmetric'}",
                uniform("int4", block, symmetric),
            )


def with_experts() -> Iterator[tuple[str, Profile]]:
    """Profiles with routed experts in other formats."""
    forms = {
        "cpu-int4": [("int4", block, True) for block in (32, 64, 128)],
        "laptop-32gb": [("int4", 128, True), *(("int2", block, False) for block in (32, 64, 128))],
    }
    for profile, compression in itertools.product(forms, ("data-free", "gptq")):
        base = load_profile(profile, [f"compression={compression}"])
        for precision, block, symmetric in forms[profile]:
            form = WeightFormat(precision=precision, block_size=block, symmetric=symmetric)
            name = f"{profile}, experts {precision}, block {block}, {compression}"
            yield name, base.model_copy(update={"weights": base.weights | {"experts": form}})


def chosen(checkpoint: Checkpoint) -> Iterator[tuple[str, Profile]]:
    """`--auto-precision` at every size that the profile can reach."""
    profiles = {
        "cpu": load_profile("cpu"),
        "cpu, scale_dtype=float16": load_profile("cpu", ["scale_dtype=float16"]),
        "strix-halo": load_profile("strix-halo"),
        "strix-halo, compression=gptq": load_profile("strix-halo", ["compression=gptq"]),
    }
    for name, base in profiles.items():
        found = measured(candidates(checkpoint, base), None, Quiet())
        for bits in AUTO_BITS:
            with suppress(UserError):  # less than all in INT4
                yield f"{name}, --auto-precision --bits {bits:g}", found.spend(Limits(bits=bits)).profile


def built(folder: Path, checkpoint: Path) -> Iterator[tuple[str, Path]]:
    """The builder's artifacts of a text checkpoint; a line says which options it does not get through."""
    wrapped = wrap(checkpoint, folder / "wrapped")
    for name, extra in BUILDER.items():
        try:
            yield name, build(wrapped, folder / name.replace(", ", "-"), *extra)
        except subprocess.CalledProcessError as error:
            print(f"{name}: {error.stderr.decode().strip().splitlines()[-1]}")


def nncf(
    python: str, checkpoint: Path, texts: np.ndarray, reference: np.ndarray
) -> Iterator[tuple[str, dict[str, float]]]:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "texts.npz")
        calibration = windows(10**9)[-4:]  # scale estimation may see the end of the same kind of text
        np.savez(data, texts=texts, reference=reference.astype(np.float32), calibration=calibration)
        command = [python, "-m", "benchmarks.nncf_peer", str(checkpoint), str(data)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as peer:
            assert peer.stdout is not None
            for line in peer.stdout:
                yield from json.loads(line).items()
        if peer.returncode:
            print(f"NNCF ended with code {peer.returncode}: what comes after is not measured")


def llama(
    python: str, checkpoint: Checkpoint, model: PreTrainedModel, texts: np.ndarray, reference: np.ndarray
) -> Iterator[tuple[str, dict[str, float]]]:
    """llama.cpp's forms, rows as they are and joined; a line says what types each of them is made of."""
    from benchmarks.peers.llama_weights import importance, quantized

    config = checkpoint.config
    assert isinstance(config, MoeTextConfig)
    original = {name: value.clone() for name, value in model.state_dict().items()}
    matrix = importance(model, calibration_samples(checkpoint, None, SAMPLES))
    cases = [(form, False, False) for form in LLAMA]
    cases += [(form, True, False) for form in LLAMA_JOINED]
    cases += [(form, True, True) for form in LLAMA_IMPORTANCE]
    for form, joined, important in cases:
        name = f"llama.cpp {form}{', importance matrix' * important}{', rows joined' * joined}"
        with tempfile.TemporaryDirectory() as work:
            found = quantized(python, form, model, config, Path(work), joined, matrix if important else None)
        parts = (f"{count / found.types.total():.0%} {kind}" for kind, count in found.types.most_common())
        print(f"{name}: {', '.join(parts)}", flush=True)
        model.load_state_dict(found.weights, strict=False)
        yield name, {"bytes": found.bytes, **divergence(logits(model, texts), texts, reference)}
        model.load_state_dict(original)


def logits(model: PreTrainedModel, texts: np.ndarray) -> Iterator[np.ndarray]:
    with torch.no_grad():
        for ids in texts:
            yield model(torch.from_numpy(ids)[None]).logits[0].numpy()


def exported(checkpoint: Checkpoint, profile: Profile, output: Path) -> Path:
    export(checkpoint, profile, output, Quiet(), all_logits=True)
    return output


def windows(tokens: int) -> np.ndarray:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ids = tokenizer(EVALUATION.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    count = min(tokens, len(ids)) // WINDOW
    return np.asarray(ids[: count * WINDOW]).reshape(count, WINDOW)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return torch.log_softmax(torch.from_numpy(logits.astype(np.float32)), -1).numpy()


def measure(artifact: Path, texts: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    session = Session(artifact)

    def run(ids: np.ndarray) -> np.ndarray:
        session.reset()
        # In pieces that every artifact's chunked recurrence takes.
        found = np.concatenate([session.run(part)[0] for part in np.split(ids, WINDOW // 128)])
        return found[:, : reference.shape[-1]]

    size = sum(path.stat().st_size for path in artifact.glob("*.onnx.data"))
    return {"bytes": size, **divergence((run(ids) for ids in texts), texts, reference)}


def divergence(found: Iterable[np.ndarray], texts: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Of logits [window, token, vocabulary] from the reference's logarithms of probabilities."""
    divergences, agreements, nlls = [], [], []
    for part, ids, expected in zip(found, texts, reference, strict=True):
        given = log_softmax(part)
        divergences.append((np.exp(expected) * (expected - given)).sum(-1))
        agreements.append(given.argmax(-1) == expected.argmax(-1))
        nlls.append(-given[np.arange(WINDOW - 1), ids[1:]])
    return {
        "kl": float(np.mean(divergences)),
        "top1": float(np.mean(agreements)),
        "perplexity": float(np.exp(np.mean(nlls))),
    }


def plot(results: dict[str, dict[str, float]], parameters: int, path: Path) -> None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="bits per weight", ylabel="KL divergence, nats", yscale="log", xlim=(2, 9)
    )
    series = {
        "strix-halo, --auto-precision": ("o-", lambda name: name.startswith("strix-halo, ")),
        "cpu, scale_dtype=float16, --auto-precision": ("o-", lambda name: name.startswith("cpu, scale")),
        "cpu, --auto-precision": ("o-", lambda name: name.startswith("cpu, --auto")),
        "qwen-edge, one precision or profile": ("s", lambda name: name.startswith(("all int", "profile"))),
        "onnxruntime-genai builder": ("^", lambda name: name.startswith("builder")),
        "NNCF": ("x", lambda name: name.startswith("NNCF")),
        "llama.cpp": ("+", lambda name: name.startswith("llama.cpp")),
    }
    for label, (style, belongs) in series.items():
        rows = [row for name, row in results.items() if belongs(name)]
        points = sorted((row["bytes"] * 8 / parameters, row["kl"]) for row in rows)
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=5, linewidth=1)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", choices=CHECKPOINTS, default="dense")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--nncf-python")
    parser.add_argument("--llama-python", help="of an environment with llama-cpp-python; for mixtures")
    arguments = parser.parse_args()

    texts, folder = windows(arguments.tokens), CHECKPOINTS[arguments.checkpoint]
    checkpoint = Checkpoint.open(str(folder), text_only=True)
    model = load_model(checkpoint)[0].float()
    reference = np.stack([log_softmax(part) for part in logits(model, texts)])
    nll = np.mean([-part[np.arange(WINDOW - 1), ids[1:]] for part, ids in zip(reference, texts, strict=True)])
    results: dict[str, dict[str, float]] = {}
    if arguments.json and arguments.json.exists():
        results = json.loads(arguments.json.read_text())

    def record(name: str, row: dict[str, float]) -> None:
        results[name] = row
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=2) + "\n")

    with tempfile.TemporaryDirectory() as work:
        if "recipes" in arguments.only:
            for name, profile in recipes():
                record(name, measure(exported(checkpoint, profile, Path(work, name)), texts, reference))
        if "experts" in arguments.only and isinstance(checkpoint.config, MoeTextConfig):
            for name, profile in with_experts():
                record(name, measure(exported(checkpoint, profile, Path(work, name)), texts, reference))
        if "auto" in arguments.only:
            for name, profile in chosen(checkpoint):
                record(name, measure(exported(checkpoint, profile, Path(work, name)), texts, reference))
        if "builder" in arguments.only and not (folder / "preprocessor_config.json").exists():
            for name, artifact in built(Path(work), folder):
                record(name, measure(artifact, texts, reference))
    if "nncf" in arguments.only and arguments.nncf_python:
        for name, row in nncf(arguments.nncf_python, folder, texts, reference):
            record(name, row)
    if "llama" in arguments.only and arguments.llama_python:
        for name, row in llama(arguments.llama_python, checkpoint, model, texts, reference):
            record(name, row)

    parameters = sum(value.numel() for value in model.parameters())
    table = Table("artifact", "MB", "bits per weight", "KL, nats", "top-1", "perplexity", box=MARKDOWN)
    table.add_row("transformers float32", "", "", "0", "100.0%", f"{np.exp(nll):.2f}")
    for name, row in results.items():
        table.add_row(
            name,
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['bytes'] * 8 / parameters:.2f}",
            f"{row['kl']:.4f}",
            f"{row['top1']:.1%}",
            f"{row['perplexity']:.2f}",
        )
    Console(width=130).print(table)
    if arguments.plot:
        plot(results, parameters, arguments.plot)


if __name__ == "__main__":
    main()
