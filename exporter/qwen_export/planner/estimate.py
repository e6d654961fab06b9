"""What an artifact will take and give: bytes on disk, memory, tokens per second."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """Predictions for one checkpoint and one profile. Bytes, unless a name says otherwise.

    Attributes:
        disk: all files of the artifact, without the tokenizer's where the checkpoint's are not at hand.
        load: the most memory of the process while the model is loaded, with mapped pages, which the system
            can drop.
        resident: memory of the process after that, before the first prompt.
        working: what a run of `prefill_chunk` tokens needs besides, with the recurrent states.
        cache_per_token: keys and values of one token of context.
        decode_bytes: weights that are read for one token; of a mixture only the experts that it is sent to.
        decode_rate: tokens per second at which those bytes saturate the memory; no runtime is faster.
        by_role: bytes on disk.
        precision: how each role's matrices are stored; a role that no block size fits is `float`.
        context: tokens that the artifact will be made for.
        largest_context: tokens that fit the profile's memory, at most what the model was made for; 0: none.
        budget: the profile's memory.
    """

    disk: int
    load: int
    resident: int
    working: int
    cache_per_token: int
    decode_bytes: int
    decode_rate: float
    by_role: dict[str, int]
    precision: dict[str, str]
    context: int
    largest_context: int
    budget: int

    @property
    def needed(self) -> int:
        """Memory with the shortest context that is of use, 1024 tokens."""
        return self.resident + self.working + 1024 * self.cache_per_token

    @property
    def fits(self) -> bool:
        return self.needed <= self.budget
