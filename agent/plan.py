"""`Desired` and `Observed` → `Plan`: what to do, in the order to do it in, as text that reads like a script."""

from __future__ import annotations

import hashlib
import itertools
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from agent import ruleset
from agent.addresses import Family, Prefix
from agent.desired import Desired, priority_behind
from agent.model import GOTO, LOOKUP, METRIC_LAST, NOP, UNREACHABLE, Fwmark, Route, Rule, Table
from agent.stages import Change, Load, replacement, stages

__all__ = ["Change", "Load", "Observed", "Plan", "Step", "plan", "removal", "restoration"]


@dataclass(frozen=True, slots=True)
class Observed:
    """What the kernel has that is ours: routes and rules by protocol number, the nft table, links by our own record.

    `rules` keep the kernel's order and may hold one twice. `other_tables` are ours from when the policy named the
    table otherwise. `src_valid_mark` are the identities' links on which it takes effect, `src_valid_mark_ours` those
    where we set it. `foreign_routes` are other people's in our routing tables, `addresses` all that links have now.
    `closed` are the marks that are let out nowhere while roads change; None: no table is there that does.
    """

    routes: frozenset[Route] = frozenset()
    rules: tuple[Rule, ...] = ()
    table: Table | None = None
    other_tables: tuple[str, ...] = ()
    src_valid_mark: frozenset[str] = frozenset()
    src_valid_mark_ours: frozenset[str] = frozenset()
    foreign_routes: tuple[Route, ...] = ()
    addresses: frozenset[Prefix] = frozenset()
    closed: frozenset[Fwmark] | None = None

    @property
    def tables(self) -> tuple[str, ...]:
        """The names of all nft tables that are ours; what closes comes last."""
        closed = (ruleset.CLOSED,) if self.closed is not None else ()
        return (*((self.table.name,) if self.table else ()), *self.other_tables, *closed)

    @property
    def notes(self) -> tuple[str, ...]:
        """What an operator should hear of."""
        return tuple(
            f"table {route.table} holds a route that is not idmark's, and packets may follow it: {route.words}"
            for route in self.foreign_routes
        )


@dataclass(frozen=True, slots=True)
class AddRoute:
    """`opening`: a road begins with it, behind the rules that belong to it."""

    route: Route
    opening: bool = False

    def lines(self) -> Iterator[str]:
        yield f"+ {self.route.family.ip} route add {self.route}"

    def inverse(self) -> Step:
        return DeleteRoute(self.route, closing=self.opening)


@dataclass(frozen=True, slots=True)
class ReplaceRoute:
    """One route in the place of another with the same key: no moment without either."""

    old: Route
    new: Route

    def lines(self) -> Iterator[str]:
        yield f"- {self.old.family.ip} route delete {self.old}"
        yield f"+ {self.new.family.ip} route replace {self.new}"

    def inverse(self) -> Step:
        return ReplaceRoute(self.new, self.old)


@dataclass(frozen=True, slots=True)
class DeleteRoute:
    """`closing`: a road ends with it, before the rules go that belong to it; otherwise it is late (`is_late`)."""

    route: Route
    closing: bool = False

    def lines(self) -> Iterator[str]:
        yield f"- {self.route.family.ip} route delete {self.route}"

    def inverse(self) -> Step:
        return AddRoute(self.route, opening=self.closing)


@dataclass(frozen=True, slots=True)
class AddRule:
    rule: Rule

    def lines(self) -> Iterator[str]:
        yield f"+ {self.rule.family.ip} rule add {self.rule}"

    def inverse(self) -> Step:
        return DeleteRule(self.rule)


@dataclass(frozen=True, slots=True)
class DeleteRule:
    rule: Rule

    def lines(self) -> Iterator[str]:
        yield f"- {self.rule.family.ip} rule delete {self.rule}"

    def inverse(self) -> Step:
        return AddRule(self.rule)


@dataclass(frozen=True, slots=True)
class SetSrcValidMark:
    link: str
    on: bool

    def __str__(self) -> str:
        """The command; with slashes, for a link's name may hold a dot (sysctl(8))."""
        return f"sysctl -w net/ipv4/conf/{shlex.quote(self.link)}/src_valid_mark={int(self.on)}"

    def lines(self) -> Iterator[str]:
        yield f"{'+' if self.on else '-'} {self}"

    def inverse(self) -> Step:
        return SetSrcValidMark(self.link, not self.on)


RuleStep = TypeVar("RuleStep", AddRule, DeleteRule)
RouteStep = TypeVar("RouteStep", bound=AddRoute | ReplaceRoute | DeleteRoute)
Step = AddRoute | ReplaceRoute | DeleteRoute | AddRule | DeleteRule | SetSrcValidMark | Change | Load

