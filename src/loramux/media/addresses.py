"""Which network addresses are public hosts: those that a stranger's URL may lead us to."""

from __future__ import annotations

import ipaddress

# IANA's registry of special-purpose IPv4 addresses, and multicast. Written out because what Python's
# `is_global` covers depends on its version.
_NOT_PUBLIC_V4 = [
    ipaddress.IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # this host, this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carriers' NAT; some clouds' metadata
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # Azure's host, reachable from inside its machines only
        "169.254.0.0/16",  # link-local; most clouds' metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments; some clouds' metadata
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
]
_GLOBAL_UNICAST_V6 = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC_V6 = [
    ipaddress.IPv6Network(text)
    for text in (
        "2001::/23",  # protocol assignments: Teredo, which holds an IPv4 address, benchmarks, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: holds an IPv4 address, and is obsolete
        "3fff::/20",  # documentation
    )
]
# Addresses that mean the IPv4 address in their last 32 bits: mapped ones, and NAT64's well-known prefix,
# under which hosts of IPv6-only networks see the whole IPv4 internet.
_EMBEDDING_V6 = [ipaddress.IPv6Network("::ffff:0:0/96"), ipaddress.IPv6Network("64:ff9b::/96")]


def is_public(address: str) -> bool:
    """Whether `address` is a global unicast address; False for what is no address, or has a scope."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.scope_id is not None:
            return False
        if not any(parsed in network for network in _EMBEDDING_V6):
            return parsed in _GLOBAL_UNICAST_V6 and not any(
                parsed in network for network in _NOT_PUBLIC_V6
            )
        parsed = ipaddress.IPv4Address(int(parsed) & 0xFFFF_FFFF)
    return not any(parsed in network for network in _NOT_PUBLIC_V4)
