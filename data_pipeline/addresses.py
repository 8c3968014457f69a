"""Which IP addresses from untrusted input may be contacted: public ones, in any spelling."""

import ipaddress
from collections.abc import Iterable

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_UNICAST = ipaddress.ip_network("2000::/3")  # the allocated part of IPv6
_EMBEDDING = [ipaddress.ip_network(text) for text in ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96")]
"""IPv6 networks whose last 32 bits are an IPv4 address: compatible, mapped, translated, NAT64."""
_RESERVED = [ipaddress.ip_network(text) for text in ("192.0.0.0/24", "3fff::/20")]
"""Networks that IANA reserves and Python 3.11.7 takes for public; some clouds serve their metadata there."""


def is_public(address: str, allowed: Iterable[Network] = ()) -> bool:
    """Return whether an IP address is public or in an `allowed` network. Raises ValueError for an invalid address."""
    number = number_of(address)
    if is_within(address, allowed):
        return True
    if number.is_multicast or any(number in network for network in _RESERVED):
        return False
    return number.is_global and (number.version == 4 or number in _UNICAST)


def is_within(address: str, networks: Iterable[Network]) -> bool:
    """Return whether an IP address is in one of the networks. Raises ValueError for an invalid address."""
    number = number_of(address)
    return any(number in network for network in networks)


def number_of(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Parse an IP address without its scope; an IPv6 address that embeds an IPv4 address gives the latter."""
    number = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(number, ipaddress.IPv4Address) or number.is_loopback or number.is_unspecified:
        return number
    if any(number in network for network in _EMBEDDING):
        return ipaddress.IPv4Address(int(number) & 0xFFFFFFFF)
    return number.sixtofour or (number.teredo[1] if number.teredo else number)
