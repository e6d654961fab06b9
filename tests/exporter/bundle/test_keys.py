"""Key pairs: no key of anybody's is ever overwritten."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from qwen_common.errors import UserError
from qwen_export.bundle.keys import make_keys


def test_a_pair(tmp_path: Path) -> None:
    private = tmp_path / "kiosk.key"
    public = make_keys(private)
    made = load_pem_private_key(private.read_bytes(), None)
    assert made.public_key() == load_pem_public_key(public.read_bytes())
    assert os.name == "nt" or private.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["kiosk.pub", "kiosk.PUB", "Kiosk.Pub"])
def test_a_private_key_named_as_the_public_one_would_be(name: str, tmp_path: Path) -> None:
    """Writing the public key would end it."""
    with pytest.raises(UserError, match=r"is what the public key is called: name the private one"):
        make_keys(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("there", ["kiosk.key", "kiosk.pub"])
@pytest.mark.parametrize("kind", ["file", "link", "link that leads nowhere", "folder"])
def test_what_is_there_stays(there: str, kind: str, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "keys", tmp_path / "elsewhere"
    folder.mkdir()
    path = folder / there
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(elsewhere)
    if kind == "link":
        elsewhere.write_text("mine")
    with pytest.raises(UserError, match=f"{there} exists: choose another name, so that no key is lost"):
        make_keys(folder / "kiosk.key")
    assert [path.name for path in folder.iterdir()] == [there]
    assert elsewhere.exists() == (kind == "link") and (kind != "link" or elsewhere.read_text() == "mine")
