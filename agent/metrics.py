"""What Prometheus is told: the daemon's own doings as they happen, and the identities as the kernel has them at scrape.

Names, labels and units are the public interface, and stand in the README.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product, repeat
from pathlib import Path
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.samples import Sample

from agent import lookups
from agent.addresses import Family
from agent.carry import Carry
from agent.desired import Desired, Standing
from agent.kernel import KernelError
from agent.kernel.martians import martian_sources
from agent.kernel.nfnl import Nfnl
from agent.kernel.rtnl import Rtnl
from agent.model import Count
from agent.plan import KINDS
from agent.ruleset import COUNTS, counter_name

_log = logging.getLogger(__name__)

#: Seconds: a pass should take less than 0.1.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept in force, and which identities count as down besides; swapped as a whole."""

    desired: Desired
    down: Mapping[str, str]


Labels = dict[str, str]
Asked = TypeVar("Asked")


class Rows(Generic[Asked]):
    """The samples of a family without their values: labels, and by what each value is found in a reading."""

    def __init__(self) -> None:
        self.labels: list[Labels] = []
        self.asked: list[Asked] = []

    def add(self, labels: Labels, asked: Asked) -> None:
        """One sample more."""
        self.labels.append(labels)
        self.asked.append(asked)


class Roster:
    """What there is to tell of some standings: labels, and what to ask the kernel. A scrape only adds the values.

    The labels of a sample are the same object at every scrape: by that whoever writes them (`agent.lines`) knows that
    he has written them before.
    """

    def __init__(self, desired: Desired) -> None:
        self.standings = desired.standings
        self.questions = lookups.questions(desired)
        self.links = {standing.identity.link for standing in self.standings}
        self.info: list[Labels] = []
        #: By the link.
        self.up = Rows[str]()
        #: By the identity's name.
        self.probed = Rows[str]()
        #: By the identity's name and the family.
        self.roads = Rows[tuple[str, Family]]()
        #: By the counter's name.
        self.moved, self.misrouted, self.diverted = Rows[str](), Rows[str](), Rows[str]()
        for standing in self.standings:
            self._enter(standing)
        self.counters = frozenset(
            counter_name(standing.identity.name, family, count)
            for standing in self.standings
            for family, count in product(standing.families, COUNTS)
        )

    def _enter(self, standing: Standing) -> None:
        identity = standing.identity
        labels = {"identity": identity.name}
        self.info.append(
            {**labels, "link": identity.link, "fwmark": str(identity.fwmark), "table": str(identity.table)}
        )
        self.up.add(labels, identity.link)
        if identity.probe:
            self.probed.add(labels, identity.name)
        for family in standing.families:
            by_family = {**labels, "family": family.value}
            self.roads.add(by_family, (identity.name, family))
            for direction in ("transmit", "receive"):
                self.moved.add({**by_family, "direction": direction}, counter_name(identity.name, family, direction))
            for action in ("dropped", "passed"):
                counter = counter_name(identity.name, family, f"misrouted-{action}")
                self.misrouted.add({**by_family, "action": action}, counter)
            self.diverted.add(by_family, counter_name(identity.name, family, "diverted"))


@dataclass(frozen=True, slots=True)
class Reading:
    """What the kernel said at one scrape: counters by name, which links are up, which routes are as wanted."""

    counts: Mapping[str, Count]
    up: Mapping[str, bool]
    route_ok: Mapping[tuple[str, Family], bool]


