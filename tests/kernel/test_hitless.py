"""Whatever is put in the place of whatever: under traffic no packet passes without its mark."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import reconcile
from agent.addresses import Prefix
from agent.model import Hop, Route
from agent.plan import AddRoute, Plan
from tests.kernel.admin import Admin, lay_links, policy_text
from tests.kernel.net import Host, fresh_namespace, named_namespace

#: A host behind the gateway, which speaks as inside whichever policy is in force, and one far away.
MEMBER, WILD = "10.9.0.5", "198.51.100.10"
#: Packets without a mark follow main, and its default, out of wan: nothing stops them here, so they can be counted.
OPEN = {"enforce": False}
TIMES = 6
SENDER = """
import signal, socket, sys
going = True
def stop(*_):
    global going
    going = False
signal.signal(signal.SIGTERM, stop)
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind((sys.argv[1], 0))
sock.connect((sys.argv[2], 9))
sent = 0
print("sending", flush=True)
while going:
    sock.send(b"x")
    sent += 1
print(sent)
"""
#: Behind all that is idmark's.
WATCH = f"""
table inet watch {{
    counter vpn0 {{ }}
    counter elsewhere {{ }}
    chain leaving {{
        type filter hook postrouting priority 400; policy accept;
        meta nfproto ipv6 accept
        ip saddr != {MEMBER} accept
        udp dport != 9 accept
        oifname "vpn0" counter name vpn0 accept
        counter name elsewhere
    }}
}}
"""


@pytest.fixture
def far() -> Iterator[Host]:
    """What is at the end of all links."""
    with named_namespace("far") as host:
        yield host


@pytest.fixture
def admin(far: Host, tmp_path: Path) -> Iterator[Admin]:
    """A gateway that counts what of the member's leaves by which link; a host far away is at the end of all of them."""
    with fresh_namespace("gw") as gw:
        lay_links(gw, far)
        far.ip("address", "add", f"{MEMBER}/24", "dev", "lan")
        far.ip("route", "add", WILD, "via", "10.9.0.1", "dev", "lan")
        for near, there, address in ((gw, far, MEMBER), (far, gw, "10.9.0.1")):
            lladdr = there.ip_json("link", "show", "lan")[0]["address"]
            near.ip("neighbour", "replace", address, "lladdr", lladdr, "dev", "lan")
        gw.nft(WATCH)
        yield Admin(gw, tmp_path)


@contextlib.contextmanager
def sending(source: str, destination: str) -> Iterator[subprocess.Popen[str]]:
    """A host sends as fast as it can; how many it were it says when it is stopped."""
    command = ["ip", "netns", "exec", "far", sys.executable, "-c", SENDER, source, destination]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "sending\n"
        try:
            yield process
        finally:
            process.terminate()


def hosts(count: int, first: int = 0) -> list[str]:
    """Addresses in 10.64.0.0/10."""
    return [f"10.{64 + (n >> 16)}.{n >> 8 & 255}.{n & 255}" for n in range(first, first + count)]


def lengths(count: int) -> list[str]:
    """A network of each of so many lengths."""
    return [f"10.{128 + n}.0.0/{16 + n}" for n in range(count)]


def policy(inside: list[str], outside: list[str] | None = None, **kernel: object) -> str:
    return policy_text({"members": inside}, {"members": outside or []}, kernel={**OPEN, **kernel}, downstream=["lan"])


PLAIN = ["10.9.0.0/24"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(policy(PLAIN), policy([*PLAIN, *hosts(3)]), id="elements-of-a-map"),
        pytest.param(policy(PLAIN), policy([*PLAIN, *hosts(200)]), id="a-larger-map"),
        pytest.param(policy(PLAIN), policy([*PLAIN, *hosts(5000)]), id="maps-and-sets"),
        pytest.param(policy([*PLAIN, *hosts(4500)]), policy([*PLAIN, *hosts(4500, first=60)]), id="elements-of-a-set"),
        pytest.param(
            policy([*PLAIN, *hosts(5000)]), policy([*PLAIN, *hosts(5000, first=5000)]), id="several-transactions"
        ),
        pytest.param(
            policy(["10.9.0.0/24", *hosts(5000)], ["10.9.0.0/16"]),
            policy(["10.9.0.0/25", *hosts(5000)], ["10.9.0.0/16", *hosts(5000, first=6000)]),
            id="a-longer-prefix",
        ),
        pytest.param(policy(PLAIN), policy([*PLAIN, *lengths(12)]), id="hashes-and-intervals"),
        pytest.param(
            policy(["10.9.0.0/16", "172.16.0.0/12"], ["10.200.0.0/25"]),
            policy(["10.9.0.0/25", "172.16.0.0/12", "10.7.0.0/24"], ["10.9.0.0/16", "10.9.0.0/24"]),
            id="shape-and-contents",
        ),
        pytest.param(policy([*PLAIN, *lengths(12)]), policy([*PLAIN, *hosts(5000)]), id="intervals-and-sets"),
        pytest.param(policy(PLAIN, nat=False), policy(PLAIN, nat=True), id="translations"),
        pytest.param(policy(PLAIN), policy(PLAIN, hook_priority=-140), id="another-hook"),
        pytest.param(
            policy([MEMBER, *hosts(5000)], ["10.9.0.0/24"], nat=False),
            policy([*PLAIN, MEMBER, *hosts(5000, first=3000)], hosts(3000), nat=True),
            id="rules-and-many-elements",
        ),
        pytest.param(
            policy([MEMBER, *hosts(5000)], hosts(3000, first=6000), nat=False),
            policy([*hosts(3000, first=6000), MEMBER], hosts(5000), nat=True),
            id="rules-and-all-elements",
        ),
    ],
)
def test_no_packet_without_a_mark(admin: Admin, one: str, other: str) -> None:
    """Policies take turns while a member sends: all of its packets leave by its identity's link, and none by main's."""
    sent = taking_turns(admin, one, other, MEMBER, WILD)
    admin.host.settle()
    assert (admin.host.counter("vpn0", "watch"), admin.host.counter("elsewhere", "watch")) == (sent, 0)


