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
        UserError: one of the files exists.
    """
    public = private.with_name(private.stem + ".pub")
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    open_ = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for path in (private, public):
        if path.exists():
            raise UserError(f"{path} exists: choose another name, so that no key is lost")
    with os.fdopen(os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secret)
    public.write_bytes(open_)
    return public


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