#: How many addresses that were an identity's are refused at most.
FORMER = 64
#: What a step is about, in the words of the metrics' `kind` label.
KINDS = {
    AddRoute: "route",
    ReplaceRoute: "route",
    DeleteRoute: "route",
    AddRule: "rule",
    DeleteRule: "rule",
    SetSrcValidMark: "sysctl",
    Change: "nft",
    Load: "nft",
}


def kind(step: Step) -> str:
    """`route`, `rule`, `sysctl` or `nft`."""
    return KINDS[type(step)]


def closes(step: Step) -> bool:
    """Whether what comes behind a step would be open without it: a rule, a table's last route, the end of a road that
    is going to lack its rules, nft's own order.
    """
    match step:
        case AddRoute(route) | ReplaceRoute(_, route):
            return route.metric == METRIC_LAST
        case DeleteRoute(_, closing):
            return closing
    return isinstance(step, AddRule | Change | Load)


def is_late(step: Step) -> bool:
    """Whether it takes away what packets may want that have been on their way since others were marked otherwise."""
    match step:
        case Change() | Load():
            return step.late
        case DeleteRoute(_, closing):
            return not closing
    return isinstance(step, DeleteRule)


def unsettles(step: Step) -> bool:
    """Whether packets may be on their way behind it that have met what was before: late steps wait for those."""
    return step.marking if isinstance(step, Change | Load) else isinstance(step, DeleteRoute) and step.closing


@dataclass(frozen=True)
class Plan:
    """Steps in the order to take them: make before break. An empty plan says that everything is in force."""

    steps: tuple[Step, ...]

    @cached_property
    def text(self) -> str:
        """A line a change, `+` or `-`; the reviewer's text, and what the digest is taken of."""
        return "".join(f"{line}\n" for step in self.steps for line in step.lines())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the text, hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def plan(desired: Desired, observed: Observed) -> Plan:
    """How to get from what is there to what is wanted.

    Order: routes, rules, marks; and backwards when taking away. A mark without its rule follows main, a rule without
    its table's last route falls through to main: both would be leaks. The rules that close whoever has no mark come
    when all have theirs, and go before: nothing is lost on the way. But where there is no table nobody marks anything:
    then they come first, and what is there stays until the end.

    Where rules change, a road that opens comes behind those that translate and clamp what leaves by it, and one that
    closes goes before them: a connection that began in between would stay as it began. The identity is closed then
    anyway, or on its detour; but for one whose roads close and open in one plan, which is closed meanwhile.

    When roads change hands (ids are exchanged, tables or the mask move, a link is another's now) there is no order in
    which each mark has its own road at every moment. Then the marks that are there are closed first, and the new ones
    come when nothing is left of the old roads. They are opened when no packet is on its way any more that has its mark
    from the old rules.
    """
    wanted = ruleset.table(desired)
    add_routes, delete_routes = _route_steps(desired.routes, observed.routes)
    adding, deleting = _rule_steps(desired.rules | _former(desired, observed), observed.rules)
    add_rules, add_guards = _apart(adding)
    delete_rules, delete_guards = _apart(deleting)
    marked = observed.table is not None
    staged = [*stages(wanted, observed.table, rules_anew=False)]
    rules_change = any(isinstance(step, Load) for step in staged)
    turning = _turning(desired, observed, wanted) if rules_change else frozenset[Turn]()
    closed = _handover(desired, observed, wanted, turning)
    handover = closed is not None
    if handover:
        staged = [*stages(wanted, observed.table, rules_anew=True)]
        turning = frozenset()  # behind closed marks roads may open and close at any time
    add_routes, opening = _split(add_routes, turning)
    delete_routes, closing = _split(delete_routes, turning)
    new_marks: tuple[Step, ...] = (
        *_behind(staged, closing=bool(closing)),
        *map(_delete_table, observed.other_tables),
        *_open(closed, observed),
    )
    taking_away: tuple[Step, ...] = (*delete_rules, *delete_routes)
    return Plan(
        (
            *(SetSrcValidMark(link, True) for link in sorted(desired.src_valid_mark - observed.src_valid_mark)),
            *_wake(observed.table),
            *_close(closed, observed),
            *(delete_guards if marked else add_guards),
            *add_routes,
            *add_rules,
            *(replace(step, closing=True) for step in closing),
            *((*taking_away, *new_marks) if handover else (*new_marks, *map(_opening, opening), *taking_away)),
            *(add_guards if marked else delete_guards),
            *(SetSrcValidMark(link, False) for link in sorted(observed.src_valid_mark_ours - desired.src_valid_mark)),
        )
    )


