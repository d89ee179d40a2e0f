"""Addresses: public is what IANA's registry leaves, in each form in which IPv6 can hold IPv4."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux.media.addresses import is_public

PUBLIC_V4 = [
    "8.8.8.8",
    "1.1.1.1",
    "93.184.216.34",
    "100.63.255.255",
    "172.32.0.1",
    "223.255.255.255",
]
PRIVATE_V4 = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.7",
    "203.0.113.7",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
]
PRIVATE_V6 = [
    "::",
    "::1",
    "::7f00:1",
    "::808:808",  # IPv4-compatible, obsolete
    "64:ff9b:1::808:808",  # NAT64 of one network's own
    "100::1",
    "2001::1",
    "2001:0:808:808::1",  # Teredo
    "2001:2::1",
    "2001:10::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:808:808::1",
    "3fff::1",
    "4000::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%eth0",
    "2606:4700::1%eth0",
    "fec0::1",
    "ff02::1",
]


@pytest.mark.parametrize(
    "address", [*PUBLIC_V4, "2606:4700::1111", "2a00:1450:4001::1", "2001:4860::8888"]
)
def test_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address", [*PRIVATE_V4, *PRIVATE_V6, "", "a.test", "8.8.8", "08.8.8.8", "8.8.8.8 "]
)
def test_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("prefix", ["::ffff:", "64:ff9b::"])
def test_embedded_addresses_count_as_what_they_hold(prefix: str) -> None:
    assert all(is_public(prefix + address) for address in PUBLIC_V4)
    assert not any(is_public(prefix + address) for address in PRIVATE_V4)


@given(st.ip_addresses())
def test_what_python_calls_special_is_not_public(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    held = address
    if isinstance(address, ipaddress.IPv6Address):
        if int(address) >> 32 == int(ipaddress.IPv6Address("64:ff9b::")) >> 32:
            held = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
        held = address.ipv4_mapped or held
    if is_public(str(address)):
        assert held.is_global
        assert not (held.is_multicast or held.is_reserved or held.is_unspecified)
        assert not (held.is_loopback or held.is_link_local or held.is_private)
