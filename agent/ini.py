"""Files of `[section]` and `key=value`, as systemd.syntax(7) and NetworkManager's keyfiles have them."""

from __future__ import annotations

from collections.abc import Iterator


def assignments(text: str) -> Iterator[tuple[str, str, str]]:
    """Section, key and value of each assignment, in order; the last one of a key counts.

    A line that ends with a backslash goes on in the next one; comments between them are passed over.
    """
    section, before = "", ""
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith(("#", ";")) or not (stripped or before):
            continue
        if stripped.endswith("\\"):
            before += stripped[:-1] + " "
            continue
        stripped, before = before + stripped, ""
        if stripped.startswith("[") and stripped.endswith("]"):
            section = stripped[1:-1]
        elif "=" in stripped:
            key, _, value = stripped.partition("=")
            yield section, key.strip(), value.strip()