def _former(desired: Desired, observed: Observed) -> frozenset[Rule]:
    """Rules that refuse what the host still sends from addresses that were an identity's, and are no link's any more.

    IPv6 looks at a source when a socket is bound, and never again: without them a program goes on sending from the
    address that a tunnel had, by main. IPv4 doesn't let it. The kernel's own rules are the memory: they are kept until
    the address is there again, the oldest go when there are too many.
    """
    kernel = desired.policy.kernel
    own = {rule.source for rule in desired.rules if rule.action == LOOKUP}
    gone = dict.fromkeys(
        rule.source
        for rule in observed.rules
        if rule.source
        and rule.source.length == Family.IPV6.bits
        and rule.source not in own | observed.addresses
        and (
            _refuses_former(rule)
            # One of ours, that is about to go.
            or 0 < rule.priority - kernel.rule_priority == rule.table - kernel.table_base
        )
    )
    behind = priority_behind(desired.policy.identities)
    return frozenset(
        Rule(Family.IPV6, behind, source=source, iif="lo", action=UNREACHABLE) for source in [*gone][-FORMER:]
    )


def _refuses_former(rule: Rule) -> bool:
    return (rule.action, rule.iif, rule.unmarked, rule.extra) == (UNREACHABLE, "lo", 0, ())


def _wake(table: Table | None) -> Iterator[Load]:
    """A table without the flag is awake; the kernel changes no hooks in the transaction that says so (EINVAL)."""
    if table and table.dormant:
        yield Load(table.name, (f"add table inet {table.name}",))


#: A road's begin or end: routing table, family and link; and whether it is that of the default alone.
Turn = tuple[int, Family, str, bool]


def _turning(desired: Desired, observed: Observed, wanted: Table) -> frozenset[Turn]:
    """The roads that open or close of packets that have their marks before and after."""
    if observed.table is None:
        return frozenset()
    links: dict[tuple[int, Family], Set[str]] = {}
    present, later = ruleset.roads(observed.table), ruleset.roads(wanted)
    for family in Family:
        rules = _Routing.of((rule for rule in observed.rules if rule.family is family), ())
        for mark, roads in present.items():
            for table in rules.tables(mark):
                links[table, family] = links.get((table, family), set()) | roads.links | later.get(mark, roads).links
    before, after = (
        {turn for route in routes for turn in _turns(route) if turn[2] in links.get((route.table, route.family), ())}
        for routes in (observed.routes, desired.routes)
    )
    kept = {(standing.identity.table, family) for standing in desired.standings for family in standing.families}
    return frozenset(turn for turn in before ^ after if turn[:2] in kept)


def _turns(route: Route) -> Iterator[Turn]:
    """What begins with a route if it is a table's first by its links, or the first default."""
    for hop in route.hops:
        yield route.table, route.family, hop.link, False
        if not route.destination.length:
            yield route.table, route.family, hop.link, True


def _split(steps: Iterable[RouteStep], turning: Set[Turn]) -> tuple[list[RouteStep], list[RouteStep]]:
    """Steps about other routes, and those about roads that open or close."""
    others, these = list[RouteStep](), list[RouteStep]()
    for step in steps:
        route = step.new if isinstance(step, ReplaceRoute) else step.route
        (others if turning.isdisjoint(_turns(route)) else these).append(step)
    return others, these


def _opening(step: AddRoute | ReplaceRoute) -> AddRoute | ReplaceRoute:
    return replace(step, opening=True) if isinstance(step, AddRoute) else step


def _behind(steps: Iterable[Change | Load], *, closing: bool) -> Iterator[Change | Load]:
    """The first of them waits for whoever is on his way by a road that has been closed."""
    for number, step in enumerate(steps):
        yield replace(step, late=True) if closing and not number else step


