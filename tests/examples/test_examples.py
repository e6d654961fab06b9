"""The native examples, compiled and run: with the Linux wheel's library, and as a Windows program on Wine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from qwen_profiles.schema import load_profile
from qwen_runtime import Model, Sampling

from benchmarks.support.artifacts import directml_profile
from benchmarks.support.checkpoints import TINY
from tests.support.exported import Exported
from tests.support.wine import AVAILABLE, REASON, Windows

EXAMPLE = Path(__file__).parents[2] / "examples" / "c"
WARNINGS = ("-Wall", "-Wextra", "-Werror")
COMPILERS = {"c": ("gcc", "-std=c11", *WARNINGS), "cpp": ("g++", "-std=c++17", *WARNINGS)}
QUESTION = "What is yield?"
CSHARP_SOURCE = os.environ.get("QWEN_EDGE_GENAI_CSHARP", "")
# onnxruntime-genai-winml brings its own onnxruntime and DirectML; msvc-runtime is Microsoft's C++ runtime.
WINDOWS_WHEELS = ("onnxruntime-genai-winml==0.18.0", "msvc-runtime==14.44.35112")
NATIVE = ("msvcp140", "msvcp140_1", "msvcp140_2", "msvcp140_atomic_wait", "vcruntime140", "vcruntime140_1")


@pytest.fixture(scope="module", params=["cpu", "strix-halo"])
def artifact(request: pytest.FixtureRequest, exported: Exported) -> Path:
    profile = directml_profile() if request.param == "strix-halo" else load_profile(request.param)
    return exported(TINY, profile)


@pytest.fixture
def overlaid(exported: Exported, tmp_path: Path) -> Path:
    """A folder for several providers, of which the CPU cannot take the main graph."""
    artifact = shutil.copytree(exported(TINY, load_profile("strix-halo")), tmp_path / "overlaid")
    (artifact / "genai_config.dml.json").rename(artifact / "genai_config.cpu.json")
    (artifact / "model.onnx").write_bytes(b"no graph")
    return artifact


def expected(artifact: Path) -> str:
    with Model.load(artifact, "cpu") as model:
        messages = [{"role": "user", "content": QUESTION}]
        return "".join(model.generate(messages, max_tokens=200, sampling=Sampling(temperature=0)))


@pytest.mark.parametrize("language", ["c", "cpp"])
@pytest.mark.skipif(shutil.which("g++") is None, reason="no gcc")
@pytest.mark.skipif(sys.platform != "linux", reason="links the library of the Linux wheel")
def test_native(artifact: Path, overlaid: Path, tmp_path: Path, language: str) -> None:
    packages = Path(sysconfig.get_path("platlib"))
    library = packages / "onnxruntime_genai" / "libonnxruntime-genai.so"
    program = tmp_path / "answer"
    link = [str(library), f"-Wl,-rpath,{library.parent}"]
    source = EXAMPLE.parent / language / f"answer.{language}"
    subprocess.run([*COMPILERS[language], source, "-o", program, *link], check=True)
    check(program, artifact=artifact, overlaid=overlaid)


@pytest.mark.skipif(
    not (CSHARP_SOURCE and shutil.which("mcs") and shutil.which("mono")),
    reason="no Mono, or QWEN_EDGE_GENAI_CSHARP does not name src/csharp of onnxruntime-genai",
)
def test_csharp_on_mono(artifact: Path, overlaid: Path, tmp_path: Path) -> None:
    """Against Microsoft's own classes, compiled by Mono: there is no .NET here."""
    library = tmp_path / "Microsoft.ML.OnnxRuntimeGenAI.dll"
    sources = []
    for source in Path(CSHARP_SOURCE).glob("*.cs"):
        if re.search("Chat|Streaming", source.name):  # need libraries, or a newer C#, than Mono has
            continue
        text = source.read_text("utf-8-sig")
        if source.name == "Sequences.cs":  # Mono's compiler knows no indexer that gives a span
            text = text.replace("ReadOnlySpan<int> this", "int[] this").replace(
                "ceLength);", "ceLength).ToArray();"
            )
        sources.append(tmp_path / source.name)
        sources[-1].write_text(text)
    compiler = ["mcs", "-langversion:experimental", "-warn:0"]
    subprocess.run([*compiler, "-unsafe", "-target:library", f"-out:{library}", *sources], check=True)
    program = tmp_path / "Answer.exe"
    example = EXAMPLE.parent / "csharp" / "Answer.cs"
    subprocess.run(["mcs", "-warnaserror", f"-out:{program}", f"-r:{library}", example], check=True)
    check("mono", program, artifact=artifact, overlaid=overlaid)


