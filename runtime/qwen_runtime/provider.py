"""Which execution provider runs the artifact on this machine, and why."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qwen_common.errors import UserError
from qwen_common.providers import CPU, PROVIDERS, Provider

from qwen_runtime import plugins

T = TypeVar("T")

# What ONNX Runtime says, in words of what it means here.
_CAUSES = {
    "is not supported in this build": "it finds no device here",  # of a plug-in that is registered
    # Of the onnxruntime that ONNX Runtime GenAI has loaded, where that has no DirectML.
    "Specified provider is not supported": "the onnxruntime that is installed has none: "
    "pip uninstall onnxruntime, then pip install onnxruntime-windowsml",
    "requires f16 but the device": "its device has no float16: export with --set activation_dtype=float32",
    "Failed to get a WebGPU adapter": "it finds no graphics device here: install its driver",
}
# Of a library that does not load, by ONNX Runtime GenAI and by ONNX Runtime: the system's words among theirs.
_LIBRARY = re.compile(
    r'(?:Error loading "|Failed to load library )(?P<path>.+?)(?:":| with error:) (?:(?P=path): )?'
    r"(?P<why>.+?)(?: The required hardware or driver|\n|$)"
)
# What glibc says of a file that is there, but for another processor.
_NOT_FOUND = "cannot open shared object file: No such file or directory"
_LONGEST_CAUSE = 240  # characters; OpenVINO's fill a page


@dataclass(frozen=True)
class Choice:
    """A provider by its key in `PROVIDERS`, and the reason in one line."""

    name: str
    reason: str


def load_first(
    wanted: str,
    made_for: str,
    og: Any,
    load: Callable[[str], T],
    fallbacks: Sequence[str] = (),
    fault: Callable[[Provider], str | None] = lambda provider: None,
) -> tuple[Choice, T]:
    """What `load` returns for the first provider that it succeeds with.

    Args:
        wanted: a key of `PROVIDERS`, or "auto" for the one that the artifact was made for, its
            fallbacks, then the others of this install, in the order of `PROVIDERS`, and the CPU last.
        made_for: the artifact's provider.
        og: the module onnxruntime_genai.
        load: called with a provider's key; may raise anything.
        fallbacks: the artifact's, in the order in which they are tried.
        fault: why the artifact's graph must not be run on a provider; None: it may.

    Raises:
        UserError: no such provider, or one that was asked for by name is not in this install, cannot load
            the artifact or must not run it. What the CPU raises is passed on.
    """
    refusals: list[str] = []
    for name in _candidates(wanted, made_for, fallbacks):
        provider = PROVIDERS[name]
        if found := fault(provider):
            if wanted != "auto":
                raise UserError(
                    f"{found}: take --provider auto, or export with a profile for {provider.title}"
                )
            if name == made_for or name in fallbacks:
                refusals.append(found)
            continue
        if not is_available(provider, og):
            missing = f"{provider.title} is not in this install"
            if wanted != "auto":
                raise UserError(f"{missing}: {provider.advice}")
            if name == made_for or name in fallbacks:  # the others were never promised
                refusals.append(f"{missing} ({provider.package} has it)")
            continue
        try:
            plugins.register(provider, og)
            loaded = load(name)
        except Exception as error:
            if name == CPU.key:
                raise
            if wanted != "auto":
                raise UserError(f"{provider.title} could not load the artifact: {cause(error)}") from error
            refusals.append(f"{provider.title} did not start ({cause(error)})")
            continue
        reason = "; ".join(refusals) or ("asked for" if wanted != "auto" else "the artifact was made for it")
        return Choice(name, f"{provider.title}: {reason}"), loaded
    raise AssertionError("the CPU is a candidate, and loads or raises")


def _candidates(wanted: str, made_for: str, fallbacks: Sequence[str]) -> Iterator[str]:
    if wanted != "auto":
        if wanted not in PROVIDERS:
            raise UserError(f"no provider '{wanted}': there are auto, {', '.join(PROVIDERS)}")
        yield wanted
        return
    if made_for not in PROVIDERS:
        raise UserError(
            f"the artifact was made for '{made_for}', which this qwen-edge does not know: "
            "install a newer one, or choose another provider"
        )
    if made_for != CPU.key:
        known = (name for name in (made_for, *fallbacks, *PROVIDERS) if name in PROVIDERS)
        yield from (name for name in dict.fromkeys(known) if name != CPU.key)
    yield CPU.key


def is_available(provider: Provider, og: Any) -> bool:
    """Whether this install has it. ONNX Runtime GenAI's own answer is yes for every plug-in."""
    if provider.plugin is not None:
        return plugins.is_here(provider)
    return provider.probe is None or bool(getattr(og, provider.probe)())


def cause(error: Exception) -> str:
    """What a library's error means here, in one line."""
    text = str(error)
    if library := _LIBRARY.search(text):
        path, why = library["path"], library["why"]
        if why == _NOT_FOUND:
            why = "it is for another processor" if Path(path).is_file() else "there is no such file"
        text = f"{path}: {why}"
    known = next((meaning for said, meaning in _CAUSES.items() if said in text), None)
    return known or textwrap.shorten(text, _LONGEST_CAUSE)