def test_no_packet_without_a_mark_while_it_is_taken_back(admin: Admin) -> None:
    """A plan whose last step fails is taken back, again and again."""
    one, other = policy(PLAIN, nat=False), policy([*PLAIN, "10.1.2.3"], nat=True)
    admin.apply(one)
    impossible = AddRoute(Route(Prefix.parse("198.18.0.0/15"), 4001, (Hop("nowhere"),)))
    with reconcile.opened() as kernel, sending(MEMBER, WILD) as sender:
        for _ in range(4 * TIMES):
            steps = reconcile.look(admin.write(other), kernel).plan.steps
            with pytest.raises(reconcile.ApplyError, match="what was in force before still is"):
                reconcile.apply(Plan((*steps, impossible)), kernel)
        sent = stopped(sender)
    admin.host.settle()
    assert (admin.host.counter("vpn0", "watch"), admin.host.counter("elsewhere", "watch")) == (sent, 0)


def changing_hands(inside: int, outside: int) -> str:
    """A policy that gives numbers, and with them marks and tables, to the two."""
    numbers = ({"members": PLAIN, "id": inside}, {"members": [], "id": outside})
    return policy_text(*numbers, kernel=OPEN, downstream=["lan"])


#: An operator's long way through rules of his own, between our mark and the route: it takes milliseconds.
LONG_WAY = f"""
table inet long {{
    chain hundred {{ {"meta mark 0x7fffffff counter; " * 100} }}
    chain hundreds {{ {"jump hundred; " * 100} }}
    chain arriving {{
        type filter hook prerouting priority -90; policy accept;
        iifname "lan" udp dport 9 jump thousands
    }}
    chain thousands {{ {"jump hundreds; " * 10} }}
}}
"""


@pytest.mark.parametrize("way", [pytest.param("", id="fast"), pytest.param(LONG_WAY, id="held-up")])
@pytest.mark.parametrize(
    "other",
    [
        pytest.param(changing_hands(2, 1), id="exchanged"),
        pytest.param(changing_hands(5, 1), id="inherited"),
        pytest.param(changing_hands(5, 2), id="new"),
    ],
)
def test_no_packet_takes_another_s_road(admin: Admin, other: str, way: str) -> None:
    """Marks become another identity's while packets are on their way that have them from the old rules."""
    if way:
        admin.host.nft(way)
    sent = taking_turns(admin, changing_hands(1, 2), other, MEMBER, WILD)
    admin.host.settle()
    assert admin.host.counter("elsewhere", "watch") == 0
    assert 0 < admin.host.counter("vpn0", "watch") <= sent


#: Behind what marks by the destination.
ARRIVED = """
table inet arrived {
    counter marked { }
    counter unmarked { }
    chain arriving {
        type filter hook prerouting priority -90; policy accept;
        iifname "vpn0" udp dport 9 jump counted
    }
    chain counted {
        meta mark != 0 counter name marked accept
        counter name unmarked
    }
}
"""


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(
            policy_text({"members": PLAIN, "id": 5}, {"members": []}, kernel=OPEN, downstream=["lan"]), id="id"
        ),
        pytest.param(policy(PLAIN, mark_mask=0x00FF0000), id="mask"),
    ],
)
def test_what_arrives_is_decided(admin: Admin, far: Host, other: str) -> None:
    """Whatever a mark is about to be, what arrives on its identity's own link has one."""
    gw = admin.host
    lladdr = gw.ip_json("link", "show", "vpn0")[0]["address"]
    far.ip("address", "add", f"{WILD}/32", "dev", "lo")
    far.ip("address", "delete", f"{MEMBER}/24", "dev", "lan")
    far.ip("route", "add", MEMBER, "dev", "vpn0")
    far.ip("neighbour", "replace", MEMBER, "lladdr", lladdr, "dev", "vpn0")
    gw.nft(ARRIVED)
    sent = taking_turns(admin, policy(PLAIN), other, WILD, MEMBER)
    gw.settle()
    assert (gw.counter("marked", "arrived"), gw.counter("unmarked", "arrived")) == (sent, 0)


def taking_turns(admin: Admin, one: str, other: str, source: str, destination: str) -> int:
    """Two policies take turns while a host sends; how many packets."""
    admin.apply(one)
    with sending(source, destination) as sender:
        for _ in range(TIMES):
            admin.apply(other)
            admin.apply(one)
        sent = stopped(sender)
    assert sent > 100
    return sent


def stopped(sender: subprocess.Popen[str]) -> int:
    """How many packets it has sent."""
    sender.terminate()
    assert sender.stdout
    return int(sender.stdout.read())