def check(*program: str | Path, artifact: Path, overlaid: Path) -> None:
    """What every native example must do."""
    packages = Path(sysconfig.get_path("platlib"))
    runtime = next((packages / "onnxruntime" / "capi").glob("libonnxruntime.so*"))
    environment = {
        **os.environ,
        "ORT_LIB_PATH": str(runtime),
        "LD_LIBRARY_PATH": str(packages / "onnxruntime_genai"),
    }

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*program, *arguments], capture_output=True, text=True, env=environment)

    done = run(artifact, QUESTION, "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected(artifact) + "\n"
    assert run(artifact).returncode == 2
    missing = run(artifact / "nothing", QUESTION)
    assert missing.returncode == 1 and "error: " in missing.stderr
    absent = run(artifact, QUESTION, "dml")
    assert absent.returncode == 1 and "DML" in absent.stderr.upper()
    if json.loads((artifact / "manifest.json").read_text())["lowering"] == "portable":  # the same graph
        done = run(overlaid, QUESTION, "cpu")
        assert done.returncode == 0, done.stderr
        assert done.stdout == expected(artifact) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("artifact", ["strix-halo"], indirect=True)
@pytest.mark.skipif(
    not (shutil.which("wine") and shutil.which("x86_64-w64-mingw32-gcc")), reason="no Wine or no mingw-w64"
)
def test_windows_program_with_the_winml_libraries_on_wine(artifact: Path, tmp_path: Path) -> None:
    """On the CPU: Wine 8 has no Direct3D 12, so DirectML must say so and not crash."""
    wheels = tmp_path / "wheels"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--platform", "win_amd64", "--python-version", "3.11", "-d", wheels, *WINDOWS_WHEELS]
    subprocess.run(command, check=True)
    folder = tmp_path / "program"
    folder.mkdir()
    for wheel in wheels.iterdir():
        with zipfile.ZipFile(wheel) as content:
            for name in content.namelist():
                if name.lower().endswith(".dll"):
                    (folder / Path(name).name).write_bytes(content.read(name))
    compiler = "x86_64-w64-mingw32-gcc"
    stand_in = Path(__file__).parent / "wine" / "bcryptprimitives.c"
    subprocess.run(
        [compiler, "-shared", stand_in, "-o", folder / "bcryptprimitives.dll", "-ladvapi32"], check=True
    )
    program = folder / "answer.exe"
    library = folder / "onnxruntime-genai.dll"
    subprocess.run([compiler, *COMPILERS["c"][1:], EXAMPLE / "answer.c", "-o", program, library], check=True)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "WINEDEBUG": "-all",
            "WINEPREFIX": str(tmp_path / "prefix"),
            "WINEDLLOVERRIDES": f"{','.join(NATIVE)}=n;winedbg.exe=",
        }
        command = ["wine", str(program), f"Z:{artifact}", QUESTION, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)

    done = run("cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.replace("\r\n", "\n") == expected(artifact) + "\n"
    refused = run()
    # Wine 10 has a Direct3D 12, which ends a process that asks for what it lacks.
    if "unimplemented function d3d12.dll" not in refused.stderr:
        assert refused.returncode == 1 and "dml" in refused.stderr


@pytest.mark.slow
@pytest.mark.directml
@pytest.mark.skipif(not AVAILABLE, reason=REASON)
@pytest.mark.skipif(shutil.which("x86_64-w64-mingw32-gcc") is None, reason="no mingw-w64")
def test_windows_program_on_directml(exported: Exported, windows: Windows) -> None:
    """With the WinML package's own onnxruntime, 1.24.6, and the portable graph of a folder for several."""
    artifact, library = (
        exported(TINY, load_profile("strix-halo")),
        windows.libraries / "onnxruntime-genai.dll",
    )
    program = windows.libraries / "answer.exe"
    compiler = ["x86_64-w64-mingw32-gcc", *COMPILERS["c"][1:]]
    subprocess.run([*compiler, EXAMPLE / "answer.c", "-o", program, library], check=True)
    done = windows.run(program, f"Z:{artifact}", QUESTION, "dml")
    assert done.returncode == 0, done.stderr
    assert done.stdout.replace("\r\n", "\n") == expected(artifact) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("artifact", ["cpu"], indirect=True)
def test_frozen_with_pyinstaller(artifact: Path, tmp_path: Path) -> None:
    pytest.importorskip("PyInstaller", reason="pip install pyinstaller")
    source = EXAMPLE.parent / "pyinstaller" / "answer.spec"
    command = [sys.executable, "-m", "PyInstaller", "--log-level", "ERROR", str(source)]
    subprocess.run(
        [*command, "--distpath", tmp_path / "dist", "--workpath", tmp_path / "work"], check=True, cwd=tmp_path
    )
    program = tmp_path / "dist" / "answer" / "answer"
    done = subprocess.run([program, artifact, QUESTION], capture_output=True, text=True, env={})
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected(artifact) + "\n"
