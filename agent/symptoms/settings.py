"""Settings of the kernel, of network managers, of files: what they do to identities."""

from __future__ import annotations

import time
from collections.abc import Iterator

from agent.addresses import Family
from agent.desired import Desired, downstream_routes
from agent.host import Host, KeptFile, conf
from agent.model import Link
from agent.neighbours import owner_of_link
from agent.symptoms import Symptom, some

STRICT = 1
#: From which part of its limit on the connection table counts as nearly full.
NEARLY = 0.8
#: What a link without a tunnel carries, in bytes.
ETHERNET_MTU = 1500
#: So many seconds a file may be ahead of the clock: two clocks of one machine are never the same.
AHEAD = 60.0
#: The names of the programs, as the kernel has them: 15 bytes at most.
NETWORKD, NETWORK_MANAGER = "systemd-network", "NetworkManager"

#: Whose files may be: the agent's own user is made by deploy/sysusers.d.
TRUSTED = frozenset({"root", "idmark"})
#: Permission bits (inode(7)): writable by the group or by all; anything at all for others; deletable by owners only.
WRITABLE, FOR_OTHERS, STICKY = 0o022, 0o007, 0o1000


def missing_features(desired: Desired, host: Host) -> Iterator[Symptom]:
    """What this kernel can't do."""
    del desired
    for what, why in host.missing:
        yield Symptom(
            f"this kernel can't do what idmark's ruleset needs: {what}",
            f"a dry run of nft: {why}",
            "load the module, or take a kernel that has it (linux-image-… instead of a -cloud or -minimal one)",
        )


def strict_rp_filter(desired: Desired, host: Host) -> Iterator[Symptom]:
    """Strict rp_filter on an identity's link, and the packet's mark doesn't count there, though the policy is in force.

    The larger of `all` and the link's takes effect, of src_valid_mark the OR (ip-sysctl.rst).
    """
    for name in sorted(desired.src_valid_mark):
        link = host.facts.link(name)
        if host.in_force and link and not link.src_valid_mark:
            yield Symptom(
                f"strict rp_filter judges what arrives on {name} without its mark: what is translated to a host behind "
                "is dropped",
                f"{_effective(host, name, 'rp_filter')}; {_effective(host, name, 'src_valid_mark')}",
                f"idmark apply; and take src_valid_mark of {name} out of /etc/sysctl.d, where somebody sets it to 0",
            )


def marks_for_all(desired: Desired, host: Host) -> Iterator[Symptom]:
    """`conf/all/src_valid_mark`: every link's strict rp_filter goes by marks, those of others too."""
    del desired
    strict = [link.name for link in host.facts.links if _rp_filter(host, link) == STRICT and link.name != "lo"]
    if host.sysctl(conf("ipv4", "all", "src_valid_mark")) and strict:
        yield Symptom(
            f"strict rp_filter goes by packet marks on every link, and so by any program's: {some(strict)}",
            f"/proc/sys/{conf('ipv4', 'all', 'src_valid_mark')} is 1 (wg-quick sets it); "
            f"{_effective(host, strict[0], 'rp_filter')}",
            "sysctl -w net.ipv4.conf.all.src_valid_mark=0 (idmark sets that of its own links); with wg-quick, "
            "`Table = off`",
        )


def own_sources(desired: Desired, host: Host) -> Iterator[Symptom]:
    """accept_local and `drop_own_sources`, which belong together: one alone opens something, or costs something.

    Of accept_local the OR of `all` and the link's takes effect (ip-sysctl.rst), and nothing where rp_filter is on.
    """
    accepting = [
        link
        for link in host.facts.links
        if link.name != "lo" and any(host.sysctl(conf("ipv4", name, "accept_local")) for name in ("all", link.name))
    ]
    if desired.policy.kernel.drop_own_sources:
        if all(_rp_filter(host, link) for link in accepting):
            yield Symptom(
                "drop_own_sources spares nobody anything: the kernel itself looks whether a source is this host's own",
                "no link has accept_local = 1 and rp_filter = 0",
                "on the links with the hosts behind, in /etc/sysctl.d/50-idmark.conf: net.ipv4.conf.NAME.accept_local "
                "= 1; then sysctl --system; or take drop_own_sources out of the policy",
            )
    elif accepting:
        yield Symptom(
            f"whoever sends by {some(link.name for link in accepting)} may claim to be this host",
            _effective(host, accepting[0].name, "accept_local"),
            "in the policy, under [kernel]: drop_own_sources = true; or accept_local = 0",
        )


