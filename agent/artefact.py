"""The text that would be loaded, read as nft(8) and ip(8) read it: `ruleset.nft` and `routing.txt` → `Artefact`.

Strict: it knows the shapes of our own text and no others. What it doesn't know can't be proved, and is refused.
"""

from __future__ import annotations

import re
import shlex
import socket
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from agent import IdmarkError
from agent.addresses import Family, Prefix, parse_address
from agent.model import GOTO, LOOKUP, NOP, UNREACHABLE, Fwmark, Hook, Hop, Route, Rule
from agent.render import ROUTING, RULESET

ALL_BITS = 0xFFFFFFFF
#: Understood as a whole, and left out: of what arrives in the host's own name no packet is expected to pass, and that
#: some don't can lead none astray.
FROM_OUR_OWN = 'meta nfproto ipv4 fib saddr type local iifname != "lo" meta pkttype host drop'


class ArtefactError(IdmarkError):
    """A text that can't be read, or that nft or ip(8) would refuse; the message names file and line."""


class Field(NamedTuple):
    """What a match or a map looks at: `mark`, `iifname`, `oifname`, `saddr`, `daddr`, `original` (the destination that
    the connection was made to; addresses are of a family), `nfproto`, `status`, `direction`, `syn`. Of marks and
    addresses the bits of `mask`; by default all.
    """

    name: str
    family: Family | None = None
    mask: int = -1


class Match(NamedTuple):
    """A test of a packet: the fields, side by side, are one of the values, or in the set of that name; or aren't."""

    fields: tuple[Field, ...]
    values: frozenset[object]
    among: str = ""
    negated: bool = False


class Verdict(NamedTuple):
    """accept, drop, continue; or jump and goto with their chain."""

    word: str
    chain: str = ""


class SetMark(NamedTuple):
    """Of the packet's mark these bits stay, and those are added."""

    keep: int
    bits: int


class VerdictBy(NamedTuple):
    """The verdict that a map has for fields."""

    fields: tuple[Field, ...]
    map: str


class CountBy(NamedTuple):
    """The counter that a map has for fields."""

    fields: tuple[Field, ...]
    map: str


class Translate(NamedTuple):
    """snat: the packet's source, and that of its connection, becomes this address."""

    family: Family
    address: int


Action = Verdict | SetMark | VerdictBy | CountBy | Translate | None


class Line(NamedTuple):
    """A rule of a chain: its matches in order, the counter that counts what they take ("": none), and what is done then
    (None: nothing that a packet's way depends on).
    """

    matches: tuple[Match, ...]
    action: Action
    text: str
    comment: str
    counter: str = ""


class Chain(NamedTuple):
    """A chain as written."""

    name: str
    hook: Hook | None
    lines: tuple[Line, ...]


class Named:
    """A set or map with its elements; the keys of an interval one are addresses and found by bisection.

    Raises ValueError for elements that nft refuses: overlapping, or one key twice.
    """

    def __init__(
        self, name: str, keys: tuple[str, ...], value: str, interval: bool, elements: Iterable[tuple[str, str]]
    ) -> None:
        self.name, self.keys, self.value, self.interval = name, keys, value, interval
        self.spans: list[tuple[int, int, str]] = []
        self.exact: dict[tuple[object, ...], str] = {}
        for key, found in elements:
            if interval:
                self.spans.append((*_span(key, keys[0]), found))
            else:
                parts = _key(key, keys)
                if parts in self.exact:
                    raise ValueError(f"{key} is there twice")
                self.exact[parts] = found
        self.spans.sort()
        for (_, last, _), (first, _, _) in zip(self.spans, self.spans[1:], strict=False):
            if first <= last:
                raise ValueError("conflicting intervals")
        self._firsts = [first for first, _, _ in self.spans]
        self._beside: dict[object, frozenset[tuple[object, str]]] = {}

    def beside(self, first: object) -> frozenset[tuple[object, str]]:
        """Of keys with two parts, by the first one: the second ones that stand beside it, with the values."""
        if not self._beside:
            beside: dict[object, list[tuple[object, str]]] = {}
            for (one, another), value in self.exact.items():
                beside.setdefault(one, []).append((another, value))
            self._beside = {one: frozenset(others) for one, others in beside.items()}
        return self._beside.get(first, frozenset())

    def find(self, key: tuple[object, ...]) -> str | None:
        """The value of a key, "" in a set; None: it isn't there."""
        if not self.interval:
            return self.exact.get(key)
        (address,) = key
        if not isinstance(address, int):
            return None
        place = bisect_right(self._firsts, address) - 1
        if place < 0 or self.spans[place][1] < address:
            return None
        return self.spans[place][2]


