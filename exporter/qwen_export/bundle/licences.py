"""Licences as SPDX expressions (spdx.org/licenses), from what a package says of itself or from its text."""

from __future__ import annotations

from collections.abc import Iterable

from cyclonedx.spdx import fixup_id, is_expression

# What packages wrote before PEP 639 asked for an expression: classifiers and free text, in lower case.
_WORDS = {
    "3-clause bsd license": "BSD-3-Clause",
    "apache 2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "isc license (iscl)": "ISC",
    "mit license": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "python software foundation license": "PSF-2.0",
    "the unlicense (unlicense)": "Unlicense",
}
# What stands in a licence's text, and in no other's of these.
_BSD, _NO_NAMES = "Redistributions of source code must retain", "Neither the name"
_TEXTS = {
    "Apache-2.0": "Apache License Version 2.0, January 2004",
    "MIT": "Permission is hereby granted, free of charge, to any person obtaining a copy of this software",
    "ISC": "Permission to use, copy, modify, and/or distribute this software for any purpose",
    "Unlicense": "This is free and unencumbered software released into the public domain",
}


def spdx(stated: Iterable[str], text: str) -> str | None:
    """An SPDX expression; None where neither says which.

    Args:
        stated: what the package says of itself, the most exact first.
        text: of its licence files.
    """
    for words in stated:
        if known := fixup_id(words) or _WORDS.get(words.strip().lower()):
            return known
        if is_expression(words):
            return words
    flat = " ".join(text.split())
    found = [name for name, phrase in _TEXTS.items() if phrase in flat]
    if _BSD in flat:
        found.append("BSD-3-Clause" if _NO_NAMES in flat else "BSD-2-Clause")
    return found[0] if len(found) == 1 else None
