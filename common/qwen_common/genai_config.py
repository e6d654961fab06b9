"""What a genai_config.json, an overlay of one, or a manifest's `runtime` may say: data, nothing that runs.

ONNX Runtime GenAI's configuration can name libraries to load, files to write, and places anywhere on the
disk. What is listed here is what artifacts need; the rest is refused by name before a library reads the file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qwen_common.errors import UserError, one_line
from qwen_common.manifest import ADVICE, MANIFEST
from qwen_common.providers import PROVIDERS, named

_SHOWN = 100  # characters of a name in a message
_GRAPH = ".onnx"  # what ONNX Runtime reads as protobuf, whose references are checked; .ort's are not
# A file's place in C's printf, which GenAI formats with a layer's number.
_TENSOR_NAME = re.compile(r"[^%]*(%d[^%]*)?")
_OPTION = re.compile(r"[A-Za-z0-9_.,:;=+\- ]{0,200}")  # no path, no address

# Kinds of values: numbers and words, one or a list of them; numbers alone; the name of a graph, or of another
# file; names of a graph's inputs and outputs; options of providers.
_WORDS, _NUMBERS = "words", "numbers"
_GRAPH_FILE, _FILE = "graph", "file"
_TENSORS, _OPTIONS = "tensors", "options"
_SEARCH = {"*": _NUMBERS}
_SESSION = {
    **dict.fromkeys(("intra_op_num_threads", "inter_op_num_threads"), _NUMBERS),
    **dict.fromkeys(("log_severity_level", "log_verbosity_level"), _NUMBERS),
    **dict.fromkeys(("enable_cpu_mem_arena", "enable_mem_pattern"), _NUMBERS),
    "graph_optimization_level": _WORDS,
    **dict.fromkeys(("session.intra_op.allow_spinning", "session.intra_op.spin_duration_us"), _WORDS),
    "provider_options": _OPTIONS,
}
_DECODER = {
    "filename": _GRAPH_FILE,
    "session_options": _SESSION,
    **dict.fromkeys(("hidden_size", "head_size", "num_hidden_layers"), _NUMBERS),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), _NUMBERS),
    "layer_types": _WORDS,
    "inputs": _TENSORS,
    "outputs": _TENSORS,
}
_MODEL = {
    "type": _WORDS,
    **dict.fromkeys(("vocab_size", "context_length"), _NUMBERS),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _WORDS),
    **dict.fromkeys(("image_token_id", "video_token_id", "vision_start_token_id"), _WORDS),
    "decoder": _DECODER,
    "embedding": {"filename": _GRAPH_FILE, "inputs": _TENSORS, "outputs": _TENSORS},
    "vision": {
        "filename": _GRAPH_FILE,
        "config_filename": _FILE,
        **dict.fromkeys(("spatial_merge_size", "patch_size"), _NUMBERS),
        "inputs": _TENSORS,
        "outputs": _TENSORS,
    },
}
_CONFIG = {"model": _MODEL, "search": _SEARCH}


def check_config(content: Mapping[str, Any], where: Path, files: Collection[str], name: str = "") -> None:
    """Refuse whatever in `content` is not on the list above.

    Args:
        where: the file that it came from.
        files: names that the manifest lists.
        name: of `content` itself, in messages.

    Raises:
        UserError: names the field.
    """
    _Checker(where, files).fields(content, _CONFIG, name)


class _Checker:
    def __init__(self, where: Path, files: Collection[str]) -> None:
        self._where, self._files = where, files

    def fields(self, content: Any, allowed: Mapping[str, Any], name: str) -> None:
        if not isinstance(content, dict):
            raise self._malformed(name)
        for key, value in content.items():
            path = f"{name}.{key}" if name else key
            kind = allowed.get(key, allowed.get("*"))
            if kind is None:
                raise self._refused(path)
            if isinstance(kind, dict):
                self.fields(value, kind, path)
            else:
                self._value(value, kind, path)

    def _value(self, value: Any, kind: str, path: str) -> None:
        if kind in (_FILE, _GRAPH_FILE):
            self._file(value, kind, path)
        elif kind == _TENSORS:
            self._tensors(value, path)
        elif kind == _OPTIONS:
            self._provider_options(value, path)
        else:
            parts = value if isinstance(value, list) else [value]
            refused = (dict, list, str) if kind == _NUMBERS else (dict, list)
            if any(isinstance(part, refused) for part in parts):
                raise self._malformed(path)

    def _file(self, value: Any, kind: str, path: str) -> None:
        if not isinstance(value, str) or (kind == _GRAPH_FILE and not value.endswith(_GRAPH)):
            raise self._malformed(path)
        if value not in self._files:
            manifest = self._where.with_name(MANIFEST)
            raise UserError(f"{manifest} does not list {_shown(value)}: export the artifact again")

    def _tensors(self, value: Any, path: str) -> None:
        if not isinstance(value, dict):
            raise self._malformed(path)
        for key, name in value.items():
            if not isinstance(name, str) or not _TENSOR_NAME.fullmatch(name):
                raise self._malformed(f"{path}.{key}")

    def _provider_options(self, value: Any, path: str) -> None:
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise self._malformed(path)
        for index, entry in enumerate(value):
            for provider, options in entry.items():
                if (record := named(provider)) is None or not isinstance(options, dict):
                    raise self._refused(f"{path}.{index}.{provider}")
                for option, setting in options.items():
                    if fault := option_fault(record.key, option, setting):
                        raise UserError(f"{self._where}: {fault}: {ADVICE}")

    def _refused(self, path: str) -> UserError:
        return UserError(f"{self._where} sets '{_shown(path)}', which an artifact may not: {ADVICE}")

    def _malformed(self, path: str) -> UserError:
        return UserError(f"{self._where} has no valid '{_shown(path)}': {ADVICE}")


def option_fault(provider: str, option: str, setting: object) -> str | None:
    """Why an artifact, or a profile, may not ask this of an execution provider; None: it may.

    Args:
        setting: a string, where what it came from is sound.
    """
    record = PROVIDERS[provider]
    if option not in record.settings and option not in record.options:
        return f"'{_shown(option)}' of {provider} is not an option that an artifact may set"
    if isinstance(setting, str) and not _OPTION.fullmatch(setting):
        return f"'{_shown(option)}' of {provider} has a value that an artifact may not set"
    return None


def _shown(text: str) -> str:
    return one_line(text[:_SHOWN])
