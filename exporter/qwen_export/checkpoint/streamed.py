"""Shards of a checkpoint on the hub: each is fetched when a tensor in it is read, and deleted afterwards.

The hub's own client fetches them, into a folder of our own beside the commit's in the hub's cache. What is in
that folder may be deleted, whichever run fetched it; what the cache has already is used and left there.
"""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout
from qwen_common.errors import UserError
from safetensors import SafetensorError, safe_open

_FOLDER, _LOCK = "qwen-export", "qwen-export.lock"
_SPARE_BYTES = 64 * 1024 * 1024
_LARGEST_HEADER = 100_000_000  # as safetensors has it
_FIRST_BYTES = 128 * 1024  # most headers are smaller


class StreamedShards:
    """The shards of one commit.

    Attributes:
        repo: the hub id.
        root: the commit's folder in the hub's cache.
        sizes: bytes of every `*.safetensors` file by its name, as the hub says.
        say: is told what is fetched.
        reserved: bytes that others are still to write on the disk of `root`.
        needed_again: what an export has read is read once more, by a verification: nothing is deleted before
            its room is needed.
    """

    def __init__(self, repo: str, root: Path, sizes: Mapping[str, int]) -> None:
        self.repo, self.root, self.sizes = repo, root, sizes
        self.say: Callable[[str], None] = lambda _: None
        self.reserved: Callable[[], int] = lambda: 0
        self.needed_again = False
        self._changing = threading.RLock()
        self._headers: dict[str, bytes] = {}
        self._readings: Counter[str] = Counter()
        self._needed: Mapping[Hashable, frozenset[Path]] = {}
        self._folder = root.parents[1] / _FOLDER / root.name
        self._process = FileLock(root.parents[1] / _LOCK, thread_local=False)
        # Those that may be deleted, the one that was not read for the longest time first; what a run that was
        # stopped left is among them once it is clear that no other process reads it.
        self._fetched: dict[str, None] = {}

    def _hold(self) -> None:
        """Raises:
        UserError: another process fetches and deletes shards of the same repository.
        """
        if self._process.is_locked:
            return
        try:
            self._process.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"another qwen-export is fetching {self.repo}: wait for it to end, or give --keep-download"
            ) from error
        found = sorted(self._folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
        self._fetched = dict.fromkeys(path.name for path in found if path.name in self.sizes)

    def path(self, name: str) -> Path:
        """Where a shard is, or will be."""
        cached = self.root / name
        return cached if cached.exists() else self._folder / name

    def has(self, path: Path) -> bool:
        """Whether a file is a shard of this commit."""
        return path.parent in (self.root, self._folder)

    def among(self, paths: Iterable[Path]) -> list[str]:
        """Names, in order, of those that are fetched."""
        return sorted(path.name for path in paths if path.parent == self._folder)

    def header(self, name: str) -> bytes:
        """The JSON at the head of a shard; nothing else of it is fetched.

        Raises:
            UserError: the hub did not give it, or it is none.
        """
        if name not in self._headers:
            path = self.path(name)
            self._headers[name] = _local_header(path) if path.is_file() else self._remote_header(name)
        return self._headers[name]

    def _remote_header(self, name: str) -> bytes:
        first = self._range(name, 0, min(_FIRST_BYTES, self.sizes[name]))
        length = int.from_bytes(first[:8], "little")
        if len(first) < 8 or not 0 < length <= min(_LARGEST_HEADER, self.sizes[name] - 8):
            raise UserError(f"{self.repo}: {name} is no safetensors file")
        return first[8 : 8 + length] if len(first) >= 8 + length else self._range(name, 8, 8 + length)

    def _range(self, name: str, start: int, stop: int) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.repo, name, revision=self.root.name)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        found = b""
        try:
            with get_session().stream("GET", url, headers=headers) as response:
                hf_raise_for_status(response)
                sends_all = response.status_code == 200  # whatever is asked
                for chunk in response.iter_bytes():
                    found += chunk
                    if sends_all and len(found) >= stop:
                        break
        except Exception as error:  # the library's own errors, and those of its HTTP client
            raise self._failed(name, error) from error
        found = found[start:stop] if sends_all else found
        if len(found) != stop - start:
            raise UserError(f"{self.repo}: the hub gave {len(found)} of {stop - start} bytes of {name}")
        return found

    def open(self, path: Path) -> BinaryIO:
        """A shard, to be read; fetched if it is not there. Safe to call from several threads.

        Raises:
            UserError: as `fetch`.
        """
        if path.name in self._fetched and self._changing.acquire(blocking=False):  # not behind a download
            try:
                if path.name in self._fetched:  # the last one that was read
                    del self._fetched[path.name]
                    self._fetched[path.name] = None
            finally:
                self._changing.release()
        try:
            return path.open("rb", buffering=0)
        except FileNotFoundError:
            with self._changing:  # nothing is deleted before it is open
                self.fetch([path])
                return path.open("rb", buffering=0)

    def fetch(self, paths: Iterable[Path]) -> None:
        """Fetch those that are not there; others are deleted where there is no room.

        Raises:
            UserError: the hub did not give one, it is damaged, there is no room for it, or another process
                does the same.
        """
        with self._changing:
            wanted = self.among(paths)
            if wanted:
                self._hold()
            for name in wanted:
                if name not in self._fetched or not (self._folder / name).exists():
                    self._fetch(name, wanted)

    def _fetch(self, name: str, wanted: list[str]) -> None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import (
            are_progress_bars_disabled,
            disable_progress_bars,
            enable_progress_bars,
        )

        header, path = self.header(name), self._folder / name
        self._make_room(name, wanted)
        self.say(f"fetching {name}, {self.sizes[name] / 1e9:.2f} GB")
        quiet = are_progress_bars_disabled()
        disable_progress_bars()  # there is one already
        try:
            hf_hub_download(self.repo, name, revision=self.root.name, local_dir=self._folder)
        except Exception as error:
            raise self._failed(name, error) from error
        finally:
            if not quiet:
                enable_progress_bars()
        self._fetched[name] = None
        try:
            whole = _local_header(path) == header and path.stat().st_size == self.sizes[name]
        except UserError:
            whole = False
        if not whole:
            self._delete(name)
            raise UserError(f"{self.repo}: {name} is damaged, or is not what the hub said before: try again")

    def _failed(self, name: str, error: Exception) -> UserError:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return UserError(
            f"{self.repo}: the hub did not give {name} ({reason}): check the network and run the same "
            "command to go on"
        )

    def _make_room(self, name: str, wanted: list[str]) -> None:
        while (lacking := self.sizes[name] + self.reserved() + _SPARE_BYTES - self._free()) > 0:
            others = [other for other in self._fetched if other not in wanted]
            if not any(self._delete(other) for other in others):
                raise UserError(
                    f"{name} has {self.sizes[name] / 1e9:.2f} GB, and the disk of {self.root} lacks "
                    f"{lacking / 1e9:.2f} for it: free some space, or set HF_HOME to a folder on another "
                    "disk, and run the same command to go on"
                )

    def _free(self) -> int:
        return shutil.disk_usage(self.root).free

    def _delete(self, name: str) -> bool:
        try:
            (self._folder / name).unlink(missing_ok=True)
        except PermissionError:  # Windows, while another thread reads it: later
            return False
        del self._fetched[name]
        return True

    def require(self, most: int) -> None:
        """Refuse what would not fit, and delete what is in its way: shards of `most` bytes at a time.

        Raises:
            UserError: the disk has no room for them and what is `reserved`.
        """
        with self._changing:
            reserved, free = self.reserved() + _SPARE_BYTES, self._free()
            if most + reserved > free + self.deletable_bytes:
                artifact = f"{reserved / 1e9:.1f} GB for the artifact and " if self.reserved() else ""
                raise UserError(
                    f"{artifact}{most / 1e9:.1f} GB for shards at a time do not fit the {free / 1e9:.1f} GB "
                    f"that are free on the disk of {self.root}: free some space, choose another disk with "
                    "-o, or set HF_HOME to a folder on one"
                )
            for name in list(self._fetched):
                if self._free() < reserved:
                    self._delete(name)

    def expect(self, needed: Mapping[Hashable, frozenset[Path]]) -> int:
        """Plan the readings of an export: `needed` says of each weight which files must be there with it.

        A shard is deleted when the last of them is `done`. Returns the bytes of shards that must be there at
        once.

        Raises:
            UserError: another process fetches and deletes shards of the same repository.
        """
        self._needed = needed
        self._readings = Counter(name for paths in needed.values() for name in self.among(paths))
        with self._changing:
            if self._readings:
                self._hold()
            self._release(list(self._fetched))
        sums = (sum(self.sizes[name] for name in self.among(paths)) for paths in needed.values())
        return max(sums, default=0)

    def done(self, weights: Iterable[Hashable]) -> None:
        """The bytes of these weights are safely written."""
        with self._changing:
            for weight in weights:
                names = self.among(self._needed.get(weight, ()))
                self._readings.subtract(names)
                self._release(names)

    def _release(self, names: Iterable[str]) -> None:
        """Delete those that nothing reads any more."""
        if not self.needed_again:
            for name in names:
                if name in self._fetched and self._readings[name] <= 0:
                    self._delete(name)

    @property
    def deletable_bytes(self) -> int:
        """Of shards on the disk that may be deleted."""
        return sum(self.sizes[name] for name in self._fetched)

    @property
    def missing_bytes(self) -> int:
        """Of shards of the model that are not on the disk."""
        return sum(self.sizes[name] for name in self._headers if not self.path(name).exists())

    def finish(self) -> None:
        """Nothing is read any more: delete what was fetched here."""
        if self._process.is_locked:
            with self._changing:
                shutil.rmtree(self._folder.parent, ignore_errors=True)
                self._fetched.clear()
                self._process.release()


def _local_header(path: Path) -> bytes:
    """Raises:
    UserError: the file is malformed or truncated.
    """
    try:
        with safe_open(path, framework="numpy"), path.open("rb") as file:
            return file.read(int.from_bytes(file.read(8), "little"))
    except (SafetensorError, OSError) as error:
        raise UserError(f"shard {path} is truncated or damaged ({error}): delete it") from error
