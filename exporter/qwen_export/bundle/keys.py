"""The key pair that signs bundles: Ed25519 (RFC 8032), in PEM files."""

from __future__ import annotations

import base64
import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from qwen_common.errors import UserError


def make_keys(private: Path) -> Path:
    """Write a new private key, readable by its owner only, and its public key beside it; returns the latter.

    Raises:
        UserError: one of the files exists, or the private key is named as the public one would be.
    """
    public = private.with_name(private.stem + ".pub")
    if public.name.lower() == private.name.lower():  # as disks compare them that know no case
        raise UserError(
            f"{private} is what the public key is called: name the private one {private.stem}.key"
        )
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    open_ = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    _write_new(private, secret, 0o600)
    try:
        _write_new(public, open_, 0o644)
    except BaseException:
        private.unlink()  # nothing is signed with it yet
        raise
    return public


def _write_new(path: Path, content: bytes, mode: int) -> None:
    """Only where there is nothing, not even a link that leads nowhere, and on the disk when this returns."""
    try:
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
    except FileExistsError as error:
        raise UserError(f"{path} exists: choose another name, so that no key is lost") from error
    with os.fdopen(number, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sign(data: bytes, private: Path) -> bytes:
    """The signature of `data`, in base64.

    Raises:
        UserError: the file is not a private Ed25519 key.
    """
    try:
        key = load_pem_private_key(private.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{private} is not a private key: make one with qwen-export keygen") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"{private} is not an Ed25519 key: make one with qwen-export keygen")
    return base64.b64encode(key.sign(data))
