"""A model as it is, and with each of its adapters: the same weights, and never the same kept states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwen_common.errors import UserError
from qwen_common.providers import CPU

from qwen_runtime.artifact import Artifact
from qwen_runtime.backends.protocol import AdaptableBackend, Backend
from qwen_runtime.reading import PromptReader
from qwen_runtime.switched import SwitchedAdapter, no_adapter


@dataclass(frozen=True)
class Variant:
    """What makes answers, and what reads their prompts."""

    backend: Backend
    reader: PromptReader


class Variants:
    """Those of one artifact by the adapter's name; None: without any."""

    def __init__(
        self, artifact: Artifact, base: Variant, adapters: Mapping[str, SwitchedAdapter], asked: bool
    ) -> None:
        """Args:
        asked: somebody counts on the adapters.

        Raises:
            UserError: then, the provider is none for adapters. Also, the library does not take one.
        """
        self._artifact = artifact
        self._provider = base.backend.provider
        self._found: dict[str | None, Variant] = {None: base}
        if asked and adapters and self._provider != CPU.key:
            raise self._none(next(iter(adapters)))
        if self._provider == CPU.key and isinstance(base.backend, AdaptableBackend):
            for name, adapter in adapters.items():
                backend = base.backend.adapted(adapter)
                self._found[name] = Variant(backend, base.reader.adapted(backend, adapter))

    def __getitem__(self, name: str | None) -> Variant:
        """Raises:
        UserError: there is no such adapter, or not on this provider.
        """
        if name not in self._found:
            raise self._none(name)
        return self._found[name]

    def _none(self, name: str | None) -> UserError:
        if self._provider != CPU.key and self._artifact.manifest.get("switched_adapters"):
            return UserError(
                f"adapters were tried on the CPU only, not on {self._provider}: take --provider cpu"
            )
        return no_adapter(self._artifact, name, (name for name in self._found if name is not None))