class Metrics:
    """What `run` tells Prometheus. Scrapes may come in several threads, in the namespace of who started these.

    `carried` is the file from which counters go on after a restart. `notes` are what an operator should hear of.
    """

    def __init__(self, registry: CollectorRegistry, carried: Path) -> None:
        # When a counter was made is of no use here, and it would be another series for each (process-wide switch).
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._in_sync = Gauge(
            "idmark_in_sync", "1 if the last pass left the policy in force, 0 if not or not yet.", registry=registry
        )
        self._repairs = Counter(
            "idmark_repairs", "Objects in the kernel that were put right, by kind.", ["kind"], registry=registry
        )
        self._fights = Counter(
            "idmark_fights",
            "Times that another program began to keep changing an object in the kernel back, by kind.",
            ["kind"],
            registry=registry,
        )
        self._fighting = Gauge(
            "idmark_fighting",
            "Objects in the kernel that another program keeps changing back now, by kind.",
            ["kind"],
            registry=registry,
        )
        self._duration = Histogram(
            "idmark_reconcile_duration_seconds",
            "How long a pass took: the kernel read, compared with the policy, and put right.",
            buckets=BUCKETS,
            registry=registry,
        )
        self._errors = Counter("idmark_reconcile_errors", "Passes that failed.", registry=registry)
        self._reload_ok = Gauge(
            "idmark_policy_last_reload_successful",
            "1 if the policy file is what is kept in force, 0 if its last reading failed and the one before it is.",
            registry=registry,
        )
        self._reloaded_at = Gauge(
            "idmark_policy_last_reload_success_timestamp_seconds",
            "When the policy was last read without a fault, in seconds since 1970.",
            registry=registry,
        )
        for kind in dict.fromkeys(KINDS.values()):  # from the start, at 0: increase() doesn't see a first value
            self._repairs.labels(kind)
            self._fights.labels(kind)
            self._fighting.labels(kind)
        self._kept: Kept | None = None
        self._roster: Roster | None = None
        self._trouble = ""
        # One scrape after the other: of two readings the older must not come in second, for a counter that was reset.
        self._reading = threading.Lock()
        self._carry = Carry(carried)
        self.notes: tuple[str, ...] = ()
        try:
            self._carry.load()
        except KernelError as error:
            self.notes = (str(error),)
        registry.register(self)

    # --- what the daemon tells ---------------------------------------------------------------------------------------

    def passed(self, seconds: float, in_sync: bool) -> None:
        """A pass was made."""
        self._duration.observe(seconds)
        self._in_sync.set(in_sync)

    def failed(self) -> None:
        """A pass failed: nobody knows now whether the policy is in force."""
        self._errors.inc()
        self._in_sync.set(0)

    def out_of_sync(self) -> None:
        """Nothing can be put right for now."""
        self._in_sync.set(0)

    def repaired(self, kind: str) -> None:
        """An object of a kind was put right."""
        self._repairs.labels(kind).inc()

    def fought(self, kind: str) -> None:
        """Another program fights with us over one more object."""
        self._fights.labels(kind).inc()

    def fighting(self, objects: Mapping[str, int]) -> None:
        """So many objects of each kind are fought over now."""
        for kind in dict.fromkeys(KINDS.values()):
            self._fighting.labels(kind).set(objects.get(kind, 0))

    def reloaded(self, at: float) -> None:
        """The policy was read without a fault, at this time (seconds since 1970)."""
        self._reload_ok.set(1)
        self._reloaded_at.set(at)

    def not_reloaded(self) -> None:
        """The policy has faults: the one before it stays."""
        self._reload_ok.set(0)

    def keeps(self, desired: Desired, down: Mapping[str, str]) -> None:
        """This is kept in force from now on."""
        self._kept = Kept(desired, down)

    def close(self) -> None:
        """Remember the counters for the next start. Raises KernelError."""
        with self._reading:
            if self._kept:
                try:
                    with Nfnl() as nfnl:
                        self._carry.totals(nfnl.counts(self._kept.desired.policy.kernel.nft_table))
                finally:
                    self._carry.save()

    # --- what a scrape asks ------------------------------------------------------------------------------------------

    def describe(self) -> Iterator[Metric]:
        """The families of `collect`, without samples: the registry refuses a second one of a name."""
        families = Families()
        return iter((*families.of_identities, *families.others))

    def collect(self) -> Iterator[Metric]:
        """Read the kernel. What can't be read is no zero: then there are no identities' samples at all."""
        families = Families()
        with self._reading:
            started = time.monotonic()
            kept = self._kept
            trouble = "" if kept else "no pass was made yet"
            try:
                if kept:
                    families.policy(kept.desired.policy.digest)
                    roster = self._roster_of(kept.desired)
                    families.identities(roster, self._read(kept, roster), kept.down)
                families.martians(martian_sources())
            except (KernelError, OSError) as error:
                trouble = str(error)
            families.scrape(success=not trouble, seconds=time.monotonic() - started)
            if kept:
                self._tell(trouble)
        return iter((*(() if trouble else families.of_identities), *families.others))

    def _tell(self, trouble: str) -> None:
        """In the log, once."""
        if trouble and trouble != self._trouble:
            _log.warning("scrapes fail: %s", trouble)
        elif self._trouble and not trouble:
            _log.info("scrapes succeed again")
        self._trouble = trouble

    def _roster_of(self, desired: Desired) -> Roster:
        """The one of last time, if nothing has changed since."""
        if self._roster is None or self._roster.standings != desired.standings:
            self._roster = Roster(desired)
        self._roster.standings = desired.standings  # the very same are soon compared
        return self._roster

    def _read(self, kept: Kept, roster: Roster) -> Reading:
        name = kept.desired.policy.kernel.nft_table
        with Nfnl() as nfnl:
            found = nfnl.counts(name)
        missing = sorted(roster.counters - found.keys())
        if missing:
            raise KernelError(f"read the counters of nft table inet {name}", f"there is no {missing[0]}")
        if len(found) > len(roster.counters):  # somebody has others there
            found = {counter: found[counter] for counter in roster.counters}
        counts = self._carry.totals(found)
        if self._carry.changed:
            self._save()
        with Rtnl() as rtnl:
            wrong = lookups.disagreeing(roster.questions, rtnl)
            return Reading(
                counts=counts,
                up={link: rtnl.is_up(link) for link in roster.links},
                route_ok={road: not disagreeing for road, disagreeing in wrong.items()},
            )

    def _save(self) -> None:
        try:
            self._carry.save()
        except KernelError as error:
            # The numbers are right until the next start: no reason to withhold them.
            _log.warning("counters will not go on after a restart: %s", error)
            self._carry.changed = False


