"""Who a kiosk runs as when root starts it by hand: whoever `state` and `logs` belong to, as in the unit.

Root would follow whatever that user left there: a log that is a link to another file, compiled copies of
packages that are not theirs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_DEVICES = ("video", "render")  # graphics devices and NPUs, as in the unit


def become_owner(folders: Sequence[Path]) -> int | None:
    """Give up root for good, where one of the folders is another user's; returns that user's number.

    None: we are not root, or the folders are root's or not there.
    """
    if sys.platform == "win32" or os.geteuid() != 0:
        return None
    import grp
    import pwd

    for folder in folders:
        with suppress(OSError):
            status = folder.lstat()
            if status.st_uid == 0:
                continue
            groups = []
            for name in _DEVICES:
                with suppress(KeyError):
                    groups.append(grp.getgrnam(name).gr_gid)
            group = status.st_gid
            with suppress(KeyError):  # a number without a name has the folder's group
                group = pwd.getpwuid(status.st_uid).pw_gid
            os.setgroups(groups)
            os.setgid(group)
            os.setuid(status.st_uid)
            os.environ["HOME"] = str(folder)
            return status.st_uid
    return None
