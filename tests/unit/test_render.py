"""The files of a review: pure, deterministic, every line a command or a comment."""

from __future__ import annotations

import json
import random
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import commands, render, ruleset
from agent.addresses import Prefix, Prefixes
from agent.desired import desire
from agent.model import Facts, Policy
from agent.policy import load
from tests.unit.values import GATEWAY, INSIDE, OUTSIDE, VPN, host, hosts, policies, policy, toml

BOTH = desire(policy(INSIDE, OUTSIDE), GATEWAY)


def section(text: str, name: str) -> list[str]:
    """The lines of routing.txt about one identity."""
    (found,) = (part for part in text.split("\n\n") if re.search(rf"^# Identity \d+, {name}:", part, re.MULTILINE))
    return found.splitlines()


def test_routing() -> None:
    """An identity's commands stand together: closed first, the links' networks, the default, then the rules."""
    assert section(render.routing_text(BOTH), "outside") == [
        "# Identity 2, outside: link wan, table 4002, fwmark 0x2000000/0x3f000000",
        "# while its link is down: unreachable",
        "ip route replace unreachable default table 4002 metric 4294967295 protocol 73",
        "ip -6 route replace unreachable default table 4002 metric 4294967295 protocol 73",
        "ip route replace 10.9.0.0/24 dev lan table 4002 src 10.9.0.1 protocol 73",
        "ip route replace 203.0.113.0/24 dev wan table 4002 src 203.0.113.2 protocol 73",
        "ip -6 route replace 2001:db8:9::/64 dev lan table 4002 metric 256 protocol 73",
        "ip -6 route replace 2001:db8:203::/64 dev wan table 4002 metric 256 protocol 73",
        "ip route replace default via 203.0.113.1 dev wan table 4002 metric 1024 src 203.0.113.2 protocol 73",
        "ip -6 route replace default via 2001:db8:203::1 dev wan table 4002 metric 1024 src 2001:db8:203::2 "
        "protocol 73",
        "ip rule add priority 4002 fwmark 0x2000000/0x3f000000 lookup 4002 protocol 73",
        "ip rule add priority 4002 from 203.0.113.2 lookup 4002 protocol 73",
        "ip -6 rule add priority 4002 fwmark 0x2000000/0x3f000000 lookup 4002 protocol 73",
        "ip -6 rule add priority 4002 from 2001:db8:203::2 lookup 4002 protocol 73",
    ]


def test_what_only_the_host_knows() -> None:
    """Without facts what is "auto" is said as such, in comments."""
    desired = desire(policy(replace(INSIDE, when_down="outside"), replace(OUTSIDE, when_down="main")), None)
    lines = section(render.routing_text(desired), "outside")
    assert lines[1:6] == [
        '# addresses = "auto": a rule "from ADDRESS lookup 4002" for each global address of wan',
        '# next_hop = "auto": main\'s ipv4 default on wan',
        '# next_hop = "auto": main\'s ipv6 default on wan',
        "# from the host as well: the connected networks of wan, the routes of every link that is no identity's",
        "# while its link is down: main",
    ]
    assert "# while its link is down: the road of outside, then main" in section(render.routing_text(desired), "inside")


@pytest.mark.parametrize(
    ("downstream", "words"),
    [pytest.param(["dmz", "lan"], "dmz, lan", id="explicit"), pytest.param(None, "every link that is", id="auto")],
)
def test_downstream_is_said(downstream: list[str] | None, words: str) -> None:
    """A review says from which links the routes behind the gateway are going to come."""
    text = render.routing_text(desire(policy(INSIDE, downstream=downstream), None))
    assert f"# from the host as well: the connected networks of vpn0, the routes of {words}" in text


def test_closed_is_said() -> None:
    """With facts a closed family is said with its reason."""
    text = render.routing_text(desire(policy(INSIDE), host()))
    assert "# ipv4: closed, there is no link vpn0" in section(text, "inside")


def test_src_valid_mark() -> None:
    """The sysctl of a strict link is the last command; with slashes, for a link's name may hold a dot."""
    strict = host(replace(VPN, name="vpn0.7", rp_filter=1))
    text = render.routing_text(desire(policy(replace(INSIDE, link="vpn0.7")), strict))
    assert text.splitlines()[-1] == "sysctl -w net/ipv4/conf/vpn0.7/src_valid_mark=1"
    assert "sysctl" not in render.routing_text(BOTH)


def test_ruleset_is_what_is_loaded() -> None:
    """But for the header the text in review is the text that is given to the kernel."""
    text = render.ruleset_text(BOTH)
    (loaded,) = commands.transaction(ruleset.table(BOTH), None)
    assert text.endswith(loaded)
    assert text.splitlines()[:2] == ["# idmark, gateway gw1", f"# policy sha256:{'0' * 64}"]


