"""Two policies to what changes in meaning: whose packets go where, and what of it a reviewer should look at twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from agent import render
from agent.addresses import Family, Prefix, Prefixes
from agent.desired import Desired, sources_of
from agent.linediff import unified
from agent.model import Identity, Policy
from agent.moves import Move, Range, aggregated, counted, few, moves
from agent.prefixes import outermost
from agent.settings import Setting, Sides, gateway_settings, identity_settings

#: What becomes of an identity.
NEW, GONE, CHANGED, SAME = "new", "gone", "changed", "same"
#: The line of a rendered text that names the policy's digest: spelling alone changes it.
DIGEST = "# policy sha256:"


@dataclass(frozen=True, slots=True)
class Part:
    """One identity in both policies; None where it is not.

    `sources` are the prefixes that are written for it, but for those inside another of its own; `speaks` is what is
    left of them where longer ones are other identities'. One that has another name, and the id and link that it had,
    is the same one renamed.
    """

    before: Identity | None
    after: Identity | None
    settings: tuple[Setting, ...]
    sources: tuple[Prefix, ...]
    speaks: tuple[Prefix, ...]

    @property
    def identity(self) -> Identity:
        """As it will be; as it was, if it is gone."""
        found = self.after or self.before
        assert found is not None  # noqa: S101 (one of the two there is, or no part)
        return found

    @property
    def name(self) -> str:
        return self.identity.name

    @property
    def fate(self) -> str:
        """NEW, GONE, CHANGED or SAME, but for its sources: they are in `Change.moves`."""
        if self.before is None:
            return NEW
        if self.after is None:
            return GONE
        return CHANGED if self.settings else SAME


@dataclass(frozen=True, slots=True)
class TextChange:
    """How a rendered file differs: lines as diff -u prints them, without the policy's digest."""

    name: str
    lines: tuple[str, ...]

    @property
    def counts(self) -> str:
        """How many lines are added, and how many taken away, in words."""
        added, taken = (sum(line.startswith(sign) for line in self.lines) for sign in "+-")
        return f"{counted(added, 'line', 'lines') or 'none'} added, {taken:,} taken away"


@dataclass(frozen=True, slots=True)
class Change:
    """What a policy changes against another. `parts` are in the order of their ids, those that are gone included."""

    before: Policy
    after: Policy
    moves: tuple[Move, ...]
    parts: tuple[Part, ...]
    gateway: tuple[Setting, ...]
    texts: tuple[TextChange, ...]
    notes: tuple[str, ...] = ()

    @property
    def means(self) -> bool:
        """Whether any packet, counter or number is concerned."""
        return bool(self.moves or self.gateway or any(part.fate != SAME for part in self.parts))

    @property
    def nothing(self) -> bool:
        """Whether what is put into the kernel is the same."""
        return not self.means and not self.texts

    @property
    def headline(self) -> str:
        """All of it in a few words."""
        if self.nothing:
            return "nothing changes"
        if not self.means:
            return "nothing changes in meaning; the text does"
        fates = [part.fate for part in self.parts]
        moved = [prefix for move in self.moves for prefix in move.prefixes]
        words = [counted(fates.count(NEW), "new identity", "new identities")]
        words += [counted(fates.count(CHANGED), "identity changes", "identities change")]
        words += [counted(fates.count(GONE), "identity goes", "identities go")]
        words += [counted(len(moved), "prefix changes hands", "prefixes change hands")]
        words += [counted(len(self.gateway), "setting of the gateway", "settings of the gateway")]
        return ", ".join(filter(None, words))

    @property
    def risks(self) -> tuple[str, ...]:
        """What a reviewer should look at twice, each a sentence."""
        found = [
            f"{few(move.prefixes)} {self.fate_of(move)}"
            for move in self.moves
            if move.after is None and not self.unwritten(move)
        ]
        found += [f"identity {part.name} is gone: its link, table and counters with it" for part in self._gone]
        for part in self.parts:
            found += [f"identity {part.name}: {each.effect}" for each in part.settings if each.risky]
        return (*found, *(each.effect for each in self.gateway if each.risky))

    @property
    def _gone(self) -> list[Part]:
        return [part for part in self.parts if part.fate == GONE]

    def fate_of(self, move: Move) -> str:
        """What becomes of sources, to end a sentence that they begin."""
        before = self._identity(self.before, move.before)
        after = self._identity(self.after, move.after)
        several = len(move.prefixes) > 1
        s, es, its = ("", "", "their") if several else ("s", "es", "its")
        if before and after:
            road = (
                f"leave{s} by {after.link}, not {before.link}"
                if after.link != before.link
                else f"by {after.link} still"
            )
            return f"move{s} from {move.before} to {move.after}: {road}"
        if after:
            return f"get{s} an identity ({move.after}): leave{s} by {after.link}, and by table main no longer"
        if before and self.unwritten(move):
            written = f"{'are' if several else 'is'} no longer written down for {move.before}"
            return f"{written}, and stay{s} so as long as {before.link} has {'them' if several else 'it'}"
        return f"lose{s} {its} identity ({move.before}): go{es} by table main"

    def unwritten(self, move: Move) -> bool:
        """Whether these are own addresses that were written down, and "auto" may still stand for them."""
        before, after = self._identity(self.before, move.before), self._identity(self.after, move.before)
        return (
            move.after is None
            and before is not None
            and after is not None
            and after.addresses is None
            and any("auto" in note for note in self.notes)
            and {*move.prefixes} <= {*map(Prefix.host, before.addresses or ())}
        )

    def _identity(self, policy: Policy, name: str | None) -> Identity | None:
        """By the name that it has now, also where it had another."""
        for part in self.parts:
            if part.name == name:
                return part.before if policy is self.before else part.after
        return None


