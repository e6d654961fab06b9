"""Names of what lies in an OCI registry: `oci://registry.example/team/model:tag@sha256:...`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwen_common.errors import UserError, one_line

from qwen_runtime.loopback import is_loopback

SCHEME = "oci://"
# The grammar of the OCI distribution specification.
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REFERENCE = re.compile(
    r"(?P<host>(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\])(?::[0-9]{1,5})?)"
    rf"/(?P<name>{_PART}(?:/{_PART})*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?"
    r"(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_FORM = f"{SCHEME}registry.example/name:tag or {SCHEME}registry.example/name@sha256:..."
_HUB, _HUB_API = "docker.io", "registry-1.docker.io"


@dataclass(frozen=True)
class Reference:
    """A repository of a registry, and a tag or a digest (`sha256:...`) in it; with both, the digest counts.

    Attributes:
        host: of the registry, with its port.
        name: of the repository, lower case.
    """

    host: str
    name: str
    tag: str | None
    digest: str | None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Raises:
        UserError: no such name, or one with neither tag nor digest.
        """
        found = _REFERENCE.fullmatch(text.removeprefix(SCHEME))
        if not text.startswith(SCHEME) or found is None:
            raise UserError(
                f"{one_line(text[:200])} names nothing in a registry: write {_FORM}, in lower case but for "
                "the tag"
            )
        reference = cls(found["host"], found["name"], found["tag"], found["digest"])
        if reference.tag is None and reference.digest is None:
            raise UserError(f"{text} has neither tag nor digest: write {_FORM}")
        return reference

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{SCHEME}{self.repository}{tag}" + (f"@{self.digest}" if self.digest else "")

    @property
    def repository(self) -> str:
        return f"{self.host}/{self.name}"

    @property
    def version(self) -> str:
        """What a manifest is asked for by."""
        return self.digest or self.tag or ""

    def url(self, plain_http: bool) -> str:
        """Below which the repository is. Plain HTTP for this machine alone, unless `plain_http`."""
        scheme = "http" if plain_http or self.is_here else "https"
        host = _HUB_API if self.host == _HUB else self.host
        return f"{scheme}://{host}/v2/{self.name}"

    @property
    def is_here(self) -> bool:
        """Whether the registry is on this machine, so that nobody else sees what is sent."""
        return is_loopback(self.host)
