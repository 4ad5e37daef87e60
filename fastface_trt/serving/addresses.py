"""Which addresses of the network are public: the only ones that a stranger may send a server to.

Sources: IANA's registries of special-purpose addresses (RFC 6890), which `ipaddress` knows; NAT64
(RFC 6052); and what it does not know, named below.
"""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TypeAlias

Address: TypeAlias = IPv4Address | IPv6Address

_NAT64 = IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_NOT_PUBLIC_6 = (
    IPv6Network("2001::/23"),  # protocol assignments, Teredo among them
    IPv6Network("2001:db8::/32"),
    IPv6Network("2002::/16"),  # 6to4, which leads to an IPv4 address of the sender's choice
    IPv6Network("3fff::/20"),  # documentation, unknown to older Pythons
)
_NOT_PUBLIC_4 = (
    IPv4Network("168.63.129.16/32"),  # Azure's host, with the metadata of the machine
    IPv4Network("192.0.0.0/24"),  # protocol assignments, some of which count as global
    IPv4Network("192.88.99.0/24"),  # relays of 6to4
)


def is_public(address: Address) -> bool:
    """Whether an address is one of the public network's, for one machine.

    Private, loopback, link-local (where clouds have their metadata), shared, multicast, reserved
    and unspecified ones are not; an IPv4 address inside an IPv6 one is judged as itself.
    """
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped
        if address in _NAT64:
            inner = IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        return (
            address.scope_id is None
            and address in _GLOBAL_UNICAST
            and not any(address in network for network in _NOT_PUBLIC_6)
        )
    return (
        address.is_global
        and not (address.is_multicast or address.is_reserved or address.is_unspecified)
        and not any(address in network for network in _NOT_PUBLIC_4)
    )


def parse_address(text: str) -> Address | None:
    """The address that a resolver returned as text; None where it is none."""
    try:
        return ip_address(text)
    except ValueError:
        return None