def change(before: Desired, after: Desired) -> Change:
    """What changes from one policy to the other, both with the facts of one host or both without."""
    renamed = dict(_renamed(before.policy, after.policy))
    was = [replace(span, identity=renamed.get(span.identity, span.identity)) for span in before.classes]
    return Change(
        before=before.policy,
        after=after.policy,
        moves=moves(was, after.classes),
        parts=tuple(_parts(before, after, renamed)),
        gateway=tuple(gateway_settings(before, after)),
        texts=tuple(_texts(before, after)),
        notes=tuple(_notes(before, after)),
    )


def _renamed(before: Policy, after: Policy) -> Iterator[tuple[str, str]]:
    """The old and the new name of who has another one."""
    old, new = ({identity.name for identity in policy.identities} for policy in (before, after))
    by_id = {identity.id: identity for identity in before.identities}
    for identity in after.identities:
        twin = by_id.get(identity.id)
        if twin and twin.link == identity.link and twin.name not in new and identity.name not in old:
            yield twin.name, identity.name


# --- identities ------------------------------------------------------------------------------------------------------


def _parts(before: Desired, after: Desired, renamed: Mapping[str, str]) -> Iterator[Part]:
    old = {renamed.get(identity.name, identity.name): identity for identity in before.policy.identities}
    new = {identity.name: identity for identity in after.policy.identities}
    # Who is there no more is told by what he spoke as.
    spoken = {**_speaks(before, renamed), **_speaks(after, {})}
    parts = [
        Part(
            old.get(name),
            new.get(name),
            tuple(identity_settings(Sides(before.policy, old.get(name), after.policy, new[name]), renamed))
            if name in new
            else (),
            tuple(prefix for family in Family for prefix in outermost(family, [spoken[name][0]])),
            aggregated(spoken[name][1]),
        )
        for name in {**new, **old}
    ]
    yield from sorted(parts, key=lambda part: (part.identity.id, part.after is None, part.name))


def _speaks(desired: Desired, renamed: Mapping[str, str]) -> dict[str, tuple[Prefixes, list[Range]]]:
    """What is written for whom, and what of it the longest prefix leaves to whom."""
    sources = sources_of(desired.standings)
    found = {renamed.get(name, name): (prefixes, list[Range]()) for name, prefixes in sources.items()}
    for span in desired.classes:
        found[renamed.get(span.identity, span.identity)][1].append((span.family, span.first, span.last))
    return found


# --- the text --------------------------------------------------------------------------------------------------------


def _texts(before: Desired, after: Desired) -> Iterator[TextChange]:
    old, new = render.files(before), render.files(after)
    for name, text in new.items():
        lines = tuple(unified(_lines(old[name]), _lines(text)))
        if lines:
            yield TextChange(name, lines)


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith(DIGEST)]


def _notes(before: Desired, after: Desired) -> Iterator[str]:
    for identity in after.policy.identities:
        if identity.addresses is None and not after.host_known:
            yield (
                f'identity {identity.name}: its own addresses are "auto", and only the host knows which: they are not '
                "among the sources here (--facts FILE tells them)"
            )
    yield from after.notes


def plain(found: Change) -> dict[str, Any]:
    """A change as JSON has it, with every prefix."""
    return {
        "gateway": found.after.gateway,
        "before": found.before.digest,
        "after": found.after.digest,
        "nothing": found.nothing,
        "headline": found.headline,
        "risks": [*found.risks],
        "moves": [
            {"from": move.before, "to": move.after, "prefixes": [*map(str, move.prefixes)]} for move in found.moves
        ],
        "identities": [
            {"name": part.name, "fate": part.fate, "settings": [_plain_setting(each) for each in part.settings]}
            for part in found.parts
            if part.fate != SAME
        ],
        "settings": [_plain_setting(each) for each in found.gateway],
        "texts": {text.name: [*text.lines] for text in found.texts},
        "notes": [*found.notes],
    }


def _plain_setting(setting: Setting) -> dict[str, Any]:
    return {"key": setting.key, "before": setting.before, "after": setting.after, "effect": setting.effect}