@dataclass(frozen=True, slots=True)
class Artefact:
    """What is in the kernel when the texts have been loaded. Rules are in the order in which the kernel tries them;
    `foreign` are those among them that are not ours.
    """

    chains: Mapping[str, Chain]
    sets: Mapping[str, Named]
    rules: tuple[Rule, ...]
    routes: tuple[Route, ...]
    foreign: frozenset[Rule] = frozenset()


def read(files: Mapping[str, str]) -> Artefact:
    """The artefact that the files of a review make. Raises ArtefactError."""
    chains, sets = _Ruleset(files[RULESET]).read()
    rules, routes = _routing(files[ROUTING])
    return Artefact(chains, sets, rules, routes)


def in_order(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """As the kernel tries them: by priority, those of one priority as they came."""
    return tuple(sorted(rules, key=lambda rule: rule.priority))


# --- ruleset.nft -----------------------------------------------------------------------------------------------------

#: A string, a word, or a mark of punctuation that stands for itself.
TOKEN = re.compile(r'"[^"]*"|[{},;]|[^\s{},;"]+')
COMMENTED = re.compile(r'(?P<text>.*?) ?comment "(?P<comment>[^"]*)"$')
HOOKED = re.compile(r"type (filter|route|nat) hook (prerouting|output|postrouting) priority (-?\d+); policy (\w+);$")
TYPED = re.compile(r"type ([\w. ]+?)(?: : (verdict|counter))?;( flags interval;)?(?: size (\d+);)?$")
FAMILIES = {"ip": Family.IPV4, "ip6": Family.IPV6}
KEYS = frozenset({"ipv4_addr", "ipv6_addr", "mark", "ifname"})
#: Words that may stand where a match is, and what they look at.
STATUSES = frozenset({"snat", "dnat"})


class _Ruleset:
    """The reading of one text: place by place."""

    def __init__(self, text: str) -> None:
        self._lines = text.splitlines()
        self._at = 0
        self.table = ""

    def read(self) -> tuple[dict[str, Chain], dict[str, Named]]:
        counters: set[str] = set()
        declared: dict[str, str] = {}
        flushed: set[str] = set()
        chains: dict[str, Chain] = {}
        sets: dict[str, Named] = {}
        for line in self._each():
            words = line.split()
            if words[:2] == ["table", "inet"] and words[3:] == ["{"]:
                self._name(words[2])
                self._block(counters, declared, chains, sets)
            elif words[:1] == ["flush"] and words[2:3] == ["inet"] and words[3:4] == [self.table]:
                flushed.add(" ".join((words[1], *words[4:])))
            else:
                raise self._wrong(line)
        if "table" not in flushed:
            raise self._wrong("the table is not flushed: the rules of an earlier load would stay")
        for name in sets:
            if not flushed & {f"map {name}", f"set {name}"}:
                raise self._wrong(f"{name} is not flushed: the elements of an earlier load would stay")
        for name in declared.keys() - chains.keys() - sets.keys():
            raise self._wrong(f"{name} is declared, and has no contents")
        self._check(counters, chains, sets)
        return chains, sets

    def _name(self, name: str) -> None:
        if self.table and name != self.table:
            raise self._wrong(f"a second table, {name}")
        self.table = name

    def _each(self) -> Iterator[str]:
        """Lines that say something."""
        while self._at < len(self._lines):
            line = self._lines[self._at].strip()
            self._at += 1
            if line and not line.startswith("#"):
                yield line

    def _wrong(self, what: str) -> ArtefactError:
        return ArtefactError(f"{RULESET}:{self._at}: this can't be followed: {what}")

    def _block(
        self, counters: set[str], declared: dict[str, str], chains: dict[str, Chain], sets: dict[str, Named]
    ) -> None:
        for line in self._each():
            words = line.split()
            if line == "}":
                return
            if words[0] == "counter" and words[2:] == ["{", "}"]:
                counters.add(words[1])
            elif words[0] in {"chain", "map", "set"} and words[2:3] == ["{"] and words[-1] == "}":
                declared[words[1]] = words[0]
            elif words[0] == "chain" and words[2:] == ["{"]:
                if words[1] in chains:
                    raise self._wrong(f"chain {words[1]} is there twice")
                chains[words[1]] = self._chain(words[1])
            elif words[0] in {"map", "set"} and words[2:] == ["{"]:
                if words[1] in sets:
                    raise self._wrong(f"{words[1]} is there twice")
                sets[words[1]] = self._set(words[1])
            else:
                raise self._wrong(line)
        raise self._wrong("the table has no end")

    def _set(self, name: str) -> Named:
        keys: tuple[str, ...] = ()
        value, interval, size, elements = "", False, 0, list[tuple[str, str]]()
        inside = False
        for line in self._each():
            if inside and line != "}":
                key, _, found = line.removesuffix(",").partition(" : ")
                elements.append((key, found.strip('"')))
            elif inside:
                inside = False
            elif line == "}":
                if not keys or not KEYS.issuperset(keys) or (interval and len(keys) > 1):
                    raise self._wrong(f"the type of {name}")
                if size and len(elements) > size:
                    raise self._wrong(f"{name} holds more than {size}")
                try:
                    return Named(name, keys, value, interval, elements)
                except (OSError, ValueError) as error:
                    raise self._wrong(f"{name}: {error}") from error
            elif line == "elements = {":
                inside = True
            elif typed := TYPED.match(line):
                keys, value, interval = tuple(typed[1].split(" . ")), typed[2] or "", bool(typed[3])
                size = int(typed[4] or 0)
            else:
                raise self._wrong(line)
        raise self._wrong(f"{name} has no end")

    def _chain(self, name: str) -> Chain:
        hook, lines = None, list[Line]()
        for line in self._each():
            if line == "}":
                return Chain(name, hook, tuple(lines))
            hooked = HOOKED.match(line)
            if hooked and not lines:
                hook = Hook(hooked[1], hooked[2], int(hooked[3]), hooked[4])
                continue
            commented = COMMENTED.match(line)
            if not commented:
                raise self._wrong(line)
            lines.append(self._line(commented["text"], commented["comment"]))
        raise self._wrong(f"chain {name} has no end")

    def _line(self, text: str, comment: str) -> Line:
        if text == FROM_OUR_OWN:
            return Line((), None, text, comment)
        words = TOKEN.findall(text)
        matches: list[Match] = []
        counter = ""
        try:
            while words:
                if words[:2] == ["counter", "name"] and words[2].startswith('"'):
                    counter = words[2].strip('"')
                    del words[:3]
                action, done = _action(words)
                if done:
                    if words:
                        raise self._wrong(text)
                    return Line(tuple(matches), action, text, comment, counter)
                matches.append(_match(words))
        except (IndexError, ValueError, KeyError, OSError) as error:
            raise self._wrong(text) from error
        raise self._wrong(text)

    def _check(self, counters: set[str], chains: Mapping[str, Chain], sets: Mapping[str, Named]) -> None:
        """Whatever is named is there, and of the kind that it is used as."""
        for chain in chains.values():
            for line in chain.lines:
                used = [(match.among, match.fields, "") for match in line.matches if match.among]
                match line.action:
                    case VerdictBy(fields, name):
                        used.append((name, fields, "verdict"))
                    case CountBy(fields, name):
                        used.append((name, fields, "counter"))
                    case Verdict(_, target) if target and target not in chains:
                        raise self._wrong(f"there is no chain {target}")
                if line.counter and line.counter not in counters:
                    raise self._wrong(f"there is no counter {line.counter}")
                for name, fields, value in used:
                    if name not in sets or (sets[name].keys, sets[name].value) != (tuple(map(_type, fields)), value):
                        raise self._wrong(f"{name} is no {value or 'set'} for: {line.text}")
        for found in sets.values():
            for value in {*found.exact.values(), *(span[2] for span in found.spans)}:
                if found.value == "verdict" and (not value.startswith("goto ") or value[5:] not in chains):
                    raise self._wrong(f"{found.name}: {value}: there is no such chain")
                if found.value == "counter" and value not in counters:
                    raise self._wrong(f"{found.name}: there is no counter {value}")


def _action(words: list[str]) -> tuple[Action, bool]:
    """Take the statement that ends a rule from its words, if that is what comes."""
    head = words[0]
    if head in {"accept", "drop", "continue"}:
        return Verdict(words.pop(0)), True
    if head in {"jump", "goto"}:
        return Verdict(words.pop(0), words.pop(0)), True
    if words[:3] == ["meta", "mark", "set"]:
        return _set_mark(words), True
    if words[:2] == ["counter", "name"]:
        del words[:2]
        fields = _fields(words)
        _take(words, "map")
        return CountBy(fields, words.pop(0).removeprefix("@")), True
    if head == "snat":
        family = FAMILIES[words[1]]
        _take(words, "snat", words[1], "to")
        return Translate(family, _number(words.pop(0), family)), True
    if words[:5] == ["tcp", "option", "maxseg", "size", "set"]:
        del words[:5]
        if words != ["rt", "mtu"] and not (len(words) == 1 and words[0].isdigit()):
            raise ValueError(words)
        words.clear()
        return None, True
    if words[-2:-1] == ["vmap"] and _reads_fields(words[:-2]):
        fields = _fields(words)
        _take(words, "vmap")
        return VerdictBy(fields, words.pop(0).removeprefix("@")), True
    return None, False


def _reads_fields(words: list[str]) -> bool:
    """Whether these words are fields and nothing more: no match before them."""
    left = [*words]
    _fields(left)
    return not left


def _set_mark(words: list[str]) -> SetMark:
    _take(words, "meta", "mark", "set", "meta", "mark", "&")
    keep, bits = _hex(words.pop(0)), 0
    if words:
        _take(words, "|")
        bits = _hex(words.pop(0))
    return SetMark(keep, bits)


def _match(words: list[str]) -> Match:
    """Take one match from a rule's words."""
    fields = _fields(words)
    negated = words[0] == "!="
    if words[0] in {"==", "!="}:
        words.pop(0)
    field = fields[0]
    if words[0].startswith("@"):
        return Match(fields, frozenset(), words.pop(0)[1:], negated)
    if len(fields) > 1:
        raise ValueError(words)
    values = [words.pop(0)]
    if values == ["{"]:
        values = []
        while True:
            values.append(words.pop(0))
            if words.pop(0) == "}":
                break
    elif field.name == "status":
        while words[:1] == [","]:
            words.pop(0)
            values.append(words.pop(0))
    return Match(fields, frozenset(_value(field, value) for value in values), negated=negated)


def _fields(words: list[str]) -> tuple[Field, ...]:
    fields = [_field(words)]
    while words[:1] == ["."]:
        words.pop(0)
        fields.append(_field(words))
    return tuple(fields)


def _field(words: list[str]) -> Field:
    match words:
        case ["meta", "mark", "&", mask, *_]:
            del words[:4]
            return Field("mark", mask=_hex(mask))
        case ["meta", "nfproto", *_]:
            del words[:2]
            return Field("nfproto")
        case ["iifname" | "oifname" as name, *_]:
            del words[:1]
            return Field(name)
        case ["ip" | "ip6" as family, "saddr" | "daddr" as name, *_]:
            del words[:2]
            return Field(name, FAMILIES[family], _mask(words, FAMILIES[family]))
        case ["ct", "original", "ip" | "ip6" as family, "daddr", *_]:
            del words[:4]
            return Field("original", FAMILIES[family], _mask(words, FAMILIES[family]))
        case ["ct", "status" | "direction" as name, *_]:
            del words[:2]
            return Field(name)
        case ["tcp", "flags", "&", "(syn|rst)", *_]:
            del words[:4]
            return Field("syn")
    raise ValueError(words)


def _mask(words: list[str], family: Family) -> int:
    """The bits of an address that are looked at: the first so many."""
    if words[:1] != ["&"]:
        return -1
    mask = _number(words[1], family)
    length = mask.bit_count()
    if mask != ((1 << length) - 1) << family.bits - length:
        raise ValueError(f"{words[1]} is no network's mask")
    del words[:2]
    return mask


def _value(field: Field, word: str) -> object:
    """A value as the machine has it."""
    match field.name:
        case "mark":
            return _hex(word)
        case "iifname" | "oifname" if word[0] == word[-1] == '"':
            return word[1:-1]
        case "saddr" | "daddr" | "original" if field.family:
            return _number(word, field.family)
        case "nfproto":
            return Family(word)
        case "status" if word in STATUSES:
            return word
        case "direction" if word == "reply":
            return word
        case "syn" if word == "syn":
            return True
    raise ValueError(word)


def _type(field: Field) -> str:
    """The type of a set's key that fits a field."""
    if field.family:
        return f"{field.family}_addr"
    return "ifname" if field.name in {"iifname", "oifname"} else field.name


def _key(text: str, keys: tuple[str, ...]) -> tuple[object, ...]:
    words = text.split(" . ")
    if len(words) != len(keys):
        raise ValueError(f"{text} is no {' . '.join(keys)}")
    return tuple(_part(word, kind) for word, kind in zip(words, keys, strict=True))


def _part(word: str, kind: str) -> object:
    if kind == "mark":
        return _hex(word)
    if kind == "ifname":
        if len(word) < 3 or not word[0] == word[-1] == '"':
            raise ValueError(f"{word} is no link's name")
        return word[1:-1]
    return _number(word, Family(kind.removesuffix("_addr")))


def _span(text: str, kind: str) -> tuple[int, int]:
    """First and last address of an element of an interval map."""
    family = Family(kind.removesuffix("_addr"))
    first, dash, last = text.partition("-")
    if dash:
        low, high = _number(first, family), _number(last, family)
        if low > high:
            raise ValueError(f"{text} ends before it begins")
        return low, high
    prefix = Prefix.parse(text)
    if prefix.family is not family:
        raise ValueError(f"{text} is no {kind}")
    return prefix.address, prefix.last


def _number(text: str, family: Family) -> int:
    return int.from_bytes(socket.inet_pton(family.number, text), "big")


def _hex(word: str) -> int:
    if not re.fullmatch(r"0x[0-9a-f]{1,8}", word):
        raise ValueError(f"{word} is no mark")
    return int(word, 16)


def _take(words: list[str], *expected: str) -> None:
    if tuple(words[: len(expected)]) != expected:
        raise ValueError(words)
    del words[: len(expected)]


# --- routing.txt -----------------------------------------------------------------------------------------------------


def _routing(text: str) -> tuple[tuple[Rule, ...], tuple[Route, ...]]:
    rules: dict[Rule, None] = {}
    routes: dict[object, Route] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line or line.startswith("#"):
            continue
        try:
            words = shlex.split(line)
            family = Family.IPV6 if words[:2] == ["ip", "-6"] else Family.IPV4
            del words[: 2 if family is Family.IPV6 else 1]
            match words:
                case ["route", "replace", *rest]:
                    route = read_route(family, rest)
                    routes[route.key] = route
                case ["rule", "add", *rest]:
                    rule = read_rule(family, rest)
                    if rule in rules:
                        raise ValueError("is there twice")
                    rules[rule] = None
                case ["-w", *_] if line.startswith("sysctl -w net/ipv4/conf/") and line.endswith("/src_valid_mark=1"):
                    pass
                case _:
                    raise ValueError("is no command of ours")
        except (ValueError, IndexError, KeyError) as error:
            raise ArtefactError(f"{ROUTING}:{number}: this can't be followed: {line}") from error
    return in_order(rules), tuple(routes.values())


def read_route(family: Family, words: list[str]) -> Route:
    """A route from its words in ip-route(8). Raises ValueError, IndexError or KeyError."""
    kind = words.pop(0) if words[0] in {"unreachable", "blackhole", "prohibit"} else "unicast"
    target = words.pop(0)
    destination = Prefix.default(family) if target == "default" else Prefix.parse(target)
    if destination.family is not family:
        raise ValueError(f"{target} is not {family}")
    legs: list[list[str]] = [[]]
    for word in words:
        if word == "nexthop":
            legs.append([])
        else:
            legs[-1].append(word)
    hop, options = _hop(legs[0])
    hops = [hop] if hop else []
    for leg in legs[1:]:
        hop, rest = _hop(leg)
        if not hop or rest:
            raise ValueError(leg)
        hops.append(hop)
    said = _pairs(options)
    if said.pop("protocol") != "73" or (kind == "unicast") != bool(hops):
        raise ValueError(words)
    route = Route(
        destination=destination,
        table=int(said.pop("table")),
        hops=tuple(hops),
        kind=kind,
        metric=int(said.pop("metric", "0")),
        source=parse_address(source) if (source := said.pop("src", None)) else None,
        tos=int(said.pop("tos", "0"), 16),
    )
    _all_said(said)
    return route


def _hop(words: list[str]) -> tuple[Hop | None, list[str]]:
    via = None
    if words[:1] == ["via"]:
        at = 2 if words[1] == "inet6" else 1
        via = parse_address(words[at])
        words = words[at + 1 :]
    if words[:1] != ["dev"]:
        return None, words
    link, words = words[1], words[2:]
    onlink = words[:1] == ["onlink"]
    words = words[onlink:]
    weight = 1
    if words[:1] == ["weight"]:
        weight, words = int(words[1]), words[2:]
    return Hop(link, via, onlink, weight), words


def read_rule(family: Family, words: list[str]) -> Rule:
    """A rule from its words in ip-rule(8). Raises ValueError, IndexError or KeyError."""
    action, table, target = LOOKUP, 0, 0
    for word in (UNREACHABLE, NOP):
        if word in words:
            words.remove(word)
            action = word
    said = _pairs(words)
    if action == LOOKUP and GOTO in said:
        action, target = GOTO, int(said.pop(GOTO))
    elif action == LOOKUP:
        table = int(said.pop(LOOKUP))
    fwmark, unmarked = None, 0
    if "fwmark" in said:
        value, _, mask = said.pop("fwmark").partition("/")
        if value == "0":
            unmarked = int(mask, 16)
        else:
            fwmark = Fwmark(int(value, 16), int(mask, 16) if mask else ALL_BITS)
    source = Prefix.parse(text) if (text := said.pop("from", "")) else None
    if said.pop("protocol") != "73" or (source and source.family is not family):
        raise ValueError(words)
    priority, iif = int(said.pop("priority")), said.pop("iif", "")
    _all_said(said)
    return Rule(family, priority, table, fwmark, source, unmarked, iif, action, target)


def _pairs(words: list[str]) -> dict[str, str]:
    if len(words) % 2 or len(set(words[::2])) < len(words) / 2:
        raise ValueError(words)
    return dict(zip(words[::2], words[1::2], strict=True))


def _all_said(said: Mapping[str, str]) -> None:
    if said:
        raise ValueError(said)
