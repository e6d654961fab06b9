"""The reference's recurrence 64 tokens at a time, as products of matrices: for calibration.

What is proved against the checkpoint goes through the reference, token by token. Calibration runs the same
model on a text and needs no algebra of its own, but time.
Source: Yang et al., Gated Delta Networks (2024), section 3.3.
"""

from __future__ import annotations

import numpy as np

_CHUNK = 64


def chunked_delta_rule(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, beta: np.ndarray, log_decay: np.ndarray
) -> np.ndarray:
    """`reference.delta_rule`: the same arguments and result.

    With G the running sum of the logarithms of decays and P_ij = exp(G_i - G_j) for j <= i, else 0:
        A = tril(beta k k^T * P, -1)                       what token j's write changes in token i's
        V = (I + A)^-1 beta (v - exp(G) k S)               the values really written
        O = exp(G) q S + (q k^T * P) V
        S' = exp(G_T) S + (P_T k)^T V                      P_T is P's last row
    """
    length, (batch, _, heads, size) = key.shape[1], value.shape
    output = np.empty_like(value)
    state = np.zeros((batch, heads, key.shape[-1], size), np.float32)
    for start in range(0, length, _CHUNK):
        tokens = slice(start, start + _CHUNK)
        q, k, v = (np.ascontiguousarray(part[:, tokens].swapaxes(1, 2)) for part in (query, key, value))
        weight = beta[:, tokens].swapaxes(1, 2)[..., None]
        # Sums may be large where their differences are small.
        total = log_decay[:, tokens].swapaxes(1, 2).cumsum(axis=-1, dtype=np.float64)
        seen = np.tri(k.shape[2], dtype=bool)
        between = np.where(seen, total[..., :, None] - total[..., None, :], -np.inf)
        decay = np.exp(between.astype(np.float32))
        since_start = np.exp(total.astype(np.float32))[..., None]

        transposed = k.swapaxes(-1, -2)
        system = k @ transposed
        system *= decay
        system *= weight
        written = weight * (v - since_start * (k @ state))
        for token in range(1, written.shape[2]):
            earlier = system[..., token : token + 1, :token] @ written[..., :token, :]
            written[..., token, :] -= earlier[..., 0, :]
        found = since_start * (q @ state) + (q @ transposed * decay) @ written
        output[:, tokens] = found.swapaxes(1, 2)
        state *= since_start[..., -1:, :]
        state += (transposed * decay[..., -1:, :]) @ written
    return output
