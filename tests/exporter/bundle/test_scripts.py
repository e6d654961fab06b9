"""What a bundle's scripts and unit files say, whatever the model is called."""

from __future__ import annotations

import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import tree_sitter
import tree_sitter_powershell
from qwen_common.errors import UserError
from qwen_common.manifest import file_entry
from qwen_export.bundle import assemble
from qwen_export.bundle.platforms import PLATFORMS
from qwen_export.bundle.rendering import plain
from qwen_launcher.bundle import python_digest

HOSTILE = [
    "Qwen\nExecStartPre=/bin/touch /tmp/evil",
    "Qwen\\",
    "Qwen %n $(touch evil) `touch evil` ${HOME}",
    "Qwen'; rm -rf /; '",
    'Qwen" & calc & "',
    "Qwen</Description><Exec>evil</Exec>&amp;<!--",
    "Qwen\r\nUser=root",
    "Qwen\u2028User=root\u0085\x0b\x0c\x1c\x00",
    "Qwen‘; Remove-Item C:\\ ’",
    "Q" * 5000,
]
CARRIED = ("python/python.exe", "python/Lib/os.py", "python/Lib/zipimport.py", "python/DLLs/_ssl.pyd")
LINUX, WINDOWS = PLATFORMS["linux_x86_64"], PLATFORMS["win_amd64"]


def written(
    folder: Path, windows: bool, model: str = "Qwen3.5-0.8B", devices: bool = True, carry: bool = False
) -> dict[str, str]:
    """By name the scripts of a bundle."""
    folder.mkdir(exist_ok=True)
    if carry:
        for name in CARRIED:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
    assemble.write_scripts(
        folder,
        WINDOWS if windows else LINUX,
        python="3.12",
        model=model,
        devices=devices,
    )
    return {
        path.name: path.read_bytes().decode()
        for path in folder.iterdir()
        if path.is_file() and path.suffix != ".pyz"
    }


@pytest.mark.parametrize("model", HOSTILE)
@pytest.mark.parametrize("windows", [False, True])
def test_a_name_is_one_word_wherever_it_stands(model: str, windows: bool, tmp_path: Path) -> None:
    """The same lines as for a harmless name of the same letters."""
    hostile, harmless = (
        written(tmp_path / "a", windows, model),
        written(tmp_path / "b", windows, plain(model)),
    )
    assert hostile == harmless
    named = plain(model)
    assert named.isprintable() and not set(named) & set("\\\"'`$%<>&;|*?#=\n") and len(named) <= 120
    if windows:
        found = ET.fromstring(hostile["task.xml"]).findtext(".//{*}Description")
        assert found == f"qwen-edge kiosk, {named}"
    else:
        lines = hostile["qwen-edge.service"].splitlines()
        assert lines.count(f"Description=qwen-edge kiosk, {named}") == 1
        assert [line for line in lines if line.startswith(("Exec", "User"))] == [
            "ExecStart=/bin/sh %Y/start.sh",
            "User=qwen-edge",
        ]


@pytest.mark.parametrize("python", ["3.12; touch evil", "3.12\n", "3", "../3.12", "3.12.1", "$(x)", ""])
def test_a_version_of_python_is_one(python: str, tmp_path: Path) -> None:
    device = assemble.Device("linux_x86_64", python)
    with pytest.raises(UserError, match="is no version of CPython"):
        assemble.bundle(tmp_path, tmp_path / "out", device, "1.0", tmp_path, print)


