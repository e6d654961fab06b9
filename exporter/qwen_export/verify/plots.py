"""The report's pictures, from report.json alone."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_INK, _SECOND, _BAR = "#3b6ea5", "#c9803c", "#a33"


def plots(report: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG by file name."""
    drawn = {
        "report-kl-by-position.png": _by_position,
        "report-roles.png": _roles,
        "report-layers.png": draw_layers,
    }
    if report["run"]:
        drawn["report-speed.png"] = _speed
    return {name: _png(draw, report) for name, draw in drawn.items()}


def _png(draw: Any, report: Mapping[str, Any]) -> bytes:
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    draw(figure, report)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _axes(figure: Figure, *where: int, title: str, x: str = "", y: str = "") -> Axes:
    axes = figure.add_subplot(*where)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _by_position(figure: Figure, report: Mapping[str, Any]) -> None:
    axes = _axes(figure, title="KL divergence, mean over texts", x="tokens before", y="nats")
    first = report["text"]["prompt"]
    for name, label, colour in (("run", "as run", _INK), ("weights", "its weights alone", _SECOND)):
        if report[name]:
            values = report[name]["kl_by_position"]
            axes.plot(range(first, first + len(values)), values, label=label, color=colour, linewidth=1)
    bar = report["bar"]["max_kl_divergence"]
    axes.axhline(bar, color=_BAR, linestyle="--", linewidth=1, label="bar, for the mean")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)


def _roles(figure: Figure, report: Mapping[str, Any]) -> None:
    roles = report["roles"]
    names = [role["role"] for role in roles]
    left = _axes(figure, 1, 2, 1, title="KL divergence of the role alone", x="nats")
    # On a logarithmic axis, because one role is often a hundred times the others; float ones have no bar.
    left.barh(names, [role["kl_divergence"] or np.nan for role in roles], color=_INK)
    left.set_xscale("log")
    right = _axes(figure, 1, 2, 2, title="Size", x="MB")
    right.barh(names, [role["bytes"] / 1e6 for role in roles], color=_SECOND)
    for axes in (left, right):  # the same rows on both, with or without a bar
        axes.set_ylim(len(names) - 0.5, -0.5)
    right.set_yticklabels([])


def draw_layers(figure: Figure, report: Mapping[str, Any]) -> None:
    axes = _axes(figure, title="Error of the layer's output", x="layer", y="relative")
    for role in sorted({layer["role"] for layer in report["layers"]}):
        points = [(layer["layer"], layer["error"]) for layer in report["layers"] if layer["role"] == role]
        axes.plot(*zip(*points, strict=True), "o", label=role, markersize=3)
    if any(layer["error"] > 0 for layer in report["layers"]):  # not with a checkpoint's own codes
        axes.set_yscale("log")
    if report["layers"]:
        axes.legend(frameon=False, fontsize=8)


def _speed(figure: Figure, report: Mapping[str, Any]) -> None:
    run, weight_bytes = report["run"], report["decode_bytes"]
    axes = _axes(figure, title="Decode", x="tokens/s")
    bars = {
        "measured": run["decode_rate"],
        "memory of this machine": run["bandwidth"] / weight_bytes,
        "memory of the profile": report["profile_bandwidth"] / weight_bytes,
    }
    drawn = axes.barh(list(bars), list(bars.values()), color=[_INK, _SECOND, _SECOND])
    axes.bar_label(drawn, fmt="%.0f", padding=3)
    axes.invert_yaxis()
