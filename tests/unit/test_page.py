"""The page of a change, in a real browser: it needs nothing else, fits, can be read, and shows all that changes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from agent import page
from agent.addresses import Prefixes, parse_address
from agent.change import SAME, Change, change
from agent.desired import desire
from agent.model import Kernel, Probe
from tests.unit.values import identity, policy, prefixes

INSIDE = identity(
    "inside", 1, "wg0", addresses=["192.0.2.130", "2001:db8:4::130"], members=["10.9.7.0/24"], masquerade=True
)
OUTSIDE = identity(
    "outside", 2, "wan", addresses=["203.0.113.2"], members=["10.9.0.0/16", "2001:db8:9::/48"], next_hop=["203.0.113.1"]
)
GUESTS = identity("guests", 3, "wlan1", addresses="auto", next_hop="auto", members=["10.8.0.0/16"])


def two() -> Change:
    """One identity loses sources and follows another's road, one goes, one comes; the gateway stops enforcing."""
    before = policy(INSIDE, OUTSIDE, identity("old", 4, "ppp0", addresses=["198.51.100.4"]))
    probe = Probe(parse_address("192.0.2.53"), 2.0, 3)
    inside = replace(INSIDE, link="wg1", members=Prefixes(), when_down="outside", masquerade=False, probe=probe)
    outside = replace(OUTSIDE, members=prefixes("10.9.0.0/17"))
    return change(desire(before, None), desire(policy(inside, outside, GUESTS, kernel=Kernel(enforce=False)), None))


def forty() -> Change:
    """Forty identities with the longest names of identities, links and addresses, every fifth of which changes."""
    long = [
        identity(
            f"customer-with-a-long-name-{number:05}",
            number,
            f"uplink-{number:08}",
            addresses=[f"198.51.100.{number}", f"2001:db8:aaaa:bbbb:cccc:dddd:eeee:{0xF000 + number:x}"],
            members=[f"10.{number}.{net}.0/24" for net in range(0, 40, 2)] + [f"2001:db8:{number:x}::/48"],
            next_hop=["198.51.100.254", "2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff"],
        )
        for number in range(1, 41)
    ]
    after = [
        replace(each, masquerade=True, when_down=long[0].name, members=Prefixes.of([*each.members][::2]))
        if each.id % 5 == 0
        else each
        for each in long
    ]
    return change(desire(policy(*long[:-1]), None), desire(policy(after[0], *after[2:]), None))


def none() -> Change:
    """Nothing changes."""
    same = desire(policy(INSIDE, OUTSIDE), None)
    return change(same, same)


CHANGES = {"two": two, "forty": forty, "none": none}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's chromium. Root has no sandbox there; what it is shown is ours."""
    with sync_playwright() as playwright:
        words = ["--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        opened = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=words)
        yield opened
        opened.close()


class Seen:
    """A page as it is shown, with what the browser complained of and asked for."""

    def __init__(self, browser: Browser, file: Path, width: int, scheme: Any) -> None:
        self.page: Page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())


@pytest.fixture(
    params=[(name, width, scheme) for name in CHANGES for width, scheme in ((360, "dark"), (1280, "light"))],
    ids=lambda param: "-".join(map(str, param)),
)
def seen(request: pytest.FixtureRequest, browser: Browser, tmp_path: Path) -> Iterator[Seen]:
    """Each page on a telephone at night, and on a screen by day."""
    name, width, scheme = request.param
    file = tmp_path / "change.html"
    file.write_text(page.html(CHANGES[name]()), encoding="utf-8")
    shown = Seen(browser, file, width, scheme)
    yield shown
    shown.page.close()


def test_needs_nothing_else(seen: Seen) -> None:
    """The browser has nothing to complain of, and asks for the one file."""
    assert (seen.complaints, len(seen.asked)) == ([], 1)


def test_fits(seen: Seen) -> None:
    """Nothing stands out to the right, of the page or of the picture's boxes; one picture is shown."""
    width = seen.page.viewport_size["width"]  # type: ignore[index]
    assert seen.page.evaluate("document.documentElement.scrollWidth") == width
    assert seen.page.locator("svg:visible").count() == 1
    assert (
        seen.page.evaluate("""() => {
        const svg = [...document.querySelectorAll('svg')].find(each => each.getBoundingClientRect().width);
        const boxes = [...svg.querySelectorAll('rect.box')].map(each => each.getBoundingClientRect());
        const inside = box => text => text.left >= box.left && text.right <= box.right + 1
            && text.top >= box.top - 1 && text.bottom <= box.bottom + 1;
        return [...svg.querySelectorAll('text')].filter(each => {
            const text = each.getBoundingClientRect();
            const over = boxes.filter(box => text.left < box.right && text.right > box.left
                && text.top < box.bottom && text.bottom > box.top);
            return over.length > 1 || over.some(box => !inside(box)(text));
        }).map(each => each.textContent);
    }""")
        == []
    )


