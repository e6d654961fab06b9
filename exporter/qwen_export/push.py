"""An artifact to a repository on the Hugging Face hub, by the hub's own client."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_common.artifact_folder import open_folder
from qwen_common.errors import UserError
from qwen_common.manifest import MANIFEST, Manifest, listed_files

from qwen_export.model_card import README

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_OTHERS = {".gitattributes", README}  # what a repository has from its first day


@dataclass(frozen=True)
class Push:
    """What is to be done.

    Attributes:
        exists: whether the repository does.
        files: bytes by name.
        removed: files of the artifact that is there now, which this one has not.
    """

    repo: str
    exists: bool
    manifest: Manifest
    files: dict[str, int]
    removed: Sequence[str]


def check_name(repo: str) -> None:
    """Raises:
    UserError: no repository can be called `repo`.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        wrong = True
    else:
        wrong = repo.count("/") != 1 or "@" in repo or "\\" in repo
    if wrong:
        raise UserError(f"{repo} is no repository on the hub: give it as org/name")


def plan(artifact: Path, repo: str) -> Push:
    """Look at both sides; changes nothing.

    Args:
        repo: `org/name`.

    Raises:
        UserError: not an artifact, a damaged one, no such name, the hub does not answer, or the repository
            has what no export made.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    check_name(repo)
    manifest = open_folder(artifact, every=True)
    files = {name: (artifact / name).stat().st_size for name in sorted([MANIFEST, *manifest["files"]])}
    api = HfApi()
    with _asked(repo):
        try:
            found = set(api.list_repo_files(repo))
        except RepositoryNotFoundError:
            return Push(repo, False, manifest, files, ())
        ours = _exported(api, repo) if MANIFEST in found else set()
    if strange := sorted(found - ours - _OTHERS):
        raise UserError(
            f"{repo} has {strange[0]}, which no export put there: push to a repository of its own"
        )
    return Push(repo, True, manifest, files, sorted(found - files.keys() - _OTHERS))


def push(artifact: Path, planned: Push, public: bool) -> str:
    """Do what `plan` found for `artifact`; a new repository is private unless `public`. Returns the commit.

    Raises:
        UserError: the hub refuses, or does not answer. What was sent need not be sent again.
    """
    from huggingface_hub import HfApi

    api, manifest = HfApi(), planned.manifest
    with _asked(planned.repo):
        if not planned.exists:
            api.create_repo(planned.repo, private=not public)
        done = api.upload_folder(
            repo_id=planned.repo,
            folder_path=artifact,
            allow_patterns=[glob.escape(name) for name in planned.files],
            delete_patterns=[glob.escape(name) for name in planned.removed] or None,
            commit_message=f"{manifest['model']['name']} for {manifest['profile']}",
            commit_description=f"Made with qwen-edge {manifest['qwen_edge']}.",
        )
    return done.oid


def _exported(api: HfApi, repo: str) -> set[str]:
    """Names of the files of the artifact that is in a repository."""
    return listed_files(Path(api.hf_hub_download(repo, MANIFEST)).parent) or set()


@contextmanager
def _asked(repo: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the library's own errors, and those of its HTTP client
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the hub did not take {repo} ({reason}): check the network, and that `hf auth login` or "
            "HF_TOKEN gives a token that may write there"
        ) from error
