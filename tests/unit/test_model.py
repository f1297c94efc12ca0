"""The shared values: their texts are what ip(8) and nft read and print, and wrong ones cannot be made."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.addresses import Family, Prefix, parse_address, sorted_addresses
from agent.model import Fwmark, Hop, Policy, Route, Rule

# --- prefixes --------------------------------------------------------------------------------------------------------

addresses = st.ip_addresses()
lengths = st.integers(0, 128)


def network_of(address: IPv4Address | IPv6Address, length: int) -> IPv4Network | IPv6Network:
    return ip_network(f"{address}/{min(length, address.max_prefixlen)}", strict=False)


@given(addresses, lengths)
def test_prefix_reads_as_ipaddress_does(address: IPv4Address | IPv6Address, length: int) -> None:
    """A network's text is read to the family, addresses and length that the standard library reads from it."""
    network = network_of(address, length)
    prefix = Prefix.parse(str(network))
    assert prefix.family is Family.of(address)
    assert (prefix.address, prefix.last) == (int(network.network_address), int(network.broadcast_address))
    assert prefix.length == network.prefixlen
    assert address in prefix


@given(addresses, lengths)
def test_prefix_text_and_back(address: IPv4Address | IPv6Address, length: int) -> None:
    """What a prefix is written as is read as that prefix."""
    prefix = Prefix.parse(str(network_of(address, length)))
    assert Prefix.parse(str(prefix)) == prefix


@given(addresses, addresses, lengths)
def test_prefix_holds(address: IPv4Address | IPv6Address, other: IPv4Address | IPv6Address, length: int) -> None:
    """A prefix holds the addresses that the standard library's network holds, and none of the other family."""
    network = network_of(address, length)
    assert (other in Prefix.parse(str(network))) == (other in network)


@given(st.lists(st.tuples(addresses, lengths), max_size=8))
def test_prefixes_sort_outer_first(pairs: list[tuple[IPv4Address | IPv6Address, int]]) -> None:
    """IPv4 sorts before IPv6, then by address, and a network before those inside it that begin where it does."""
    networks = [network_of(address, length) for address, length in pairs]
    in_order = sorted(networks, key=lambda network: (network.version, int(network.network_address), network.prefixlen))
    assert sorted(Prefix.parse(str(network)) for network in networks) == [Prefix.parse(str(n)) for n in in_order]


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        pytest.param("10.9.0.0/24", "10.9.0.0/24", id="network"),
        pytest.param("192.0.2.130", "192.0.2.130", id="address"),
        pytest.param("192.0.2.130/32", "192.0.2.130", id="whole-address"),
        pytest.param("2001:DB8:0:0::/32", "2001:db8::/32", id="ipv6"),
        pytest.param("0.0.0.0/0", "0.0.0.0/0", id="everything"),
        pytest.param("10.0.0.0/08", "10.0.0.0/8", id="zero-before-length"),
    ],
)
def test_prefix_text(text: str, printed: str) -> None:
    """A prefix is printed as nft and ip(8) print it."""
    assert str(Prefix.parse(text)) == printed


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        pytest.param("10.0.1.7/24", "has host bits set: the network is 10.0.1.0/24", id="host-bits"),
        pytest.param("::1/0", "has host bits set: the network is ::/0", id="host-bits-6"),
        *(
            pytest.param(text, "is not a network", id=name)
            for name, text in {
                "empty": "",
                "word": "lan",
                "prefix-too-long": "10.0.1.0/33",
                "prefix-too-long-6": "2001:db8::/129",
                "no-length": "10.0.1.0/",
                "negative": "10.0.1.0/-1",
                "plus": "10.0.1.0/+8",
                "other-digits": "10.0.1.0/٣",
                "netmask": "10.0.0.0/255.0.0.0",
                "three-octets": "10.0.1/24",
                "leading-zero": "010.0.0.0/8",
                "two-lengths": "10.0.0.0/8/8",
                "blank": " 10.0.0.0/8",
                "zone": "fe80::%eth0/64",
                "nul": "10.0.0.0\0",
                "not-ascii": "10.0.0.0é",
            }.items()
        ),
    ],
)
def test_bad_prefix(text: str, rule: str) -> None:
    """A text that isn't a clean network is refused, and the message says why."""
    with pytest.raises(ValueError, match=r"^is|^has") as caught:
        Prefix.parse(text)
    assert str(caught.value) == rule


def test_prefix_holds_only_addresses() -> None:
    """Asking a prefix for anything but an address is a mistake, not a no."""
    with pytest.raises(TypeError, match="no address"):
        assert "10.9.0.1" in Prefix.parse("10.9.0.0/24")


