"""What `export`, `profiles`, `plan`, `inspect` and `verify` print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qwen_common.manifest import Manifest
from qwen_profiles.schema import Profile
from rich.table import Table

from qwen_export.backends.registry import export_backend
from qwen_export.inspection import precisions
from qwen_export.planner.predictions import Prediction

if TYPE_CHECKING:
    from qwen_export.matrix.plan import Planned
    from qwen_export.matrix.run import Outcome


def manifest_table(title: str, manifest: Manifest) -> Table:
    """Precision and size by role, of an artifact that was just made."""
    table = Table("role", "precision", "MB", title=title)
    for role, precision in precisions(manifest).items():
        table.add_row(role, precision, f"{manifest['bytes_by_role'][role] / 1e6:.1f}")
    total = sum(entry["size"] for entry in manifest["files"].values())
    table.add_row("all files", "", f"{total / 1e6:.1f}", end_section=True)
    return table


def profiles_table(profiles: Iterable[Profile]) -> Table:
    table = Table("profile", "runs on", "GB", "GB/s", "description", caption="memory budget and bandwidth")
    for profile in profiles:
        runs_on = f"{profile.provider} {profile.device}" if profile.provider != profile.device else "cpu"
        hardware = profile.hardware
        table.add_row(
            profile.name,
            runs_on,
            f"{hardware.memory_budget_gb:g}",
            f"{hardware.bandwidth_gb_s:g}",
            profile.description,
        )
    return table


def prediction_table(found: Prediction) -> Table:
    """One model on one profile, in full."""
    predicted, profile = found.estimate, found.profile
    table = Table("what", "predicted", title=f"{found.model} for {profile.name}")
    budget = f"of {_gb(predicted.budget)}"
    table.add_row("size on disk", _gb(predicted.disk))
    table.add_row("memory at load", f"{_gb(predicted.load)} {budget}")
    table.add_row("memory once loaded", f"{_gb(predicted.resident)} {budget}")
    table.add_row(f"working memory, runs of {profile.prefill_chunk} tokens", _gb(predicted.working))
    table.add_row("memory per 1024 tokens of context", _gb(1024 * predicted.cache_per_token))
    table.add_row("largest context that fits", f"{predicted.largest_context} tokens")
    table.add_row("context of the profile", f"{predicted.context} tokens", end_section=True)
    table.add_row(
        "decode, at most",
        f"{_rate(predicted.decode_rate)} tokens/s: {_gb(predicted.decode_bytes)} per token at "
        f"{profile.hardware.bandwidth_gb_s:g} GB/s",
    )
    table.add_row("prefill", "limited by computation, not memory: no prediction", end_section=True)
    for role, size in sorted(predicted.by_role.items(), key=lambda item: -item[1]):
        table.add_row(f"{role}: {predicted.precision[role]}", _gb(size))
    return table


def compare_table(found: list[Prediction]) -> Table:
    """One model on many profiles, or many models on one; sizes in GB, of 1024 tokens in MB."""
    one_model = len({row.model for row in found}) == 1
    title = found[0].model if one_model else f"profile {found[0].profile.name}"
    table = Table(title=title)
    table.add_column("profile" if one_model else "model", no_wrap=True)
    for column in ("disk", "load", "of", "MB/1k", "context", "tokens/s", "fits"):
        table.add_column(column, justify="right")
    for row in found:
        name, predicted = row.profile.name if one_model else row.model, row.estimate
        table.add_row(
            name,
            f"{predicted.disk / 1e9:.2f}",
            f"{predicted.load / 1e9:.2f}",
            f"{predicted.budget / 1e9:g}",
            f"{1024 * predicted.cache_per_token / 1e6:.1f}",
            str(predicted.largest_context),
            _rate(predicted.decode_rate),
            "yes" if row.reason is None else "no",
        )
    table.caption = "GB; MB for 1024 tokens of context; largest context that fits; tokens/s at most"
    return table


def matrix_table(found: list[Prediction]) -> Table:
    """Many models on many profiles: decode rates where they fit."""
    models = list(dict.fromkeys(row.model for row in found))
    table = Table("tokens/s, at most", *(model.removeprefix("Qwen3.5-") for model in models), title="models")
    rows: dict[str, list[str]] = {}
    for row in found:
        cell = _rate(row.estimate.decode_rate) if row.reason is None else "-"
        rows.setdefault(row.profile.name, []).append(cell)
    for profile, cells in rows.items():
        table.add_row(profile, *cells)
    return table


def release_table(found: Iterable[Planned]) -> Table:
    """What a release would take."""
    table = Table("artifact", "what", "why", "disk", "memory", title="release")
    for one in found:
        reasons = "; ".join(one.todo.reasons)
        what = "make" if reasons else "verify" if one.todo.verify else "unchanged"
        table.add_row(one.combination.label, what, reasons, _gb(one.estimate.disk), _gb(one.memory))
    table.caption = "size of the artifact; memory of the machine that makes and verifies it"
    return table


def outcome_table(found: Iterable[Outcome]) -> Table:
    """What became of a release."""
    table = Table("artifact", "state", "verified", "pushed to", title="release")
    for one in found:
        verified = "" if one.passed is None else "passed" if one.passed else "below the bar"
        target = one.planned.combination.push if one.pushed else ""
        table.add_row(one.planned.combination.label, one.state, verified, target)
    return table


def inspection_tables(found: Mapping[str, Any]) -> tuple[Table, Table]:
    """Sizes by role, and which providers have kernels for the graphs, or which devices are here."""
    made = found.get("lowering", export_backend(found["backend"]).title)
    title = f"{found['model']['name']} for {found['profile']}: {made}, context {found['context_length']}"
    ways = {"adapters": "merged", "switched_adapters": "switched at run time"}
    adapters = [f"{one['name']} ({way})" for field, way in ways.items() for one in found.get(field, [])]
    caption = f"adapters: {', '.join(adapters)}" if adapters else None
    roles = Table("role", "precision", "size", title=title, caption=caption)
    for role, entry in sorted(found["roles"].items(), key=lambda item: -item[1]["bytes"]):
        stored = ", ".join(f"{count} {kind}" for kind, count in found.get("stored", {}).get(role, {}).items())
        roles.add_row(role, entry["precision"] + (f" ({stored})" if stored else ""), _gb(entry["bytes"]))
    roles.add_row("all files", "", _gb(found["bytes"]))
    return roles, _providers_table(found) if "providers" in found else _devices_table(found)


def gguf_table(found: Mapping[str, Any]) -> Table:
    """What a GGUF file holds, by the type of its tensors."""
    geometry = f"{found['layers']} layers, context {found['context_length']}"
    title, caption = f"{found['file']}: {found['architecture']}, {geometry}", "\n".join(found["notes"])
    table = Table("type", "tensors", "size", "an export", title=title, caption=caption or None)
    for kind, entry in sorted(found["types"].items(), key=lambda item: -item[1]["bytes"]):
        table.add_row(kind, str(entry["tensors"]), _gb(entry["bytes"]), entry["export"])
    return table


def _devices_table(found: Mapping[str, Any]) -> Table:
    table = Table("device", "runs", "why", title=f"made with OpenVINO {found['openvino']}")
    for name, entry in found["devices"].items():
        table.add_row(name, "yes" if entry["runs"] else "no", entry["reason"])
    return table


def _providers_table(found: Mapping[str, Any]) -> Table:
    providers = Table(
        "provider", "runs", "nodes with a kernel", "missing", title=f"onnxruntime {found['onnxruntime']}"
    )
    for name, entry in found["providers"].items():
        if entry["covered"] is None:
            unknown = entry["runs"] is None
            kernels = "its kernels are not known" if unknown else "none for this lowering"
            providers.add_row(name, "unknown" if unknown else "no", kernels, "")
            continue
        missing = ", ".join(f"{count} {operator}" for operator, count in entry["missing"].items())
        covered = f"{entry['covered']} of {entry['nodes']}"
        providers.add_row(name, "yes" if entry["runs"] else "no", covered, missing)
    return providers


def _gb(size: int) -> str:
    return (
        f"{size / 1e9:.1f} GB"
        if size >= 1e10
        else f"{size / 1e9:.2f} GB"
        if size >= 1e8
        else f"{size / 1e6:.1f} MB"
    )


def _rate(rate: float) -> str:
    return f"{rate:.1f}" if rate < 10 else f"{rate:.0f}"


def report_table(report: Mapping[str, Any]) -> Table:
    """A report.json's figures beside the bar."""
    run, weights, bar = report["run"], report["weights"], report["bar"]
    where = f"as run ({run['provider']})" if run else "not run"
    table = Table("", where, "its weights alone", "checkpoint", "bar")

    def row(what: str, key: str, form: str, truth: str, wanted: str) -> None:
        table.add_row(what, form.format(run[key]) if run else "", form.format(weights[key]), truth, wanted)

    row("KL divergence, nats", "kl_divergence", "{:.4f}", "0", f"at most {bar['max_kl_divergence']:g}")
    row("same likeliest token", "top1_agreement", "{:.1%}", "", f"at least {bar['min_top1_agreement']:.0%}")
    row("perplexity", "perplexity", "{:.2f}", f"{report['reference']['perplexity']:.2f}", "")
    return table
