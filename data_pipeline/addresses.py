"""Which IP addresses may be asked when a stranger names them: public ones, whatever the spelling."""

import ipaddress
from collections.abc import Iterable

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_UNICAST = ipaddress.ip_network("2000::/3")  # what of IPv6 is given out
_EMBEDDING = [ipaddress.ip_network(text) for text in ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96")]
"""IPv6 networks whose last 32 bits are an IPv4 address: compatible, mapped, translated, NAT64."""
_RESERVED = [ipaddress.ip_network(text) for text in ("192.0.0.0/24", "3fff::/20")]
"""Networks that IANA's registries reserve and Python 3.11.7 takes for public; some clouds have their metadata there."""


def is_public(address: str, allowed: Iterable[Network] = ()) -> bool:
    """Is this IP address public, or in an `allowed` network? Raises ValueError for what is none."""
    number = number_of(address)
    if is_within(address, allowed):
        return True
    if number.is_multicast or any(number in network for network in _RESERVED):
        return False
    return number.is_global and (number.version == 4 or number in _UNICAST)


def is_within(address: str, networks: Iterable[Network]) -> bool:
    """Is this IP address in one of the networks? Raises ValueError for what is none."""
    number = number_of(address)
    return any(number in network for network in networks)


def number_of(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An IP address without its scope; of IPv6 that stands for an IPv4 address, that one."""
    number = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(number, ipaddress.IPv4Address) or number.is_loopback or number.is_unspecified:
        return number
    if any(number in network for network in _EMBEDDING):
        return ipaddress.IPv4Address(int(number) & 0xFFFFFFFF)
    return number.sixtofour or (number.teredo[1] if number.teredo else number)
