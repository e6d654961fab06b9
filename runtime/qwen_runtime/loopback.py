"""Whether what is sent to a host leaves this machine."""

from __future__ import annotations

import ipaddress
import re


def is_loopback(host: str) -> bool:
    """Args:
    host: a name or an address, perhaps with a port; an IPv6 address with one stands in brackets.
    """
    address = host if host.count(":") > 1 and "[" not in host else re.sub(r":[0-9]+$", "", host).strip("[]")
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
