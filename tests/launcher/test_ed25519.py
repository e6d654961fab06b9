"""Signatures as RFC 8032 has them, beside the library that makes ours."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from qwen_launcher.ed25519 import read_public_key, verify

ORDER = 2**252 + 27742317777372353535851937790883648493
# RFC 8032, section 7.1: public key, message, signature.
VECTORS = [
    (
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        "d25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c"
        "387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc659"
        "4a7c15e9716ed28dc027beceea1ec40a",
    ),
]


@pytest.mark.parametrize("public,message,signature", VECTORS)
def test_the_vectors_of_the_rfc(public: str, message: str, signature: str) -> None:
    assert verify(bytes.fromhex(public), bytes.fromhex(message), bytes.fromhex(signature))
    assert not verify(bytes.fromhex(public), bytes.fromhex(message) + b"\0", bytes.fromhex(signature))


def test_what_another_library_signs_and_every_flipped_bit() -> None:
    for size in (0, 1, 31, 64, 1000):
        key = Ed25519PrivateKey.generate()
        public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        message = bytes(range(256)) * 4
        signature = key.sign(message[:size])
        assert verify(public, message[:size], signature)
    for bit in range(0, 512, 31):
        changed = (int.from_bytes(signature, "big") ^ 1 << bit).to_bytes(64, "big")
        assert not verify(public, message[:size], changed)
    for bit in range(0, 256, 31):
        assert not verify(
            (int.from_bytes(public, "big") ^ 1 << bit).to_bytes(32, "big"), message[:size], signature
        )


def test_only_one_form_of_a_signature_counts() -> None:
    """S plus the group's order solves the equation too (RFC 8032, 5.1.7); a y above p is no point."""
    public, message, signature = (bytes.fromhex(text) for text in VECTORS[1])
    scalar = int.from_bytes(signature[32:], "little") + ORDER
    assert not verify(public, message, signature[:32] + scalar.to_bytes(32, "little"))
    assert not verify((2**255 - 18).to_bytes(32, "little"), message, signature)
    assert not verify(public[:-1], message, signature) and not verify(public, message, signature + b"\0")


def test_a_key_is_the_same_with_any_line_ends() -> None:
    key = Ed25519PrivateKey.generate().public_key()
    raw = key.public_bytes(Encoding.Raw, PublicFormat.Raw)
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for text in (pem, pem.replace(b"\n", b"\r\n"), b"# ours\n" + pem + b"\n", pem.strip()):
        assert read_public_key(text) == raw
    for text in (b"", pem[:-30], pem.replace(b"PUBLIC", b"PRIVATE"), b"\0" * 100, pem.replace(b"M", b"*")):
        assert read_public_key(text) is None
