"""The one error that is the user's to fix, and how both commands report it."""

from __future__ import annotations

import errno
import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

USER_ERROR = 2
INTERNAL_ERROR = 1
BELOW_THE_BAR = 3  # an artifact that is whole and not good enough
INTERRUPTED = 130
READER_GONE = 141  # as a shell reports a program that SIGPIPE ended

# What the system may say of a file that is not our fault, and what to do.
_MENDABLE = {
    errno.EACCES: "allow this user to do that, or choose another place",
    errno.EBUSY: "close what uses it",
    errno.EDQUOT: "make room for it",
    errno.EFBIG: "choose a disk whose file system takes such large files",
    errno.EIO: "the disk does not answer as it should: copy it elsewhere, or choose another disk",
    errno.EISDIR: "a file is wanted there, and it is a folder",
    errno.ELOOP: "its links lead in a circle",
    errno.EMFILE: "close other programs, or raise the limit of open files",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENODEV: "connect the device, or choose another place",
    errno.ENOSPC: "make room for it",
    errno.ENOTDIR: "a part of the path is a file and no folder: choose another place",
    errno.ENXIO: "connect the device, or choose another place",
    errno.EPERM: "allow this user to do that, or choose another place",
    errno.EROFS: "it is read-only: choose another place",
    errno.ESTALE: "the network drive has gone: connect it again",
}


class UserError(Exception):
    """A mistake that the user can mend. The message is one line that says what to do next."""


def mended_by(error: OSError) -> str | None:
    """A line on `error` that says what to do; None where it is not the user's to mend."""
    if error.errno not in _MENDABLE:
        return None
    named = isinstance(error.filename, str | bytes | os.PathLike)  # else a file's number, or none
    path = f"{os.fsdecode(error.filename)}: " if named else ""
    path = f"cannot write: {path}" if error.errno in (errno.ENOSPC, errno.EDQUOT) else path
    return f"{path}{error.strerror or 'the system refused it'}: {_MENDABLE[error.errno]}"


def check_unicode(text: str, name: str, advice: str) -> None:
    """Refuse halves of surrogate pairs, which stand for bytes that are no UTF-8.

    Args:
        name: what `text` is, and `advice` what to do with it, for the message.

    Raises:
        UserError: there are some.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} is not valid UTF-8: {advice}") from error


def one_line(text: str) -> str:
    """`text` with line breaks, and whatever else a terminal would act on, written as escapes."""

    def shown(character: str) -> bool:
        return character.isprintable() or unicodedata.category(character) == "Zs"  # a space of some width

    return "".join(character if shown(character) else repr(character)[1:-1] for character in text)


@contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Turn an exception into one line on stderr and an exit code.

    Exit codes: 2 for a `UserError` and for what the system says of files (`mended_by`), 1 for anything else
    that is our fault, 130 after Ctrl-C; 141, without a word, when the reader of stdout, such as `head`, has
    gone.
    With `debug` the traceback is printed instead of the line.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing can be flushed to it at exit
        sys.exit(READER_GONE)
    except Exception as error:
        if type(error).__module__.startswith("click"):
            raise  # click reports its own usage errors, with exit code 2
        if debug:
            raise
        if isinstance(error, UserError):
            print(f"error: {one_line(str(error))}", file=sys.stderr)
            sys.exit(USER_ERROR)
        if isinstance(error, OSError) and (line := mended_by(error)):
            print(f"error: {one_line(line)}", file=sys.stderr)
            sys.exit(USER_ERROR)
        detail = " ".join(str(error).split()) or "no message"
        print(f"internal error: {type(error).__name__}: {detail} (run again with --debug)", file=sys.stderr)
        sys.exit(INTERNAL_ERROR)
