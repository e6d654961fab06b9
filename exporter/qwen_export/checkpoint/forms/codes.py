"""Integer codes of a matrix, several in a word, whichever way the words lie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen_export.checkpoint.tensors.plain import PlainTensor


@dataclass(frozen=True)
class Codes:
    """Unsigned codes of a matrix [N, K] of output and input features.

    Attributes:
        words: integers that hold the codes, the first at the lowest bits.
        shape: N and K.
        width: bits that a code takes, 1 to 8. Where they do not divide a word, codes go on in the next one.
        along_inputs: a word holds codes of consecutive input features; else of output features.
        outputs_last: output features lie along the words' last axis.
        places: where in a word each of its consecutive features stands; None: in their order.
        offset: what is added to a stored code, modulo 256: 128 for signed bytes.
    """

    words: PlainTensor
    shape: tuple[int, int]
    width: int
    along_inputs: bool
    outputs_last: bool = False
    places: tuple[int, ...] | None = None
    offset: int = 0

    @property
    def stored_shape(self) -> tuple[int, int]:
        """What `words` must have for `shape`."""
        bits = self.words.dtype.itemsize * 8
        n, k = self.shape
        n, k = (n, -(-k * self.width // bits)) if self.along_inputs else (-(-n * self.width // bits), k)
        return (k, n) if self.outputs_last else (n, k)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Those of output features `start` to `stop`: uint8 [n, K]."""
        in_word = 1 if self.along_inputs else self.words.dtype.itemsize * 8 // self.width
        first, last = start // in_word, -(-stop // in_word)
        words = self.words.columns(first, last).T if self.outputs_last else self.words.read(first, last)
        codes = _split(words, self.width)
        if self.places is not None:
            codes = codes[..., self.places]
        if self.along_inputs:
            codes = codes.reshape(len(codes), -1)[:, : self.shape[1]]
        else:
            codes = codes.swapaxes(1, 2).reshape(-1, codes.shape[1])
            codes = codes[start - first * in_word : stop - first * in_word]
        return codes + np.uint8(self.offset) if self.offset else codes


def _split(words: np.ndarray, width: int) -> np.ndarray:
    """Integers [a, b] -> uint8 [a, b, codes in one], from the lowest bits; [a, codes, 1] of odd widths."""
    octets = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, words.dtype.itemsize)
    if width == 8:
        return octets
    if 8 % width:
        bits = np.unpackbits(octets.reshape(len(words), -1), axis=1, bitorder="little")
        codes = bits[:, : bits.shape[1] // width * width].reshape(len(words), -1, width)
        return np.packbits(codes, axis=-1, bitorder="little")
    mask = np.uint8((1 << width) - 1)
    parts = [octets >> np.uint8(shift) & mask for shift in range(0, 8, width)]
    return np.stack(parts, axis=-1).reshape(*words.shape, -1)