@pytest.mark.parametrize("devices", [False, True])
def test_systemd_finds_the_unit_safe_enough(devices: bool, tmp_path: Path) -> None:
    """Its own measure, 0 to 10, of what a service could do; below 3."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd is not installed")
    unit = tmp_path / "kiosk" / "qwen-edge.service"
    written(unit.parent, windows=False, devices=devices)
    for command in (["verify", "--man=no"], ["security", "--offline=1", "--threshold=29", "--no-pager"]):
        done = subprocess.run([analyze, *command, str(unit)], capture_output=True, text=True)
        assert done.returncode == 0 and "Unknown" not in done.stderr, done.stdout + done.stderr


def test_the_task_has_few_rights(tmp_path: Path) -> None:
    task = ET.fromstring(written(tmp_path / "bundle", windows=True)["task.xml"])
    assert task.findtext(".//{*}UserId") == "S-1-5-19"  # LOCAL SERVICE
    assert task.findtext(".//{*}RunLevel") == "LeastPrivilege"


def powershell_faults(source: bytes) -> list[str]:
    """Lines that are not PowerShell."""
    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_powershell.language()))
    queue, found = [parser.parse(source).root_node], []
    while queue:
        node = queue.pop()
        if node.is_error or node.is_missing:
            found.append(f"line {node.start_point[0] + 1}: {source[node.start_byte : node.end_byte][:60]!r}")
        queue += node.children
    return found


@pytest.mark.parametrize("carry", [False, True])
def test_powershell_scripts_are_powershell(carry: bool, tmp_path: Path) -> None:
    scripts = {
        name: text
        for name, text in written(tmp_path / "bundle", windows=True, carry=carry).items()
        if name.endswith(".ps1")
    }
    assert {"install.ps1", "start.ps1"} <= scripts.keys()
    for name, text in scripts.items():
        assert not (faults := powershell_faults(text.encode())), (name, faults)
        assert text.isascii(), "Windows PowerShell reads a script without a mark in the system's own encoding"
    assert powershell_faults(b"if ($a -eq { exit") and powershell_faults(b"function Check( { }")


@pytest.mark.parametrize("name", ["install.ps1", "start.ps1", "qwen-run.ps1"])
def test_a_carried_python_is_checked_before_it_runs(name: str, tmp_path: Path) -> None:
    """By a digest in the script, which is no part of a version: nothing runs before that but icacls."""
    text = written(tmp_path / "bundle", windows=True, carry=True)[name]
    files = {file: file_entry(tmp_path / "bundle" / file) for file in CARRIED}
    checked = text.index(f'"{python_digest(files)}"')
    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_powershell.language()))
    queue, runs = [parser.parse(text.encode()).root_node], []
    while queue:
        node = queue.pop()
        queue += node.children
        if node.type == "command" and node.children[0].type == "command_invokation_operator":
            runs.append((text[node.start_byte : node.end_byte].split()[1], node.start_byte))
    programs = [start for called, start in runs if called != "icacls"]
    assert len(programs) == 1 and programs[0] > checked, runs
    other = tmp_path / "bundle" / CARRIED[1]
    other.write_text("evil")
    changed = {file: file_entry(tmp_path / "bundle" / file) for file in CARRIED}
    assert python_digest(changed) != python_digest(files)
    assert python_digest(files | {"python/evil.dll": files[CARRIED[0]]}) != python_digest(files)


def test_shell_scripts_are_sh(tmp_path: Path) -> None:
    scripts = written(tmp_path / "bundle", windows=False)
    for shell in filter(shutil.which, ("dash", "bash")):
        for name, text in scripts.items():
            if text.startswith("#!/bin/sh"):
                subprocess.run([shell, "-n", str(tmp_path / "bundle" / name)], check=True)


@pytest.mark.parametrize("windows", [False, True])
def test_no_script_has_a_key_on_a_command_line(windows: bool, tmp_path: Path) -> None:
    for name, text in written(tmp_path / "bundle", windows).items():
        assert "--api-key " not in text and "api-key=" not in text, name


@pytest.mark.skipif(not shutil.which("pwsh"), reason="PowerShell is not installed")
def test_powershell_itself_takes_them(tmp_path: Path) -> None:
    """It parses each, and start.ps1 of a folder without a launcher ends with a line."""
    scripts = written(tmp_path / "kiosk", windows=True)
    (tmp_path / "kiosk" / "launcher.pyz").unlink()
    parse = "$found = $null; [void][Management.Automation.Language.Parser]::ParseFile($args[0], [ref]$null, "
    parse += "[ref]$found); exit $found.Count"
    for name in (name for name in scripts if name.endswith(".ps1")):
        path = tmp_path / "kiosk" / name
        done = subprocess.run(["pwsh", "-NoProfile", "-Command", f"& {{ {parse} }} '{path}'"])
        assert done.returncode == 0, name
    start = ["pwsh", "-NoProfile", "-File", str(tmp_path / "kiosk" / "start.ps1")]
    done = subprocess.run(start, capture_output=True, text=True)
    assert done.returncode == 2 and "is damaged: install a bundle again" in done.stderr


@pytest.mark.skipif(not shutil.which("pwsh"), reason="PowerShell is not installed")
def test_powershell_computes_the_digest_of_a_carried_python(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    text = written(folder, windows=True, carry=True)["start.ps1"]
    function = text[text.index("function Get-FolderDigest") : text.index("# A version brings")]
    (tmp_path / "digest.ps1").write_text(f"{function}\nGet-FolderDigest '{folder}/python'\n")
    command = ["pwsh", "-NoProfile", "-File", str(tmp_path / "digest.ps1")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == python_digest({file: file_entry(folder / file) for file in CARRIED})