def test_one_element_a_line() -> None:
    """A new member is one more line in the review, and of the others only that changes which counts the networks."""
    more = replace(INSIDE, members=Prefixes.of([*INSIDE.members, Prefix.parse("10.10.0.0/24")]))
    one = render.ruleset_text(BOTH).splitlines()
    two = render.ruleset_text(desire(policy(more, OUTSIDE), GATEWAY)).splitlines()
    counted = next(line for line in one if "networks of" in line)
    assert [line for line in two if line not in one] == [
        "            10.10.0.0 : goto id-inside,",
        counted.replace("3 networks", "4 networks"),
    ]
    assert len(two) == len(one) + 1


# --- laws ------------------------------------------------------------------------------------------------------------


def loaded(text: str) -> Policy:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "policy.toml")
        path.write_text(text, encoding="utf-8")
        return load(path)


T = TypeVar("T")


def shuffled(written: Policy, order: random.Random) -> str:
    """The same policy as a file with its tables, keys and lists in another order."""

    def mixed(items: Sequence[T]) -> tuple[T, ...]:
        return tuple(order.sample(items, len(items)))

    identities = [
        replace(
            each,
            addresses=each.addresses and mixed(each.addresses),
            next_hop=each.next_hop if isinstance(each.next_hop, str) else mixed(each.next_hop),
        )
        for each in written.identities
    ]
    downstream = written.downstream and mixed(written.downstream)
    text = toml(replace(written, identities=tuple(identities), downstream=downstream))
    text = re.sub(r"(?<=^members = ).*", lambda it: json.dumps(mixed(json.loads(it[0]))), text, flags=re.MULTILINE)
    head, *tables = re.split(r"^(?=\[)", text, flags=re.MULTILINE)
    for number, table in enumerate(tables):
        name, *keys = table.splitlines()
        tables[number] = "\n".join([name, *mixed(keys), ""])
    return head + "".join(mixed(tables))


@given(policies(), hosts() | st.none(), st.randoms(use_true_random=False))
def test_order_of_the_policy_means_nothing(written: Policy, facts: Facts | None, order: random.Random) -> None:
    """In whatever order a policy's tables, keys and lists stand, it renders to the same files."""
    one, other = loaded(toml(written)), loaded(shuffled(written, order))
    assert render.files(desire(one, facts)) == render.files(desire(other, facts))


@given(policies(), hosts(), st.randoms(use_true_random=False))
def test_order_of_the_facts_means_nothing(written: Policy, facts: Facts, order: random.Random) -> None:
    """In whatever order a host tells its links, addresses and routes, the same files are rendered."""
    links = [
        replace(each, addresses=tuple(order.sample(each.addresses, len(each.addresses))))
        for each in order.sample(facts.links, len(facts.links))
    ]
    mixed = Facts(tuple(links), tuple(order.sample(facts.routes, len(facts.routes))))
    assert render.files(desire(written, mixed)) == render.files(desire(written, facts))


@given(policies(), hosts() | st.none())
def test_routing_holds_everything(written: Policy, facts: Facts | None) -> None:
    """Each route, rule and sysctl that is wanted is one line of routing.txt, and each line is one or a comment."""
    desired = desire(written, facts)
    lines = [line for line in render.routing_text(desired).splitlines() if line and not line.startswith("#")]
    wanted = [f"{item.family.ip} route replace {item}" for item in desired.routes]
    wanted += [f"{item.family.ip} rule add {item}" for item in desired.rules]
    wanted += [f"sysctl -w net/ipv4/conf/{link}/src_valid_mark=1" for link in desired.src_valid_mark]
    assert sorted(lines) == sorted(wanted)


@given(policies(), hosts() | st.none())
def test_tidy(written: Policy, facts: Facts | None) -> None:
    """No line of a file ends in a blank, none is empty twice over, and the last one is whole; braces are in pairs."""
    for text in render.files(desire(written, facts)).values():
        assert not re.search(r"[ \t]+$", text, re.MULTILINE)
        assert "\n\n\n" not in text
        assert text.endswith("\n")
        assert not text.endswith("\n\n")
        bare = re.sub(r'#.*|"[^"\n]*"', "", text)
        assert bare.count("{") == bare.count("}")


@given(policies(), hosts() | st.none())
def test_no_brace_behind_a_rule(written: Policy, facts: Facts | None) -> None:
    """nft 1.0.6 wants a line's end or a semicolon before a closing brace, but where nothing stands between the two."""
    text = render.ruleset_text(desire(written, facts))
    for line in re.sub(r"#.*", "", text).splitlines():
        if "}" in line:
            assert re.search(r"(^ *|\{ *|; *)\}$", line) or " saddr != { " in line, line


@pytest.mark.parametrize("name", ["a;no-such", "a$b", "a&no-such", "a'b"])
def test_every_line_runs(name: str) -> None:
    """A link's name is one word of its lines, whatever a shell would make of it."""
    facts = host(replace(VPN, name=name, rp_filter=1))
    lines = render.routing_text(desire(policy(replace(INSIDE, link=name)), facts)).splitlines()
    own = [line for line in lines if line.startswith("sysctl ") or " dev " in line]
    assert len(own) == 5
    for line in own:
        ran = subprocess.run(["sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=False)
        assert {name, f"net/ipv4/conf/{name}/src_valid_mark=1"} & set(ran.stdout.splitlines())
