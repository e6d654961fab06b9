"""Who may import whom (docs/architecture.md), read from the source.

Imports inside functions count as others do, those for type checkers alone do not.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "qwen_common": "common",
    "qwen_profiles": "profiles",
    "qwen_launcher": "runtime",
    "qwen_runtime": "runtime",
    "qwen_export": "exporter",
    "benchmarks": ".",
    "tests": ".",
}
PRODUCT = ("qwen_common", "qwen_profiles", "qwen_launcher", "qwen_runtime", "qwen_export")
STANDARD_LIBRARY_ONLY = ("qwen_common", "qwen_launcher")
MAY_IMPORT = {
    "qwen_common": (),
    "qwen_profiles": ("qwen_common",),
    "qwen_launcher": ("qwen_common",),
    "qwen_runtime": ("qwen_common", "qwen_profiles", "qwen_launcher"),
    "qwen_export": ("qwen_common", "qwen_profiles"),
    "benchmarks": PRODUCT,
    "tests": (*PRODUCT, "benchmarks"),
}
# What else imports what, and why.
EXCEPTIONS = {
    ("qwen_export.verify", "qwen_runtime"): "an artifact is proved by what runs it",
    (
        "qwen_export.bundle",
        "qwen_runtime",
    ): "a bundle is written for what opens it on the kiosk",
    ("qwen_export.bundle", "qwen_launcher"): "as above: the launcher opens it first",
    ("qwen_export.backends.onnx.beside", "qwen_runtime"): "an adapter is proved by what opens it",
    (
        "qwen_export.backends.openvino.inspection",
        "qwen_runtime.backends.openvino",
    ): "which device an artifact runs on is the runtime's choice",
    ("qwen_export.registry_push", "qwen_runtime"): "a registry gets what a device pulls",
    ("qwen_export", "qwen_runtime.tokenizer"): "text is encoded as answers encode it",
    ("qwen_export.checkpoint", "qwen_runtime.template"): "a chat template is read by what renders it",
    ("qwen_export.gguf", "qwen_runtime.template"): "a chat template is written where that looks for it",
}
NEVER_IN_THE_RUNTIME = ("torch", "transformers", "onnx", "onnx_ir")
MOST_LINES = 400
# Tests that start at once: to collect them needs no PyTorch.
LIGHT = (
    "tests.conftest",
    "tests.common",
    "tests.exporter.planner",
    "tests.exporter.test_output",
    "tests.exporter.test_recorded_logits",
    "tests.profiles",
    "tests.runtime.conftest",
    "tests.runtime.kiosk",
    "tests.runtime.serve",
    "tests.runtime.tool_calls",
)


@dataclass(frozen=True)
class Module:
    path: Path
    imports: frozenset[str]  # a module's full name where it is one of ours, else as the statement has it
    at_start: frozenset[str]  # those of them that no function delays


def read_modules(root: Path) -> dict[str, Module]:
    paths = {}
    for package, folder in FOLDERS.items():
        for path in sorted((root / folder / package).rglob("*.py")):
            name = ".".join(path.relative_to(root / folder).with_suffix("").parts)
            paths[name.removesuffix(".__init__")] = path
    modules = {}
    for name, path in paths.items():
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        found = list(imports(ast.parse(path.read_text(encoding="utf-8")), package, paths))
        modules[name] = Module(
            path,
            frozenset(target for target, _ in found) - {name},
            frozenset(target for target, delayed in found if not delayed),
        )
    return modules


def imports(
    tree: ast.AST, package: str, ours: Collection[str], delayed: bool = False
) -> Iterator[tuple[str, bool]]:
    """(what is imported, whether only when a function is called), for code of a module in `package`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, delayed
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            module = ".".join(filter(None, [*above, node.module]))
            for alias in node.names:
                full = f"{module}.{alias.name}"
                yield full if full in ours else module, delayed
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for statement in node.orelse:
                yield from imports(ast.Module([statement], []), package, ours, delayed)
        else:
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                yield from ((word.value, delayed) for word in node.args[:1] if isinstance(word, ast.Constant))
            yield from imports(node, package, ours, delayed or function)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def faults(root: Path) -> Iterator[str]:
    """A line for whatever breaks the rules above."""
    modules = read_modules(root)
    try:
        TopologicalSorter({name: found.imports & modules.keys() for name, found in modules.items()}).prepare()
    except CycleError as error:
        yield f"a circle: {' -> '.join(reversed(error.args[1]))}"
    used = set()
    for name, module in modules.items():
        own = name.partition(".")[0]
        for target in sorted(module.imports):
            top = target.partition(".")[0]
            reasons = {pair for pair in EXCEPTIONS if within(name, pair[0]) and within(target, pair[1])}
            used |= reasons
            if (
                (top in FOLDERS and top not in (own, *MAY_IMPORT[own]) and not reasons)
                or (own in STANDARD_LIBRARY_ONLY and top not in (*FOLDERS, *sys.stdlib_module_names))
                or (own == "qwen_runtime" and top in NEVER_IN_THE_RUNTIME)
            ):
                yield f"{name} imports {target}"
        lines = module.path.read_text(encoding="utf-8").count("\n")
        if own in PRODUCT and lines > MOST_LINES:
            yield f"{name} has {lines} lines, more than {MOST_LINES}: two ideas?"
        if any(within(name, light) for light in LIGHT) and (way := way_to_torch(name, modules)):
            yield f"{' -> '.join(way)}: import it where it is used"
    for who, what in sorted(EXCEPTIONS.keys() - used):
        yield f"{who} no longer imports {what}: no exception is needed"