def _handover(desired: Desired, observed: Observed, wanted: Table, turning: Set[Turn]) -> frozenset[Fwmark] | None:
    """The marks that would meet another one's road on the way, or one that opens or closes meanwhile; and those that a
    plan has closed already which was cut short. None: no road changes hands.
    """
    present, closed = observed.table or Table(wanted.name), observed.closed or frozenset()
    if not observed.tables:
        return None
    old, new = _Routing.of(observed.rules, observed.routes), _Routing.of(desired.rules, desired.routes)
    astray, known = set(_strays(present, wanted, old, new)), ruleset.roads(present)
    # Whose marks they are only another table knows, or none that is whole.
    unknown = {
        rule.fwmark
        for rule in observed.rules
        if rule.fwmark and not any(mark & rule.fwmark.mask == rule.fwmark.value for mark in known)
    }
    moved = any(_followed(mark.value, new) not in (_followed(mark.value, old), set()) for mark in unknown)
    if not (astray or moved or any(_strays(wanted, present, new, old)) or observed.closed is not None):
        return None
    going = _Routing.of((rule for rule in observed.rules if rule not in desired.rules), ())
    masks = {desired.policy.kernel.mark_mask, *(rule.fwmark.mask for rule in observed.rules if rule.fwmark)}
    turned = {(table, link) for table, _, link, _ in turning}
    astray |= {
        mark
        for mark, roads in known.items()
        if turned & set(itertools.product(old.tables(mark), {roads.own, *_followed(mark, old, new)}))
    }
    marks = (mark for mark in known if mark in astray or going.tables(mark))
    return closed | unknown | {Fwmark(mark, mask) for mark in marks for mask in masks if not mark & ~mask}


def _close(marks: frozenset[Fwmark] | None, observed: Observed) -> Iterator[Load]:
    """Let out nobody who has one of these marks; nothing where they are closed already."""
    if marks and marks != observed.closed:
        yield replace(replacement(ruleset.CLOSED, ruleset.closed(sorted(marks, key=str))), marking=False)


def _open(marks: frozenset[Fwmark] | None, observed: Observed) -> Iterator[Load]:
    if marks or observed.closed is not None:
        yield replace(replacement(ruleset.CLOSED, ""), late=True)


@dataclass(frozen=True, slots=True)
class _Routing:
    """Rules and routes that are in force together, as far as they lead marks to defaults.

    `looked_up`: by the rules' masks and values the tables; `defaults`: by table the links of its defaults.
    """

    looked_up: Mapping[int, Mapping[int, Set[int]]]
    defaults: Mapping[int, Set[str]]

    @classmethod
    def of(cls, rules: Iterable[Rule], routes: Iterable[Route]) -> _Routing:
        looked_up: dict[int, dict[int, set[int]]] = {}
        for rule in rules:
            if rule.fwmark:
                by_value = looked_up.setdefault(rule.fwmark.mask, {})
                by_value.setdefault(rule.fwmark.value, set()).add(rule.table)
        defaults: dict[int, set[str]] = {}
        for route in _best_defaults(routes):
            defaults.setdefault(route.table, set()).update(hop.link for hop in route.hops)
        return cls(looked_up, defaults)

    def tables(self, mark: int) -> Set[int]:
        """Where rules look for a mark's road."""
        return frozenset[int]().union(*(values.get(mark & mask, ()) for mask, values in self.looked_up.items()))


def _strays(table: Table, other: Table, own: _Routing, others: _Routing) -> Iterator[int]:
    """The marks of a ruleset that its own rules or the other ones lead to a default, of either, by a wrong link.

    Enforcement would drop and count them as misrouted; it may be off. A link is right that the ruleset lets the mark
    leave by; but where the other ruleset has other ones for it, the mark is about to mean somebody else: then only its
    own link is, and those that it follows now.
    """
    elsewhere = ruleset.roads(other)
    for mark, roads in ruleset.roads(table).items():
        if mark in elsewhere and elsewhere[mark] != roads:
            links = {roads.own, *_followed(mark, own)}
        else:
            links = set(roads.links)
        if not _followed(mark, own, others) <= links:
            yield mark


def _followed(mark: int, *routings: _Routing) -> set[str]:
    """The links of the defaults that rules lead a mark to, of any of them."""
    tables = {table for routing in routings for table in routing.tables(mark)}
    return {link for routing in routings for table in tables for link in routing.defaults.get(table, ())}


def _best_defaults(routes: Iterable[Route]) -> Iterable[Route]:
    """Of each table and family the default that packets follow; behind it stand those of `when_down`."""
    best: dict[tuple[int, str], Route] = {}
    for route in sorted(routes, key=lambda route: route.metric):
        if not route.destination.length:
            best.setdefault((route.table, route.family), route)
    return best.values()


def removal(observed: Observed) -> Plan:
    """How to take away all that is ours: it needs no policy."""
    rules, guards = _apart(_rule_steps(frozenset(), observed.rules)[1])
    return Plan(
        (
            *guards,
            *map(_delete_table, observed.tables),
            *rules,
            *map(DeleteRoute, sorted(observed.routes, key=_deletion_order)),
            *(SetSrcValidMark(link, False) for link in sorted(observed.src_valid_mark_ours)),
        )
    )


