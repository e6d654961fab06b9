"""`qwen-export verify`: measure an artifact, judge it by its profile's bar, and put the report into it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
from qwen_common import manifest as manifests
from qwen_common.artifact_folder import open_folder
from qwen_common.errors import UserError
from qwen_common.manifest import FileEntry, Manifest, MergedAdapter
from qwen_common.providers import PROVIDERS
from qwen_common.version import own_version
from qwen_runtime.bandwidth import read_bandwidth
from qwen_runtime.tokenizer import Tokenizer

from qwen_export.backends.registry import export_backend
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.describe import model_name
from qwen_export.inspection import precisions
from qwen_export.model_card import README, model_card, render
from qwen_export.progress import Progress
from qwen_export.recorded import recorded_profile
from qwen_export.verify.findings import disagreement, findings, passes
from qwen_export.verify.measure import WINDOW, Loss, Measured, measure, prompt_of, steps
from qwen_export.verify.plots import plots
from qwen_export.verify.running import Runner, running
from qwen_export.verify.transformers_reference import compare, require_transformers

REPORT, REPORT_JSON = "REPORT.md", "report.json"
DEFAULT_TOKENS = 4 * WINDOW
_FORMAT_VERSION = 1


def verify(
    artifact: Path,
    checkpoint: Checkpoint,
    progress: Progress,
    *,
    provider: str = "auto",
    tokens: int = DEFAULT_TOKENS,
    text: Path | None = None,
    with_transformers: bool = False,
) -> dict[str, Any]:
    """Compare `artifact` with `checkpoint`; write report.json, REPORT.md, pictures and model card into it.

    Args:
        provider: as `qwen_runtime.Model.load` takes it.
        tokens: how many to compare on, in texts of 256.
        text: a UTF-8 file to take them from, instead of the shipped one.
        with_transformers: compare the reference with transformers, too, which holds the whole model in
            float32.

    Returns:
        What report.json holds; `passed` says whether it is above the profile's bar.

    Raises:
        UserError: not an artifact, not of this checkpoint, its adapters or this version, the provider does
            not run it, or the text is too short.
    """
    manifest = open_folder(artifact)
    if checkpoint.streamed:
        checkpoint.streamed.say = progress.note
        if missing := checkpoint.streamed.missing_bytes:
            progress.note(
                f"the reference is the checkpoint, of which {missing / 1e9:.2f} GB are fetched for it"
            )
    _check_adapters(artifact, manifest, checkpoint)
    profile, backend = recorded_profile(artifact, manifest), export_backend(manifest["backend"])
    if manifest["model"]["model_type"].endswith("_text"):  # exported without the tower
        checkpoint = replace(checkpoint, vision=None)
    if with_transformers:
        require_transformers(checkpoint)
    as_opened = checkpoint
    config = checkpoint.config.reaching(manifest["context_length"])
    checkpoint = replace(checkpoint, config=config)
    specs = config.tensors()
    checkpoint.check(specs)
    stored = backend.artifact_weights(artifact, checkpoint, profile, specs)
    ids = _texts(artifact, manifest, tokens, text)

    not_run = _too_large(manifest["provider"], stored.needed)
    if not_run:
        progress.note(f"the artifact is not run, its weights are still compared: {not_run}")
    with ExitStack() as stack:

        def start() -> Runner | None:
            return None if not_run else stack.enter_context(running(artifact, provider))

        progress.start(steps(config, stored.tensors, len(ids)))
        measured = measure(
            config, checkpoint.tensors, stored.tensors, ids, start, lambda: progress.advance(1)
        )

    proof = None
    if with_transformers:
        progress.note("transformers reads the checkpoint and computes the same logits")
        proof = compare(as_opened, ids[0].tolist())
    passed = passes(measured, profile) and (proof is None or proof.agrees)
    fixed = set(manifest["carried_over"])
    if profile.frequent_tokens:  # two formats: which of them costs is not measured
        fixed |= {"embedding", "lm_head"}
    settable: dict[str, str] = {
        role: form.precision
        for role, form in profile.weights.items()
        if form.precision != "float" and role not in fixed
    }
    precision = precisions(manifest)
    report = {
        "format_version": _FORMAT_VERSION,
        "qwen_edge": own_version(),
        "packages": _versions(backend.packages),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": manifest["model"]["name"],
        "checkpoint": model_name(checkpoint),
        "profile": profile.name,
        "passed": passed,
        "findings": [
            *disagreement(proof),
            *findings(measured, profile, {} if passed else settable),
        ],
        "bar": profile.quality.model_dump(),
        "text": {
            "name": text.name if text else "the shipped text",
            "texts": len(ids),
            "tokens": ids.shape[1],
            "prompt": prompt_of(ids.shape[1]),
            "positions": sum(len(part) for part in measured.weights.divergence),
        },
        "unverified": [
            *(what for file, what in backend.not_compared if file in manifest["files"]),
            *(f"the adapter {found['name']}" for found in manifest.get("switched_adapters", [])),
        ],
        "reference": {"perplexity": measured.reference_perplexity},
        "transformers": proof.as_json() if proof else None,
        "weights": _loss(measured.weights),
        "run": _executed(measured, prompt_of(ids.shape[1])),
        "not_run": not_run,
        "decode_bytes": stored.decode_bytes,
        "profile_bandwidth": profile.hardware.bandwidth_gb_s * 1e9,
        "roles": [
            {
                "role": role,
                "precision": precision[role],
                "bytes": size,
                "kl_divergence": measured.by_role.get(role),
            }
            for role, size in sorted(manifest["bytes_by_role"].items(), key=lambda item: -item[1])
        ],
        "layers": [
            {"layer": layer, "role": role, "error": error}
            for (layer, role), error in measured.by_layer.items()
        ],
    }
    _put_into(artifact, manifest, report)
    return report


def _check_adapters(artifact: Path, manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Whether the checkpoint has the adapters that the artifact has, by their files' SHA-256."""
    exported = manifest.get("adapters", [])

    def identity(adapters: Sequence[MergedAdapter]) -> list[tuple[float, Mapping[str, FileEntry]]]:
        return [(adapter["weight"], adapter["files"]) for adapter in adapters]

    if identity(exported) == identity(checkpoint.adapters):
        return
    if not exported:
        raise UserError(f"{artifact} was exported without an adapter: verify it without --adapter")
    named = [
        f"--adapter {adapter['name']}" + (f"={adapter['weight']:g}" if adapter["weight"] != 1 else "")
        for adapter in exported
    ]
    what = "others were" if checkpoint.adapters else "none was"
    raise UserError(
        f"{artifact} was exported with {' '.join(named)}, and {what} given here, by the SHA-256 of their "
        "files: give the folders of those"
    )


