"""What a process holds and has read, by Linux's /proc."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Held:
    """Bytes of one process.

    Attributes:
        anonymous: resident, of its own.
        mapped: resident pages of files.
        most: the most that was resident so far.
        read: from the disk so far, not from the page cache; pages of mapped files too.
    """

    anonymous: int
    mapped: int
    most: int
    read: int

    @property
    def resident(self) -> int:
        return self.anonymous + self.mapped


def held(process: int | str = "self") -> Held:
    """As of now.

    Raises:
        OSError: there is no such process any more.
    """
    folder = Path(f"/proc/{process}")
    status = _fields(folder / "status")
    if "RssAnon" not in status:  # it has ended, and nobody asked how
        raise ProcessLookupError(f"process {process} holds no memory any more")
    read = _fields(folder / "io")["read_bytes"]
    return Held(1024 * status["RssAnon"], 1024 * status["RssFile"], 1024 * status["VmHWM"], read)


def forget_most() -> None:
    """`most` of this process starts anew."""
    Path("/proc/self/clear_refs").write_text("5")


def _fields(file: Path) -> dict[str, int]:
    lines = (line.split() for line in file.read_text().splitlines())
    return {words[0][:-1]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
