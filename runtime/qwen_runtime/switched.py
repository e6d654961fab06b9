"""Adapters that an artifact keeps apart from its weights, one of which may be active at a time."""

from __future__ import annotations

from qwen_common.errors import UserError
from qwen_common.providers import CPU

from qwen_runtime.artifact import Artifact
from qwen_runtime.backends.protocol import AdaptedBackend, Backend


def activate(artifact: Artifact, backend: Backend, name: str | None) -> None:
    """Let the generators that `backend` makes have the adapter `name`; None: none.

    Raises:
        UserError: the artifact has no adapter of that name, or the backend takes none, or not on its
            provider.
    """
    files = {found["name"]: found["file"] for found in artifact.manifest.get("switched_adapters", [])}
    if name is not None and name not in files:
        has = ", ".join(files) or "none: export it again with --adapter-at-runtime"
        raise UserError(f"{artifact.root} has no adapter {name}, it has {has}")
    if name is not None and backend.provider != CPU.key:
        raise UserError(
            f"adapters were tried on the CPU only, not on {backend.provider}: take --provider cpu"
        )
    if isinstance(backend, AdaptedBackend):
        backend.use_adapter(None if name is None else files[name])
    elif name is not None:
        raise UserError("a model whose states are kept on disk takes no adapter: leave --state-dir off")
