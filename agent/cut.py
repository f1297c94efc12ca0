"""The address space cut into classes: the addresses that neither the policy nor the texts tell apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from agent.addresses import Family, Prefix, address_text

#: Where an example of a class is looked for first: the documentation's addresses (RFC 5737, RFC 3849).
EXAMPLES = {
    Family.IPV4: (0xC6336464, 0xC0000264, 0xCB007164, 0xC6120064),
    Family.IPV6: (0x20010DB8FFFF << 80 | 0x64, 0x20010DB8 << 96 | 0x64),
}


@dataclass(frozen=True, slots=True)
class Kind:
    """Classes that look the same to policy and texts: the owner that the policy names (None: nobody), the verdict of
    the sources' map, what the texts say of networks that hold them, the outermost first; an example, and the first
    address of each class.
    """

    family: Family
    owner: str | None
    verdict: str | None
    labels: tuple[object, ...]
    example: int
    firsts: tuple[int, ...]

    @property
    def text(self) -> str:
        return address_text(self.family, self.example)


@dataclass(slots=True)
class _Entry:
    """An example with what speaks for it, and where the classes begin."""

    score: tuple[bool, int, int]
    firsts: list[int]


def cut(
    family: Family,
    owners: Iterable[tuple[Prefix, str]],
    spans: Iterable[tuple[int, int, str]],
    labels: Mapping[Prefix, object],
) -> tuple[Kind, ...]:
    """Every address of a family, in exactly one class of exactly one kind.

    Of the policy's prefixes the longest decides. `spans` are first and last address and verdict, disjoint.
    """
    named = {prefix: owner for prefix, owner in owners if prefix.family is family}
    nets = sorted({*named, *(prefix for prefix in labels if prefix.family is family)})
    ordered = sorted(spans)
    edges = {0}
    edges.update(edge for net in nets for edge in (net.address, net.last + 1))
    edges.update(edge for first, last, _ in ordered for edge in (first, last + 1))
    edges.discard(1 << family.bits)
    starts = sorted(edges)
    found: dict[tuple[str | None, str | None, tuple[object, ...]], _Entry] = {}
    # Networks are nested or apart: those that hold the place are a stack, each with what holds inside of it.
    around: list[tuple[int, str | None, tuple[object, ...]]] = [((1 << family.bits) - 1, None, ())]
    net_at = span_at = 0
    for place, first in enumerate(starts):
        last = starts[place + 1] - 1 if place + 1 < len(starts) else (1 << family.bits) - 1
        while around[-1][0] < first:
            around.pop()
        while net_at < len(nets) and nets[net_at].address == first:
            net = nets[net_at]
            _, owner, said = around[-1]
            around.append((net.last, named.get(net, owner), (*said, labels[net]) if net in labels else said))
            net_at += 1
        while span_at < len(ordered) and ordered[span_at][1] < first:
            span_at += 1
        inside = span_at < len(ordered) and ordered[span_at][0] <= first
        _, owner, said = around[-1]
        key = (owner, ordered[span_at][2] if inside else None, said)
        known = next((a for a in EXAMPLES[family] if first <= a <= last), 0) if owner is None else 0
        # The widest class has the example that an operator recognises; not the network's own if there is another.
        score = (bool(known), last - first, known or min(first + 5, last))
        entry = found.setdefault(key, _Entry(score, []))
        entry.firsts.append(first)
        if score[:2] > entry.score[:2]:
            entry.score = score
    return tuple(Kind(family, *key, entry.score[2], tuple(entry.firsts)) for key, entry in found.items())
