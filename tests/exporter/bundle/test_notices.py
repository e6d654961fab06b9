"""Licences as SPDX expressions, and the bill of materials with the model in it."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from qwen_common import manifest as manifests
from qwen_common.files import sha256
from qwen_export.bundle.licences import spdx
from qwen_export.bundle.notices import Part, bill_of_materials, licence_texts, model_part, wheel_parts
from qwen_export.bundle.wheels import Wheel
from qwen_runtime import serve
from qwen_runtime.artifact import Artifact

from tests.exporter.bundle.test_own_wheel import wheel

APACHE = "                              Apache License\n                        Version 2.0, January 2004\n"
BSD = "Redistributions of source code must retain the above copyright notice.\n"
MIT = "Permission is hereby granted, free of charge, to any person obtaining a copy of this software and"


@pytest.mark.parametrize(
    "stated,text,expected",
    [
        (["MIT"], "", "MIT"),
        (["mit"], "", "MIT"),
        (["MIT License"], "", "MIT"),
        (["Apache-2.0 OR BSD-3-Clause"], "", "Apache-2.0 OR BSD-3-Clause"),
        (["3-Clause BSD License"], "", "BSD-3-Clause"),
        (["Apache 2.0", "Apache Software License"], "", "Apache-2.0"),
        (["BSD License"], BSD + "Neither the name of the holder", "BSD-3-Clause"),
        (["BSD License"], BSD, "BSD-2-Clause"),
        ([], APACHE, "Apache-2.0"),
        ([], APACHE + MIT, None),
        (["BSD License"], "", None),
        (["Proprietary"], "Redistributable Code", None),
    ],
)
def test_expressions(stated: list[str], text: str, expected: str | None) -> None:
    assert spdx(stated, text) == expected


@pytest.fixture
def model(cpu_artifact: Path, tmp_path: Path) -> Part:
    artifact = shutil.copytree(cpu_artifact, tmp_path / "artifact")
    manifest = manifests.read(artifact)
    manifest["source"] = {"checkpoint": "Qwen/Qwen3.5-0.8B", "revision": "0" * 40}
    manifests.put_files(artifact, manifest, {"LICENSE": (APACHE + "terms of the model").encode()})
    return model_part(Artifact.open(artifact))


def test_the_model_is_a_component(model: Part, tmp_path: Path) -> None:
    parts = [model]
    for name, licence in ("a", "License-Expression: MIT AND Zlib"), ("b", "License: Own terms"):
        metadata = f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{licence}\nLicense-File: LICENSE\n"
        files = {f"{name}-1.0.dist-info/licenses/LICENSE": f"text of {name}"}
        parts += wheel_parts(Wheel(wheel(tmp_path / "wheels", f"{name}-1.0", files, metadata)), "0" * 64)
    text = bill_of_materials("kiosk", "1.0", parts)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    found = {item["name"]: item for item in json.loads(text)["components"]}
    name = model.name
    assert found[name]["type"] == "machine-learning-model"
    assert found[name]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert found[name]["purl"] == f"pkg:huggingface/Qwen/Qwen3.5-0.8B@{'0' * 40}"
    assert found[name]["hashes"][0]["content"] == model.sha256
    assert found["a"]["licenses"] == [{"expression": "MIT AND Zlib"}]
    assert found["b"]["licenses"][0]["license"]["name"] == "Own terms"
    assert found["b"]["licenses"][0]["license"]["text"]["content"] == "text of b"
    notices = licence_texts(parts)
    for words in ("terms of the model", "text of a", f"{name} {'0' * 40}: Apache-2.0", "a 1.0: MIT AND Zlib"):
        assert words in notices


def test_a_folder_of_ones_own_has_no_purl(cpu_artifact: Path) -> None:
    part = model_part(Artifact.open(cpu_artifact))
    assert part.purl is None and part.version == "unknown"


def test_libraries_in_a_wheel_are_components(tmp_path: Path) -> None:
    """The page's, with their licences; a wheel's own are not theirs."""
    folder = Path(serve.__file__).parent / "page" / "vendor"
    files = {f"own/page/vendor/{path.name}": path.read_text() for path in folder.iterdir()}
    files["own-1.0.dist-info/licenses/LICENSE"] = "terms of its own"
    metadata = "Metadata-Version: 2.4\nName: own\nVersion: 1.0\nLicense-Expression: Zlib\n"
    own, *libraries = wheel_parts(Wheel(wheel(tmp_path, "own-1.0", files, metadata)), "0" * 64)
    assert (own.text, own.licence) == ("terms of its own", "Zlib")
    text = bill_of_materials("kiosk", "1.0", [own, *libraries])
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    purls = {item["purl"].partition("@")[0] for item in json.loads(text)["components"]}
    assert purls == {"pkg:pypi/own", "pkg:npm/marked", "pkg:npm/dompurify"}
    for part in libraries:
        assert part.sha256 in {sha256(path) for path in folder.iterdir()}
    notices = licence_texts(libraries)
    assert "marked 18.2.1: MIT AND BSD-3-Clause" in notices and "Copyright (c) 2018+, MarkedJS" in notices
    assert "dompurify 3.4.18: Apache-2.0" in notices and "Version 2.0, January 2004" in notices


def test_a_record_with_backslashes(tmp_path: Path) -> None:
    """As in llguidance's wheel for Windows; its archive has slashes."""
    path = tmp_path / "some-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some-1.0.dist-info/METADATA", "Metadata-Version: 2.4\nName: some\nVersion: 1.0\n")
        archive.writestr("some-1.0.dist-info/licenses/LICENSE", MIT)
        archive.writestr("some-1.0.dist-info/RECORD", "some-1.0.dist-info\\licenses\\LICENSE,,\n")
    (part,) = wheel_parts(Wheel(path), "0" * 64)
    assert part.text == MIT