def way_to_torch(name: str, modules: dict[str, Module]) -> list[str]:
    """The shortest chain of imports from `name` to PyTorch when it is imported; empty where there is none."""
    ways, seen = [[name]], {name}
    for way in ways:  # grows as it is walked
        for target in sorted(modules[way[-1]].at_start):
            if target.partition(".")[0] in ("torch", "transformers") or target == "safetensors.torch":
                return [*way, target]
            if target in modules and target not in seen:
                seen.add(target)
                ways.append([*way, target])
    return []


def test_this_tree() -> None:
    assert list(faults(ROOT)) == []


INSPECTION = "exporter/qwen_export/backends/openvino/inspection.py"
GOOD = {
    "common/qwen_common/__init__.py": "",
    "common/qwen_common/errors.py": "import json",
    "profiles/qwen_profiles/schema.py": "import pydantic\nfrom qwen_common.errors import UserError",
    "runtime/qwen_runtime/__init__.py": "from qwen_runtime.model import Model",
    "runtime/qwen_runtime/model.py": (
        "from typing import TYPE_CHECKING\nfrom qwen_profiles import schema\n"
        "if TYPE_CHECKING:\n    import torch\n    import qwen_export.export\nelse:\n    import numpy\n"
    ),
    "runtime/qwen_runtime/backends/openvino.py": "from .. import model",
    "runtime/qwen_runtime/template.py": "import jinja2",
    "runtime/qwen_runtime/tokenizer.py": "import tokenizers",
    "exporter/qwen_export/export.py": "from qwen_profiles.schema import Profile",
    "exporter/qwen_export/checkpoint/text_files.py": "from qwen_runtime import template, tokenizer",
    "exporter/qwen_export/gguf/tokenizer.py": "from qwen_runtime import template",
    "exporter/qwen_export/verify/run.py": "def run():\n    from qwen_runtime import Model",
    "exporter/qwen_export/bundle/write.py": "import qwen_runtime.model\nfrom qwen_launcher import bundle",
    "exporter/qwen_export/registry_push.py": "from qwen_runtime import model",
    "exporter/qwen_export/backends/onnx/beside.py": "from qwen_runtime import model",
    "runtime/qwen_launcher/bundle.py": "import hashlib\nfrom qwen_common.errors import UserError",
    INSPECTION: "from qwen_runtime.backends.openvino import DEVICES",
    "benchmarks/decode.py": "import torch\nfrom qwen_export.export import export",
    "tests/support/random.py": "import torch",
    "tests/runtime/serve/test_serve.py": "def test():\n    from tests.support import random",
    "tests/exporter/test_export.py": "import torch\nfrom benchmarks import decode",
}


# A line that one change makes: the file that is changed, and what stands there then.
FAULTS = {
    "a circle: qwen_runtime -> qwen_runtime.model -> qwen_runtime": (
        "runtime/qwen_runtime/model.py",
        "def late():\n    from . import Model",
    ),
    "a circle: qwen_runtime.model -> qwen_runtime.backends.openvino -> qwen_runtime.model": (
        "runtime/qwen_runtime/model.py",
        "from importlib import import_module\nimport_module('qwen_runtime.backends.openvino')",
    ),
    "qwen_common.errors imports numpy": ("common/qwen_common/errors.py", "import numpy"),
    "qwen_launcher.bundle imports cryptography.hazmat": (
        "runtime/qwen_launcher/bundle.py",
        "def late():\n    from cryptography.hazmat import x",
    ),
    "qwen_common.errors imports qwen_runtime.backends": (
        "common/qwen_common/errors.py",
        "class Late:\n    import qwen_runtime.backends",
    ),
    "qwen_profiles.schema imports qwen_export": (
        "profiles/qwen_profiles/schema.py",
        "from qwen_export import verify",
    ),
    "qwen_runtime.backends.openvino imports qwen_export.export": (
        "runtime/qwen_runtime/backends/openvino.py",
        "try:\n    from qwen_export.export import export\nexcept ImportError:\n    pass",
    ),
    "qwen_runtime.model imports torch.nn": (
        "runtime/qwen_runtime/model.py",
        "def late():\n    import torch.nn",
    ),
    "qwen_export.export imports qwen_runtime.model": (
        "exporter/qwen_export/export.py",
        "import qwen_runtime.model",
    ),
    "qwen_export.backends.openvino.inspection imports qwen_runtime.model": (
        INSPECTION,
        "from qwen_runtime.backends.openvino import DEVICES\nfrom qwen_runtime import model",
    ),
    "qwen_export.bundle no longer imports qwen_runtime: no exception is needed": (
        "exporter/qwen_export/bundle/write.py",
        "from qwen_launcher import bundle",
    ),
    "benchmarks.decode imports tests.support.random": (
        "benchmarks/decode.py",
        "from tests.support import random",
    ),
    "qwen_export.export has 401 lines, more than 400: two ideas?": (
        "exporter/qwen_export/export.py",
        "\n" * 401,
    ),
    "tests.runtime.serve.test_serve -> tests.support.random -> torch: import it where it is used": (
        "tests/runtime/serve/test_serve.py",
        "from tests.support import random",
    ),
}


def write(root: Path, tree: dict[str, str]) -> Path:
    for name, text in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_what_keeps_to_the_rules_is_left_alone(tmp_path: Path) -> None:
    assert list(faults(write(tmp_path, GOOD))) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_what_breaks_a_rule_is_named(fault: str, tmp_path: Path) -> None:
    path, text = FAULTS[fault]
    assert list(faults(write(tmp_path, GOOD | {path: text}))) == [fault]