class Families:
    """The metric families of one scrape."""

    def __init__(self) -> None:
        counter, gauge = CounterMetricFamily, GaugeMetricFamily
        by_direction = ["identity", "family", "direction"]
        by_action = ["identity", "family", "action"]
        by_family = ["identity", "family"]
        self.packets = counter(
            "idmark_identity_packets",
            "IP packets that left by the identity's own link, or arrived for it there.",
            labels=by_direction,
        )
        self.bytes = counter(
            "idmark_identity_bytes",
            "Bytes of IP packets that left by the identity's own link, or arrived for it there.",
            labels=by_direction,
        )
        self.misrouted_packets = counter(
            "idmark_identity_misrouted_packets",
            "IP packets that were about to leave by a link which is not the identity's: dropped, or only counted.",
            labels=by_action,
        )
        self.misrouted_bytes = counter(
            "idmark_identity_misrouted_bytes",
            "Bytes of IP packets that were about to leave by a link which is not the identity's.",
            labels=by_action,
        )
        self.diverted_packets = counter(
            "idmark_identity_diverted_packets",
            "IP packets that left by another road, because when_down says so.",
            labels=by_family,
        )
        self.diverted_bytes = counter(
            "idmark_identity_diverted_bytes",
            "Bytes of IP packets that left by another road, because when_down says so.",
            labels=by_family,
        )
        self.info = InfoMetricFamily("idmark_identity", "An identity's link, fwmark with its mask, and routing table.")
        self.link_up = gauge(
            "idmark_identity_link_up",
            "1 if the identity's link is there, up and has a carrier.",
            labels=["identity"],
        )
        self.route_ok = gauge(
            "idmark_identity_route_ok",
            "1 if the kernel's own route lookup leads where the policy wants it now: own link, detour, or nowhere.",
            labels=by_family,
        )
        self.probe_success = gauge(
            "idmark_identity_probe_success",
            "0 while the identity counts as down because its probe is not answered.",
            labels=["identity"],
        )
        self.policy_info = InfoMetricFamily("idmark_policy", "The digest of the policy that is kept in force.")
        self.martian_sources = counter(
            "idmark_martian_source_packets",
            "IPv4 packets that rp_filter or an impossible source stopped, on the whole machine, in all namespaces.",
        )
        self.scrape_success = gauge("idmark_scrape_success", "1 if the kernel could be read for this scrape.")
        self.scrape_duration = gauge("idmark_scrape_duration_seconds", "How long it took to read the kernel for it.")

    @property
    def of_identities(self) -> tuple[Metric, ...]:
        """Those that have no samples when the kernel can't be read."""
        return (
            self.packets,
            self.bytes,
            self.misrouted_packets,
            self.misrouted_bytes,
            self.diverted_packets,
            self.diverted_bytes,
            self.info,
            self.link_up,
            self.route_ok,
            self.probe_success,
        )

    @property
    def others(self) -> tuple[Metric, ...]:
        return (self.policy_info, self.martian_sources, self.scrape_success, self.scrape_duration)

    def policy(self, digest: str) -> None:
        """Which policy is kept."""
        self.policy_info.add_metric([], {"digest": digest})

    def identities(self, roster: Roster, reading: Reading, down: Mapping[str, str]) -> None:
        """What the kernel said of every identity."""
        _fill(self.info, "_info", roster.info, repeat(1))
        _fill(self.link_up, "", roster.up.labels, map(reading.up.__getitem__, roster.up.asked))
        _fill(self.probe_success, "", roster.probed.labels, (name not in down for name in roster.probed.asked))
        _fill(self.route_ok, "", roster.roads.labels, map(reading.route_ok.__getitem__, roster.roads.asked))
        for packets, data, rows in (
            (self.packets, self.bytes, roster.moved),
            (self.misrouted_packets, self.misrouted_bytes, roster.misrouted),
            (self.diverted_packets, self.diverted_bytes, roster.diverted),
        ):
            counts = [reading.counts[counter] for counter in rows.asked]
            _fill(packets, "_total", rows.labels, [count.packets for count in counts])
            _fill(data, "_total", rows.labels, [count.bytes for count in counts])

    def martians(self, packets: int | None) -> None:
        """The machine's count, where the kernel has one."""
        if packets is not None:
            self.martian_sources.add_metric([], packets)

    def scrape(self, *, success: bool, seconds: float) -> None:
        """How this scrape went."""
        self.scrape_success.add_metric([], success)
        self.scrape_duration.add_metric([], seconds)


def _fill(family: Metric, suffix: str, labels: Iterable[Labels], values: Iterable[float]) -> None:
    """Give a family its samples, as add_metric() would one by one."""
    family.samples = [*map(Sample, repeat(family.name + suffix), labels, values)]
