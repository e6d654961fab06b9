"""What an ONNX artifact's graphs hold, and which execution providers have kernels for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from qwen_common.errors import UserError
from qwen_common.manifest import Manifest, further_graphs
from qwen_common.providers import PROVIDERS

from qwen_export.backends.onnx.files import ANSWERING_FILES
from qwen_export.backends.onnx.kernels import KERNELS

# The type of what com.microsoft's operators take; others take indices and shapes too.
_TENSORS = {"float32": "tensor(float)", "float16": "tensor(float16)"}


def inspect_graphs(artifact: Path, manifest: Manifest) -> dict[str, Any]:
    """`graphs`, `operators`: nodes by file and by kind; `providers`: for each execution provider the nodes of
    the graphs that it takes, how many it has kernels for, those that it lacks by operator, and whether it
    `runs` the artifact: null where its kernels are not known and it takes the graphs' lowering.

    Raises:
        UserError: a file cannot be read.
    """
    graphs = {name: _operators(artifact / name) for name in sorted(manifest["files"]) if _is_graph(name)}
    total = _sum(graphs.values())
    return {
        "graphs": {name: sum(operators.values()) for name, operators in graphs.items()},
        "operators": {
            f"{domain}::{name}" if domain else name: n for (domain, name), n in total.most_common()
        },
        "providers": {
            provider: _coverage(
                provider,
                (further_graphs(manifest, provider) or manifest)["lowering"],
                _sum(graphs[name] for name in _taken(manifest, provider)),
                manifest["activation_dtype"],
            )
            for provider in PROVIDERS
        },
    }


def _coverage(
    provider: str, lowering: str, operators: Counter[tuple[str, str]], dtype: str
) -> dict[str, Any]:
    nodes, kernels, record = sum(operators.values()), KERNELS[provider], PROVIDERS[provider]
    if kernels is None:
        return {
            "runs": None if lowering in record.lowerings else False,
            "nodes": nodes,
            "covered": None,
            "missing": {},
        }
    taken = {_TENSORS[dtype]} | ({_TENSORS["float32"]} if record.casts_float16 else set())
    missing = {
        name: count
        for (domain, name), count in operators.items()
        if name not in kernels.get(domain, {})
        or (domain and (name in record.lacks or kernels[domain][name].isdisjoint(taken)))
    }
    covered = nodes - sum(missing.values())
    return {"runs": not missing, "nodes": nodes, "covered": covered, "missing": missing}


def _taken(manifest: Manifest, provider: str) -> list[str]:
    """Names of the graphs that an execution provider takes."""
    others = {name for further in manifest.get("further_graphs", []) for name in further["files"].values()}
    main = [name for name in manifest["files"] if _is_graph(name) and name not in others]
    further = further_graphs(manifest, provider)
    if further is None:
        return main
    return [further["files"].get(name, name) for name in main if name in ANSWERING_FILES]


def _sum(counts: Iterable[Counter[tuple[str, str]]]) -> Counter[tuple[str, str]]:
    return sum(counts, Counter[tuple[str, str]]())


def _is_graph(name: str) -> bool:
    return name.endswith(".onnx")


def _operators(graph: Path) -> Counter[tuple[str, str]]:
    """(domain, operator) of every node, those in the bodies of control flow too."""
    try:
        found = onnx.load(graph, load_external_data=False).graph
    except (OSError, DecodeError) as error:
        raise UserError(f"{graph} cannot be read ({error}): copy the artifact again") from error
    return _nodes(found)


def _nodes(graph: onnx.GraphProto) -> Counter[tuple[str, str]]:
    counts = Counter((node.domain, node.op_type) for node in graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                counts += _nodes(attribute.g)
    return counts
