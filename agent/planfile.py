"""A plan as a file: what was reviewed, to be applied as it is or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent import IdmarkError, folder, state
from agent.linediff import unified
from agent.model import Policy
from agent.plan import Plan
from agent.policy import parse

FORMAT = 1


class PlanFileError(IdmarkError):
    """A plan file that can't be written or used; the text names the file and why."""


@dataclass(frozen=True, slots=True)
class Reviewed:
    """A policy, and the plan that puts it in force as its text, a line a change, with its digest."""

    policy: Policy
    text: str
    digest: str

    def moved(self, now: Plan) -> Iterator[str]:
        """What is in this plan and no longer in that, and what is new there: lines with `<` and `>`, as diff(1)."""
        for line in unified(self.text.splitlines(), now.text.splitlines()):
            if line[0] in "-+":
                yield f"{'<' if line[0] == '-' else '>'} {line[1:]}"


def write(path: Path, policy: Policy, plan: Plan) -> None:
    """Put a plan and its policy into a file that only its owner may read; what is there and is no file (a pipe, a
    device) gets it written into. Raises PlanFileError.
    """
    document = {
        "idmark_plan": FORMAT,
        "gateway": policy.gateway,
        "digest": plan.digest,
        "policy_digest": policy.digest,
        "changes": plan.text.splitlines(),
        "policy": state.text(policy).splitlines(),
    }
    data = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    try:
        if path.exists() and not path.is_file():
            path.write_text(data, encoding="utf-8")
            return
        with folder.opened(path.parent) as place:
            folder.put(place, path.name, data.encode(), 0o600, durable=True)
    except OSError as error:
        raise PlanFileError(f"write {path}: {error.strerror or error}") from error


def read(path: Path) -> Reviewed:
    """A plan from a file that `write` wrote. Raises PlanFileError, PolicyError."""
    try:
        with path.open("rb") as file:
            data = file.read(folder.LIMIT + 1)
        document: Any = json.loads(data)
        if document["idmark_plan"] != FORMAT:
            raise ValueError(f"its format is {document['idmark_plan']}, and not {FORMAT}")
        text, written = ("".join(f"{line}\n" for line in document[key]) for key in ("changes", "policy"))
        digest, policy_digest = document["digest"], document["policy_digest"]
        unaltered = hashlib.sha256(text.encode()).hexdigest() == digest
    except OSError as error:
        raise PlanFileError(f"read {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise PlanFileError(f"{path}: this is no plan as `idmark plan --out` writes it ({error})") from error
    if not unaltered:
        raise PlanFileError(f"{path}: its changes are not those that its digest was taken of: it was altered")
    policy = parse(written, path)
    if policy.digest != policy_digest:
        raise PlanFileError(f"{path}: its policy is not the one that its digest was taken of: it was altered")
    return Reviewed(policy, text, digest)