def forwarding_off(desired: Desired, host: Host) -> Iterator[Symptom]:
    """Members, and a kernel that passes nothing on."""
    names = [link.name for link in host.facts.links]
    for family in Family:
        with_members = [
            standing.identity.name for standing in desired.standings if family in standing.identity.members.families
        ]
        if with_members and not any(host.sysctl(conf(family, name, "forwarding")) for name in names):
            setting = "net.ipv4.ip_forward" if family is Family.IPV4 else "net.ipv6.conf.all.forwarding"
            yield Symptom(
                f"{some(with_members)} has {family} members, and this host forwards no {family}",
                f"/proc/sys/{conf(family, '*', 'forwarding')}: 0 on every link",
                f"in /etc/sysctl.d/50-idmark.conf: {setting} = 1; then sysctl --system",
            )


def deaf_to_routers(desired: Desired, host: Host) -> Iterator[Symptom]:
    """A router listens to no router: with forwarding, `accept_ra = 1` means no."""
    for standing in desired.standings:
        identity = standing.identity
        link = identity.link
        accept, forwarding = (host.sysctl(conf("ipv6", link, name)) for name in ("accept_ra", "forwarding"))
        waits = ["next_hop"] * (identity.next_hop == "auto") + ["addresses"] * (identity.addresses is None)
        way = standing.way(Family.IPV6)
        # An open one has a static route, or one of a network manager that listens itself.
        if way and way.closed and waits and accept == 1 and forwarding:
            yield Symptom(
                f"identity {identity.name} waits for what routers on {link} advertise ({' and '.join(waits)} = "
                '"auto"), and the kernel does not listen to them while it forwards',
                f"/proc/sys/{conf('ipv6', link, 'accept_ra')} is 1, "
                f"/proc/sys/{conf('ipv6', link, 'forwarding')} is {forwarding}",
                f"in /etc/sysctl.d/50-idmark.conf: net.ipv6.conf.{_sysctl_name(link)}.accept_ra = 2; then "
                "sysctl --system",
            )


def unclamped(desired: Desired, host: Host) -> Iterator[Symptom]:
    """A tunnel that carries less than the links behind it, and nobody tells the hosts there."""
    for standing in desired.standings:
        identity = standing.identity
        if not identity.members or identity.clamp_mss or standing.mtu is None:
            continue
        behind = {
            hop.link
            for family in Family
            for route in downstream_routes(desired.policy, host.facts, family)
            for hop in route.hops
        }
        found = [link for link in host.facts.links if link.name in behind]
        widest = max(found, key=lambda link: link.mtu, default=None)
        if standing.mtu < (widest.mtu if widest else ETHERNET_MTU):
            seen = f", of {widest.name} {widest.mtu}" if widest else ""
            yield Symptom(
                f"members of {identity.name} learn of {identity.link}'s smaller packets from ICMP only: where that is "
                "filtered, their downloads hang",
                f"the MTU of {identity.link} is {standing.mtu}{seen}",
                f"in the policy, [identity.{identity.name}]: clamp_mss = true",
            )


def containers_not_downstream(desired: Desired, host: Host) -> Iterator[Symptom]:
    """A container network that the policy doesn't name: an identity's packets to it are misrouted ones."""
    listed = desired.policy.downstream
    if listed is None:
        return
    own = {standing.identity.link for standing in desired.standings}
    for link in host.facts.links:
        owner = owner_of_link(link.name)
        if owner and link.addresses and link.name not in (*listed, *own):
            names = ", ".join(f'"{name}"' for name in (*listed, link.name))
            yield Symptom(
                f"{owner.name}'s {link.name} is not downstream: what identities send there is "
                f"{'dropped' if desired.policy.kernel.enforce else 'counted'} as misrouted",
                f"link {link.name}, {some(f'{item.address}/{item.length}' for item in link.addresses)}; downstream = "
                f"[{', '.join(listed)}]",
                f"in the policy: downstream = [{names}]",
            )


def members_behind_a_router(desired: Desired, host: Host) -> Iterator[Symptom]:
    """Members that main finds behind another router, where "auto" knows connected networks alone.

    What comes back for them by an identity's link has no route in its table but out by it again.
    """
    if desired.policy.downstream is not None:
        return
    own = {standing.identity.link for standing in desired.standings}
    behind = [each for each in host.to_members if each[2].via and each[2].link not in own]
    for link in dict.fromkeys(road.link for _, _, road in behind):
        there = [each for each in behind if each[2].link == link]
        _, network, road = there[0]
        yield Symptom(
            f"members of {some(dict.fromkeys(name for name, _, _ in there))} are behind another router, and no "
            "identity's table has the way to them: answers from the wild side go back there",
            f'ip route get, {network}: {road}; downstream = "auto" is the connected networks',
            f'in the policy: downstream = ["{link}"], with the other links that have hosts behind them',
        )


