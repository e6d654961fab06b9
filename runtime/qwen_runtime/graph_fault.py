"""Whether a provider may run an artifact's graph: some would take it, and answer wrongly without an error."""

from __future__ import annotations

from qwen_common.manifest import further_graphs
from qwen_common.onnx_references import references
from qwen_common.providers import CPU, Provider

from qwen_runtime.artifact import Artifact


def graph_fault(artifact: Artifact, provider: Provider) -> str | None:
    """Why an execution provider must not run the graphs that it would take; None where it may.

    Operators are looked for in the graphs themselves: no manifest lists them.
    """
    if provider == CPU:
        return None
    lowering = (further_graphs(artifact.manifest, provider.key) or artifact.manifest)["lowering"]
    if lowering not in provider.lowerings:
        return f"{provider.title} has no kernels for the artifact's graph, which is {lowering}"
    if artifact.manifest["settings"].get("cache_dtype") == "int8" and not provider.int8_cache:
        return f"the artifact's KV cache is in int8, and {provider.title} has not been shown to take one"
    for name in artifact.graphs(provider.key) if provider.wrong else []:
        if wrong := provider.wrong & references(artifact.root / name).operators:
            return f"{provider.title} computes {min(wrong)} wrongly, which {name} has"
    return None