def _texts(artifact: Path, manifest: Manifest, tokens: int, path: Path | None) -> np.ndarray:
    """int64 [texts, tokens of each]."""
    try:
        source = path or files("qwen_export.verify") / "text" / "evaluation.txt"
        text = source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as UTF-8 text: {error}") from error
    ids = np.asarray(Tokenizer.open(artifact).encode(text), np.int64)
    length = min(WINDOW, manifest["context_length"] - 1)
    count = min(max(1, tokens // length), len(ids) // length)
    if not count:
        raise UserError(f"{path} has {len(ids)} tokens: give a text of {length} at least")
    return ids[: count * length].reshape(count, length)


def _too_large(provider: str, needed: int) -> str | None:
    available = psutil.virtual_memory().available
    if (provider in PROVIDERS and PROVIDERS[provider].own_memory) or needed <= available:
        return None
    return (
        f"it needs {needed / 1e9:.1f} GB of memory and {available / 1e9:.1f} are free here; "
        "qwen-export verify does it on a larger machine"
    )


def _loss(loss: Loss) -> dict[str, Any]:
    return {
        "kl_divergence": loss.kl_divergence,
        "top1_agreement": loss.top1_agreement,
        "perplexity": loss.perplexity,
        "kl_by_position": loss.by_position,
    }


def _executed(measured: Measured, prompt: int) -> dict[str, Any] | None:
    if measured.executed is None or measured.started is None:
        return None
    return {
        **_loss(measured.executed),
        **asdict(measured.started),
        "answering_perplexity": measured.answering,
        "prefill_rate": prompt / median(timing.first_seconds for timing in measured.timings),
        "decode_rate": 1 / median(second for timing in measured.timings for second in timing.next_seconds),
        "bandwidth": read_bandwidth(),
    }


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a variant of it under another name
            continue
    return found


def _put_into(artifact: Path, manifest: Manifest, report: Mapping[str, Any]) -> None:
    contents = {
        REPORT_JSON: (json.dumps(report, indent=2) + "\n").encode(),
        REPORT: render(REPORT, report=report).encode(),
        README: model_card(manifest, report).encode(),
        **plots(report),
    }
    manifests.put_files(artifact, manifest, contents)