def connections_full(desired: Desired, host: Host) -> Iterator[Symptom]:
    """The connection table: when it is full new connections are dropped, whoever's."""
    del desired
    count, limit = (host.sysctl(f"net/netfilter/nf_conntrack_{name}") for name in ("count", "max"))
    if limit and count >= limit * NEARLY:
        yield Symptom(
            f"the connection table is {'full' if count >= limit else 'nearly full'}: new connections are dropped then",
            f"/proc/sys/net/netfilter: nf_conntrack_count {count}, nf_conntrack_max {limit}",
            f"in /etc/sysctl.d/50-idmark.conf: net.netfilter.nf_conntrack_max = {limit * 4}; then sysctl --system; and "
            "look who opens so many (conntrack -L)",
        )


def networkd_deletes(desired: Desired, host: Host) -> Iterator[Symptom]:
    """systemd-networkd takes away what is not its own, whenever it restarts or reconfigures a link."""
    del desired
    on = [setting for setting in host.networkd if setting.value == "yes"]
    if on and NETWORKD in host.programs:
        yield Symptom(
            "systemd-networkd deletes other programs' rules and routes whenever it restarts or reconfigures a link",
            some(on, "; "),
            "in /etc/systemd/networkd.conf.d/50-idmark.conf, under [Network]: "
            f"{', '.join(f'{setting.key}=no' for setting in on)}; then systemctl restart systemd-networkd",
        )


def network_manager_tables(desired: Desired, host: Host) -> Iterator[Symptom]:
    """NetworkManager with a table for a connection's routes deletes others' routes by that link, in whatever table.

    nm-settings(5), ipv4.route-table: with 0, the default, it leaves all tables alone but main.
    """
    links = {standing.identity.link for standing in desired.standings}
    for setting in host.network_manager if NETWORK_MANAGER in host.programs else ():
        link, _, key = setting.key.rpartition(" ")
        if not link or link in links:
            yield Symptom(
                f"NetworkManager deletes routes in every table that are not its own, on {link or 'any link'}",
                f"{setting.file}: {key}={setting.value}",
                f"nmcli connection modify NAME {key} 0; idmark has the tables"
                if link
                else f"take {key} out of {setting.file}; then nmcli general reload",
            )


def files_of_others(desired: Desired, host: Host) -> Iterator[Symptom]:
    """Files by which somebody else may change who is who, or read what isn't for everybody."""
    del desired
    for file in host.files:
        evidence = f"{file.path}: owner {file.owner}, mode {file.mode:04o}"
        if file.owner not in TRUSTED:
            yield Symptom(
                f"the {_title(file)} is somebody else's: {file.owner} may change it",
                evidence,
                f"chown root {file.path}",
            )
        if file.mode & WRITABLE and not (file.directory and file.mode & STICKY):
            yield Symptom(f"the {_title(file)} may be changed by others", evidence, f"chmod go-w {file.path}")
        elif file.purpose == "state" and file.mode & FOR_OTHERS:
            yield Symptom(f"the {_title(file)} may be read by others", evidence, f"chmod o-rwx {file.path}")
        if file.refused:
            yield Symptom(
                f"the {_title(file)} can't be read by idmark, the user that the service runs as",
                evidence,
                f"chgrp idmark {file.path} && chmod g+r{'x' if file.directory else ''} {file.path}",
            )


def clock_behind(desired: Desired, host: Host) -> Iterator[Symptom]:
    """A clock that was set back: what was applied last is not what seems the latest."""
    del desired
    latest = max(host.files, key=lambda file: file.changed, default=None)
    if latest and latest.changed > host.now + AHEAD:
        yield Symptom(
            "the clock is behind: files of idmark are from the future",
            f"{latest.path} was changed at {_moment(latest.changed)}, and it is {_moment(host.now)}",
            "set the clock and keep it right: timedatectl set-ntp true",
        )


# --- what they share -------------------------------------------------------------------------------------------------


def _rp_filter(host: Host, link: Link) -> int:
    return max(host.sysctl(conf("ipv4", name, "rp_filter")) for name in ("all", link.name))


def _effective(host: Host, link: str, name: str) -> str:
    every, own = (host.sysctl(conf("ipv4", each, name)) for each in ("all", link))
    return f"{name}: all {every}, {link} {own}, in effect {max(every, own)}"


def _sysctl_name(link: str) -> str:
    """sysctl(8) takes a dot for a slash, and the other way round."""
    return link.replace(".", "/")


def _title(file: KeptFile) -> str:
    words = {"policy": "policy", "list": "list of a policy", "state": "state"}[file.purpose]
    return f"directory of the {words}" if file.directory else words


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