def restoration(before: Observed, listings: Mapping[str, str], now: Observed) -> Plan:
    """How to get back to what was there, policy or not. `listings` are the nft tables of then that are others now.

    A table is replaced as a whole here, and for that moment nobody marks: so whoever has a mark is closed meanwhile,
    and rules come before the tables and go after them.
    """
    add_routes, delete_routes = _route_steps(before.routes, now.routes)
    adding, deleting = _rule_steps(frozenset(before.rules), now.rules)
    texts = {name: text for name, text in listings.items() if name != ruleset.CLOSED}
    gone = [name for name in now.tables if name not in (*before.tables, ruleset.CLOSED)]
    marks = now.closed or frozenset()
    if now.table and now.table.name in (*texts, *gone):
        masks = {rule.fwmark.mask for rule in now.rules if rule.fwmark}
        marks |= {Fwmark(mark, mask) for mark in ruleset.roads(now.table) for mask in masks if not mark & ~mask}
    opening: Iterable[Load] = _open(marks, now)
    if ruleset.CLOSED in listings:  # by a plan that had been cut short
        opening = [replace(replacement(ruleset.CLOSED, listings[ruleset.CLOSED]), late=True)]
    return Plan(
        (
            *(SetSrcValidMark(link, True) for link in sorted(before.src_valid_mark_ours - now.src_valid_mark_ours)),
            *_close(marks, now),
            *add_routes,
            *adding,
            *(replacement(name, text) for name, text in sorted(texts.items())),
            *map(_delete_table, sorted(gone)),
            *deleting,
            *delete_routes,
            *opening,
            *(SetSrcValidMark(link, False) for link in sorted(now.src_valid_mark_ours - before.src_valid_mark_ours)),
        )
    )


def _delete_table(name: str) -> Load:
    return Load(name, (f"delete table inet {name}",))


def _route_steps(
    desired: frozenset[Route], observed: frozenset[Route]
) -> tuple[list[AddRoute | ReplaceRoute], list[DeleteRoute]]:
    """Steps before the marks change, and steps after."""
    there: dict[object, Route] = {}
    for route in sorted(observed - desired, key=str):
        there.setdefault(route.key, route)
    kept = {route.key for route in observed & desired}
    before: list[AddRoute | ReplaceRoute] = []
    for route in sorted(desired - observed, key=addition_order):
        old = there.pop(route.key, None) if route.key not in kept else None
        before.append(ReplaceRoute(old, route) if old else AddRoute(route))
    replaced = {step.old for step in before if isinstance(step, ReplaceRoute)}
    return before, [DeleteRoute(route) for route in sorted(observed - desired - replaced, key=_deletion_order)]


def _rule_steps(desired: frozenset[Rule], observed: Iterable[Rule]) -> tuple[list[AddRule], list[DeleteRule]]:
    """Rules to add, and rules to delete: what is not wanted, and what is there twice."""
    there = Counter(observed)
    surplus = [rule for rule, count in there.items() for _ in range(count - (rule in desired))]
    return (
        [AddRule(rule) for rule in sorted(desired - set(there), key=rule_order)],
        [DeleteRule(rule) for rule in sorted(surplus, key=_rule_deletion_order)],
    )


def _apart(steps: Sequence[RuleStep]) -> tuple[list[RuleStep], list[RuleStep]]:
    """Steps about rules that look up a table, and those about the ones behind them."""
    return [step for step in steps if not _stage(step.rule)], [step for step in steps if _stage(step.rule)]


def _stage(rule: Rule) -> int:
    """What goes around a closed door is there before it, and leads somewhere; all others come first."""
    return 0 if _refuses_former(rule) else {LOOKUP: 0, NOP: 1, GOTO: 2}.get(rule.action, 3)


def rule_order(rule: Rule) -> tuple[object, ...]:
    return (_stage(rule), rule.family, rule.priority, rule.table, rule.fwmark is None, str(rule))


def _rule_deletion_order(rule: Rule) -> tuple[object, ...]:
    return (-_stage(rule), *rule_order(rule)[1:])


def addition_order(route: Route) -> tuple[object, ...]:
    """A table's last route first: it is never open. Then the networks, in which gateways are looked for.

    The default comes when they are there: what is meant for the hosts behind must not leave by it.
    """
    is_default = not route.destination.length
    through_gateway = any(hop.via for hop in route.hops)
    order = (route.family, route.table, route.destination, route.metric)
    return (route.metric != METRIC_LAST, is_default, through_gateway, *order)


def _deletion_order(route: Route) -> tuple[object, ...]:
    """A table's last route goes last."""
    return (route.metric == METRIC_LAST, route.family, route.table, route.destination, route.metric, str(route))