@pytest.mark.parametrize("name", ["two", "forty"])
def test_every_width(name: str, browser: Browser, tmp_path: Path) -> None:
    """Nobody has to scroll sideways, from the narrowest screen that counts (WCAG 2, 1.4.10) to a wide one."""
    file = tmp_path / "change.html"
    file.write_text(page.html(CHANGES[name]()), encoding="utf-8")
    shown = Seen(browser, file, 320, "light").page
    for width in (320, 600, 800, 801, 1000, 1920):
        shown.set_viewport_size({"width": width, "height": 900})
        assert shown.evaluate("document.documentElement.scrollWidth") == width
    shown.close()


CONTRAST = """() => {
    const channel = value => (value /= 255) <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    const luminance = rgb => 0.2126 * channel(rgb[0]) + 0.7152 * channel(rgb[1]) + 0.0722 * channel(rgb[2]);
    const rgba = text => { const parts = text.match(/[\\d.]+/g).map(Number); return [...parts, 1].slice(0, 4); };
    const behind = element => {
        if (element.closest('svg')) {
            const text = element.getBoundingClientRect();
            const x = text.left + 1, y = (text.top + text.bottom) / 2;
            const under = [...element.closest('svg').querySelectorAll('rect')].filter(each => {
                const box = each.getBoundingClientRect();
                return box.left <= x && x <= box.right && box.top <= y && y <= box.bottom;
            }).pop();
            if (under) return rgba(getComputedStyle(under).fill);
        }
        for (let at = element; at; at = at.parentElement) {
            const found = rgba(getComputedStyle(at).backgroundColor);
            if (found[3] > 0) return found;
        }
        return [255, 255, 255, 1];
    };
    const weak = [];
    let looked = 0;
    for (const element of document.querySelectorAll('body *')) {
        const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
        const shown = element.getBoundingClientRect();
        if (!own || !shown.width || element.tagName === 'title') continue;
        const style = getComputedStyle(element);
        const front = rgba(element.closest('svg') ? style.fill : style.color);
        const [light, dark] = [luminance(front), luminance(behind(element))].sort((a, b) => b - a);
        looked += 1;
        if ((light + 0.05) / (dark + 0.05) < 4.5) weak.push(element.textContent.slice(0, 40));
    }
    return [looked, weak];
}"""


def test_contrast(seen: Seen) -> None:
    """All text stands out from what is behind it by 4.5 to 1 at least (WCAG 2, 1.4.3), the folded one unfolded."""
    seen.page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    looked, weak = seen.page.evaluate(CONTRAST)
    assert looked > 20
    assert weak == []


def test_shown(seen: Seen) -> None:
    """A picture of it is no empty sheet."""
    assert len(seen.page.screenshot()) > 8_000


def test_headings(seen: Seen) -> None:
    """One heading of the first level, none skipped, every section under a heading of its own, and a language."""
    levels = [
        int(tag[1])
        for tag in seen.page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(each => each.tagName)")
    ]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert seen.page.evaluate("[...document.querySelectorAll('section')].every(each => each.querySelector('h2'))")
    assert seen.page.get_attribute("html", "lang") == "en"


@pytest.mark.parametrize("name", ["two", "forty"])
def test_every_change_is_shown(name: str, browser: Browser, tmp_path: Path) -> None:
    """Every risk, every source that changes hands and every setting can be seen, and each lane of the picture too."""
    found = CHANGES[name]()
    file = tmp_path / "change.html"
    file.write_text(page.html(found), encoding="utf-8")
    shown = Seen(browser, file, 1280, "light").page
    shown.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    words = shown.locator("main").inner_text()
    for risk in found.risks:
        assert risk in words
    for move in found.moves:
        assert f"{move.before or 'nobody'} → {move.after or 'nobody'}" in words
        assert all(str(prefix) in words for prefix in move.prefixes)
    for part in found.parts:
        assert all(each.effect in words for each in part.settings)
    # The picture: a lane is tinted just when something about its identity changes.
    moved = {name for move in found.moves for name in (move.before, move.after)}
    changed = sum(part.fate != SAME or part.name in moved for part in found.parts) + (None in moved)
    assert shown.locator("svg.wide rect.lane").count() == changed
    shown.close()


def test_printed(browser: Browser, tmp_path: Path) -> None:
    """On paper it is several pages at most, dark on white whatever the screen is, with the wide picture."""
    file = tmp_path / "change.html"
    file.write_text(page.html(two()), encoding="utf-8")
    shown = Seen(browser, file, 1280, "dark").page
    printed = shown.pdf(format="A4")
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 12
    shown.emulate_media(media="print")
    assert shown.locator("svg.wide").is_visible()
    assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert shown.evaluate(CONTRAST)[1] == []
    shown.close()


def test_escaped() -> None:
    """Nothing of a policy is markup in the page: links may have almost any name."""
    link = "<b>&'\u00e4"
    changed = policy(replace(INSIDE, link=link), OUTSIDE)
    words = page.html(change(desire(policy(INSIDE, OUTSIDE), None), desire(changed, None)))
    assert link not in words
    assert "&lt;b&gt;&amp;" in words
    assert "<script" not in words


def test_deterministic() -> None:
    """The same change is the same page, byte for byte."""
    assert page.html(forty()) == page.html(forty())
