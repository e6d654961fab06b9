"""Ed25519 signatures (RFC 8032, section 5.1) checked with the standard library alone.

A launcher that imported a compiled library to check a version would run that version's code before the check.
Only public values are computed with here, so that the time it takes tells nobody anything.
"""

from __future__ import annotations

import base64
import binascii
import hashlib

_P = 2**255 - 19
_ORDER = 2**252 + 27742317777372353535851937790883648493
_D = -121665 * pow(121666, -1, _P) % _P
_ROOT_OF_MINUS_ONE = pow(2, (_P - 1) // 4, _P)
_DER_PREFIX = bytes.fromhex("302a300506032b6570032100")  # SubjectPublicKeyInfo of Ed25519 (RFC 8410)

_Point = tuple[int, int, int, int]  # X, Y, Z, T with x = X/Z, y = Y/Z, xy = T/Z


def read_public_key(pem: bytes) -> bytes | None:
    """The 32 bytes of the Ed25519 key in a PEM file (RFC 7468), with any line ends; None: it has none."""
    lines = [
        line.strip() for line in pem.removeprefix(b"\xef\xbb\xbf").splitlines()
    ]  # Windows' editors' mark
    try:
        first = lines.index(b"-----BEGIN PUBLIC KEY-----")
        last = lines.index(b"-----END PUBLIC KEY-----", first)
        der = base64.b64decode(b"".join(lines[first + 1 : last]), validate=True)
    except (ValueError, binascii.Error):
        return None
    found = der.startswith(_DER_PREFIX) and len(der) == len(_DER_PREFIX) + 32
    return der[len(_DER_PREFIX) :] if found else None


def verify(public: bytes, message: bytes, signature: bytes) -> bool:
    """Whether the key of 32 bytes made the signature of 64 bytes of exactly this message."""
    if len(public) != 32 or len(signature) != 64:
        return False
    point = _decoded(public)
    scalar = int.from_bytes(signature[32:], "little")
    if point is None or scalar >= _ORDER:
        return False
    digest = hashlib.sha512(signature[:32] + public + message).digest()
    challenge = int.from_bytes(digest, "little") % _ORDER
    negative = (_P - point[0], point[1], point[2], _P - point[3])
    return _encoded(_sum(_times(scalar, _BASE), _times(challenge, negative))) == signature[:32]


def _x(y: int, odd: int) -> int | None:
    """The x of the point with this y; None where there is none."""
    square = (y * y - 1) * pow(_D * y * y + 1, -1, _P) % _P
    x = pow(square, (_P + 3) // 8, _P)
    if (x * x - square) % _P:
        x = x * _ROOT_OF_MINUS_ONE % _P
    if (x * x - square) % _P or (x == 0 and odd):
        return None
    return _P - x if x % 2 != odd else x


def _decoded(data: bytes) -> _Point | None:
    whole = int.from_bytes(data, "little")
    y, odd = whole & (2**255 - 1), whole >> 255
    if y >= _P or (x := _x(y, odd)) is None:
        return None
    return x, y, 1, x * y % _P


def _encoded(point: _Point) -> bytes:
    inverse = pow(point[2], -1, _P)
    x, y = point[0] * inverse % _P, point[1] * inverse % _P
    return (y | (x & 1) << 255).to_bytes(32, "little")


def _sum(one: _Point, other: _Point) -> _Point:
    a = (one[1] - one[0]) * (other[1] - other[0]) % _P
    b = (one[1] + one[0]) * (other[1] + other[0]) % _P
    c = 2 * one[3] * other[3] * _D % _P
    d = 2 * one[2] * other[2] % _P
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % _P, g * h % _P, f * g % _P, e * h % _P


def _times(scalar: int, point: _Point) -> _Point:
    total: _Point = (0, 1, 1, 0)
    while scalar:
        if scalar & 1:
            total = _sum(total, point)
        point = _sum(point, point)
        scalar >>= 1
    return total


_BASE_X = 15112221349535400772501151409588531511454012693041857206046113283949847762202
_BASE_Y = 4 * pow(5, -1, _P) % _P
_BASE: _Point = (_BASE_X, _BASE_Y, 1, _BASE_X * _BASE_Y % _P)