@given(addresses)
def test_host_prefix(address: IPv4Address | IPv6Address) -> None:
    """The network of one address holds it, and is printed like it."""
    prefix = Prefix.host(address)
    assert address in prefix
    assert prefix.address == prefix.last == int(address)
    assert ip_address(str(prefix)) == address


# --- fwmarks ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFF))
def test_fwmark_fits_its_mask(value: int, mask: int) -> None:
    """A mark has a bit set and none outside its mask; another cannot be made."""
    if value and value | mask == mask:
        assert str(Fwmark(value, mask)) == f"0x{value:x}/0x{mask:x}"
    else:
        with pytest.raises(ValueError, match=f"^fwmark 0x{value:x} does not fit mask 0x{mask:x}$"):
            Fwmark(value, mask)


# --- routes and rules ------------------------------------------------------------------------------------------------

DEFAULT = Prefix.default(Family.IPV4)
DEFAULT_6 = Prefix.default(Family.IPV6)


@pytest.mark.parametrize(
    ("route", "text"),
    [
        pytest.param(
            Route(DEFAULT, 4001, (Hop("wg0"),)), "default dev wg0 table 4001 protocol 73", id="straight-into-the-link"
        ),
        pytest.param(
            Route(DEFAULT_6, 4001, (Hop("wan", IPv6Address("fe80::1")),)),
            "default via fe80::1 dev wan table 4001 protocol 73",
            id="gateway",
        ),
        pytest.param(
            Route(DEFAULT, 4001, (Hop("wan", IPv4Address("203.0.113.1"), onlink=True),)),
            "default via 203.0.113.1 dev wan onlink table 4001 protocol 73",
            id="onlink",
        ),
        pytest.param(
            Route(DEFAULT, 4001, (Hop("wan", IPv6Address("fe80::1")),)),
            "default via inet6 fe80::1 dev wan table 4001 protocol 73",
            id="gateway-of-the-other-family",
        ),
        pytest.param(
            Route(DEFAULT_6, 4001, kind="unreachable", metric=0xFFFFFFFF),
            "unreachable default table 4001 metric 4294967295 protocol 73",
            id="closed",
        ),
        pytest.param(
            Route(Prefix.parse("10.9.0.0/24"), 4002, (Hop("lan"),), source=IPv4Address("10.9.0.1")),
            "10.9.0.0/24 dev lan table 4002 src 10.9.0.1 protocol 73",
            id="source",
        ),
        pytest.param(
            Route(DEFAULT, 4001, (Hop("a", IPv4Address("192.0.2.1")), Hop("b", weight=2))),
            "default table 4001 protocol 73 nexthop via 192.0.2.1 dev a weight 1 nexthop dev b weight 2",
            id="two-hops",
        ),
    ],
)
def test_route_text(route: Route, text: str) -> None:
    """A route is printed as the words that `ip route add` takes."""
    assert str(route) == text


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        pytest.param(
            Rule(Family.IPV4, 4001, 4001, fwmark=Fwmark(0x1000000, 0x3F000000)),
            "priority 4001 fwmark 0x1000000/0x3f000000 lookup 4001 protocol 73",
            id="mark",
        ),
        pytest.param(
            Rule(Family.IPV6, 4002, 4002, source=Prefix.parse("2001:db8:4::130")),
            "priority 4002 from 2001:db8:4::130 lookup 4002 protocol 73",
            id="source",
        ),
    ],
)
def test_rule_text(rule: Rule, text: str) -> None:
    """A rule is printed as the words that `ip rule add` takes."""
    assert str(rule) == text


def test_route_key() -> None:
    """Routes that differ in their way only are one to the kernel: the second replaces the first."""
    one = Route(DEFAULT, 4001, (Hop("wg0"),))
    other = Route(DEFAULT, 4001, kind="unreachable")
    assert one != other
    assert one.key == other.key
    assert one.key != Route(DEFAULT, 4001, metric=1).key


# --- addresses and policies ------------------------------------------------------------------------------------------


@given(st.lists(addresses))
def test_sorted_addresses(given_: list[IPv4Address | IPv6Address]) -> None:
    """Sorted addresses are the same ones, each once, IPv4 first."""
    found = sorted_addresses(given_)
    assert set(found) == set(given_)
    assert list(found) == sorted({(address.version, int(address)): address for address in given_}.values(), key=_order)


def _order(address: IPv4Address | IPv6Address) -> tuple[int, int]:
    return address.version, int(address)


def test_parse_address() -> None:
    """An address is read from its text; a network isn't one."""
    assert parse_address("2001:db8::1") == IPv6Address("2001:db8::1")
    with pytest.raises(ValueError, match=r"^is not an address$"):
        parse_address("10.0.0.0/8")


def test_policy_has_no_such_identity() -> None:
    """Asking a policy for an identity that it hasn't is an error."""
    with pytest.raises(KeyError):
        Policy("gw", None, ()).identity("inside")
