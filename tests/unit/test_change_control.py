"""The repository of policies in deploy/change-control: its script reviews a change, its pipelines call it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from agent import facts, render
from agent.desired import desire
from agent.policy import load

CONTROL = Path(__file__).parents[2] / "deploy/change-control"
GITHUB, GITLAB = CONTROL / ".github/workflows/idmark.yml", CONTROL / ".gitlab-ci.yml"
HOOKS = CONTROL / ".pre-commit-config.yaml"

#: idmark as the script calls it. No policy renders to what the proof refuses: a file "verify" is told in its place.
IDMARK = f"""\
#!/bin/sh
if [ "$3" = verify ] && [ -f verify ]; then
    cat verify
    exit 1
fi
exec {sys.executable} -m agent "$@"
"""


class Repository:
    """A git repository that is a copy of the sample, with its first state on the branch main."""

    def __init__(self, folder: Path, command: Path) -> None:
        self.folder = folder
        # Neither the configuration of who runs the tests, nor a repository around the folder.
        self.env = {
            "PATH": os.environ["PATH"],
            "IDMARK": str(command),
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_SYSTEM": os.devnull,
            **{f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER") for what, value in WHO.items()},
        }
        shutil.copytree(CONTROL, folder)
        self.git("init", "--quiet", "--initial-branch=main")
        self.commit("The sample")

    def git(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run git, which succeeds."""
        return subprocess.run(
            ["git", *words], cwd=self.folder, env=self.env, capture_output=True, text=True, check=True
        )

    def commit(self, subject: str) -> None:
        """All that is there, as a commit."""
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", subject)

    def branch(self) -> None:
        """Go on beside main."""
        self.git("checkout", "--quiet", "-b", "change")

    def edit(self, file: str, old: str, new: str) -> None:
        """Write something else in a file."""
        path = self.folder / file
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    def render(self, gateway: str) -> None:
        """Write the rendered files of a gateway anew."""
        folder = self.folder / "gateways" / gateway
        known = folder / "facts.json"
        for name, text in render.files(
            desire(load(folder / "policy.toml"), facts.load(known) if known.exists() else None)
        ).items():
            (folder / name).write_text(text, encoding="utf-8")

    def review(self, *words: str) -> tuple[int, str]:
        """The exit code of ci/review, and its comment."""
        done = subprocess.run(
            ["ci/review", *words], cwd=self.folder, env=self.env, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout or done.stderr


WHO = {"NAME": "Operator", "EMAIL": "operator@example.net", "DATE": "2024-01-01T00:00:00Z"}
LIST = "gateways/office/lists/engineering.txt"


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """A repository of policies."""
    command = tmp_path / "idmark"
    command.write_text(IDMARK)
    command.chmod(0o755)
    return Repository(tmp_path / "policies", command)


def row(comment: str, gateway: str) -> list[str]:
    """A gateway's cells in the table."""
    (found,) = re.findall(rf"^\| `{gateway}` \|(.*)\|$", comment, re.MULTILINE)
    return [cell.strip() for cell in found.split("|")]


# --- the review ------------------------------------------------------------------------------------------------------


def test_nothing(repository: Repository) -> None:
    """A branch that changes no policy is good, and changes nothing."""
    code, comment = repository.review("main")
    assert (code, row(comment, "office"), row(comment, "branch")) == (0, *[["✅", "✅", "✅", "nothing"]] * 2)


def test_change(repository: Repository) -> None:
    """A branch that moves a network says so, in meaning, and is good."""
    repository.branch()
    repository.edit(LIST, "10.9.7.0/24 ", "10.9.8.0/24 ")
    repository.render("office")
    repository.commit("Engineering moves")
    code, comment = repository.review("main")
    assert (code, row(comment, "office")) == (0, ["✅", "✅", "✅", "2 prefixes change hands"])
    assert row(comment, "branch")[3] == "nothing"
    assert "- `10.9.7.0/24` (256 IPv4 addresses) moves from inside to outside: leaves by wan, not wg0" in comment
    assert "- `10.9.8.0/24` (256 IPv4 addresses) moves from outside to inside: leaves by wg0, not wan" in comment


def test_output(repository: Repository) -> None:
    """With a folder the comment is there, and a page for each gateway that changes."""
    repository.branch()
    repository.edit(LIST, "10.9.7.0/24 ", "10.9.8.0/24 ")
    repository.render("office")
    repository.commit("Engineering moves")
    assert repository.review("-o", "review", "main") == (0, "")
    assert {path.name for path in (repository.folder / "review").iterdir()} == {"comment.md", "office.html"}
    assert (repository.folder / "review/comment.md").read_text().startswith("<!-- idmark review -->\n")


def test_not_rendered(repository: Repository) -> None:
    """A policy whose rendered files are the old ones is to be mended: 1, and the comment names them."""
    repository.branch()
    repository.edit(LIST, "10.9.7.0/24 ", "10.9.8.0/24 ")
    repository.commit("Engineering moves")
    code, comment = repository.review("main")
    assert (code, row(comment, "office")[:3]) == (1, ["✅", "❌", "✅"])
    assert "gateways/office/ruleset.nft: is not what gateways/office/policy.toml renders to" in comment


def test_proof_finds(repository: Repository) -> None:
    """What the proof finds stands in the comment: 1."""
    (repository.folder / "verify").write_text("a packet from 10.9.7.1 leaves by wan\n")
    code, comment = repository.review("main")
    assert (code, row(comment, "office")[2]) == (1, "❌")
    assert "a packet from 10.9.7.1 leaves by wan" in comment


def test_faulty(repository: Repository) -> None:
    """A policy that can't be used is trouble: 2, and every fault is told with its line."""
    repository.branch()
    repository.edit("gateways/office/policy.toml", "id = 2", "id = 64\nlinc = 1")
    repository.commit("Two faults")
    code, comment = repository.review("main")
    assert (code, row(comment, "office")[0]) == (2, "❌")
    assert "gateways/office/policy.toml:15: identity.outside.id: 64 does not fit mask" in comment
    assert "gateways/office/policy.toml:16: identity.outside.linc: unknown key" in comment
    assert row(comment, "branch") == ["✅", "✅", "✅", "nothing"]


def test_mended(repository: Repository) -> None:
    """A branch that mends what was faulty is good, though what it changes can't be told."""
    repository.edit("gateways/office/policy.toml", "id = 2", "id = 64")
    repository.commit("A fault")
    repository.branch()
    repository.edit("gateways/office/policy.toml", "id = 64", "id = 2")
    repository.commit("Mended")
    code, comment = repository.review("main")
    assert (code, row(comment, "office")) == (0, ["✅", "✅", "✅", "can't be told"])
    assert "base: gateways/office/policy.toml:15: identity.outside.id: 64" in comment


def test_new_and_gone(repository: Repository) -> None:
    """A gateway that comes and one that goes are told as such."""
    repository.branch()
    repository.git("mv", "gateways/office", "gateways/hq")
    repository.commit("Another name")
    code, comment = repository.review("main")
    assert (code, row(comment, "hq")) == (0, ["✅", "✅", "✅", "a new gateway"])
    assert row(comment, "office")[3] == "gone from here, and still in force there until `idmark remove`"


def test_main_went_on(repository: Repository) -> None:
    """What has come to main since the branch left it is not told as the branch's doing."""
    repository.branch()
    repository.git("checkout", "--quiet", "main")
    repository.edit(LIST, "10.9.7.0/24 ", "10.9.8.0/24 ")
    repository.render("office")
    repository.commit("Engineering moves")
    repository.git("checkout", "--quiet", "change")
    assert row(repository.review("main")[1], "office")[3] == "nothing"


def test_no_such_base(repository: Repository) -> None:
    """A base that isn't there is trouble: 2, and no review."""
    code, words = repository.review("nowhere")
    assert code == 2
    assert "review: no commit nowhere that this branch comes from" in words


def test_long(repository: Repository) -> None:
    """A comment that would be too long for GitHub leaves its details out, and says so."""
    repository.branch()
    for number in range(4):
        shutil.copytree(repository.folder / "gateways/office", repository.folder / f"gateways/office{number}")
    repository.commit("Four more")
    repository.git("branch", "--force", "main")
    networks = "\n".join(f"10.9.{third}.{fourth}" for third in range(40, 60) for fourth in range(1, 240, 2))
    for number in range(4):
        repository.edit(f"gateways/office{number}/lists/engineering.txt", "10.9.30.7 ", f"{networks}\n10.9.30.7 ")
        repository.render(f"office{number}")
    repository.commit("Many")
    code, comment = repository.review("main")
    assert code == 0
    assert len(comment) < 65_536
    assert comment.endswith("The details are left out: there are too many.\n")
    assert row(comment, "office3")[3] == "2,400 prefixes change hands"


def test_by_hand(repository: Repository) -> None:
    """Without a base everything but the change is reviewed."""
    code, comment = repository.review()
    assert (code, row(comment, "office")) == (0, ["✅", "✅", "✅", "not asked for"])


def test_hook(repository: Repository) -> None:
    """The hook lets no commit pass whose rendered files are the old ones."""
    repository.git("config", "core.hooksPath", "ci/hooks")
    repository.edit(LIST, "10.9.7.0/24 ", "10.9.8.0/24 ")
    with pytest.raises(subprocess.CalledProcessError):
        repository.commit("Engineering moves")
    repository.render("office")
    repository.commit("Engineering moves")


# --- the comment -----------------------------------------------------------------------------------------------------


class Forge(ThreadingHTTPServer):
    """As much of the two forges' comments as a job meets: they are listed by pages, made and changed."""

    def __init__(self) -> None:
        self.comments = [{"id": number, "body": f"words {number}"} for number in range(100)]
        self.headers: dict[str, str] = {}
        self.others: set[int] = set()
        super().__init__(("127.0.0.1", 0), Answer)


class Answer(BaseHTTPRequestHandler):
    """One request."""

    server: Forge

    def do_GET(self) -> None:
        page = int(parse_qs(urlsplit(self.path).query)["page"][0])
        self.answer(200, self.server.comments[100 * page - 100 : 100 * page])

    def do_POST(self) -> None:
        made = {"id": len(self.server.comments), **self.body()}
        self.server.comments.append(made)
        self.answer(201, made)

    def do_PATCH(self) -> None:
        number = int(self.path.rpartition("/")[2])
        if number in self.server.others:
            self.answer(403, {"message": "not yours"})
            return
        self.server.comments[number].update(self.body())
        self.answer(200, self.server.comments[number])

    def do_PUT(self) -> None:
        self.do_PATCH()

    def body(self) -> dict[str, str]:
        self.server.headers = {name.lower(): value for name, value in self.headers.items()}
        found: dict[str, str] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        return found

    def answer(self, code: int, value: object) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *words: object) -> None:
        """Tests are quiet."""


@pytest.fixture
def forge() -> Iterator[Forge]:
    """A server on this machine."""
    server = Forge()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def github(url: str) -> dict[str, str]:
    return {"GITHUB_API_URL": url, "GITHUB_REPOSITORY": "o/r", "GITHUB_TOKEN": "secret", "PULL_REQUEST": "7"}


def gitlab(url: str) -> dict[str, str]:
    return {
        "CI_API_V4_URL": url,
        "CI_PROJECT_ID": "3",
        "CI_MERGE_REQUEST_IID": "7",
        "IDMARK_REVIEW_TOKEN": "secret",
    }


@pytest.mark.parametrize(
    ("forge_env", "header"),
    [
        pytest.param(github, ("authorization", "Bearer secret"), id="github"),
        pytest.param(gitlab, ("private-token", "secret"), id="gitlab"),
    ],
)
def test_comment(
    forge: Forge, tmp_path: Path, forge_env: Callable[[str], dict[str, str]], header: tuple[str, str]
) -> None:
    """A first review is a new comment, the next one is that comment written anew; somebody else's stays as it is."""
    env = {"PATH": os.environ["PATH"], **forge_env(f"http://127.0.0.1:{forge.server_port}")}
    forge.comments[0]["body"] = "<!-- idmark review -->\nsomebody's words"
    forge.others = {0}
    for words in ("first", "second"):
        (tmp_path / "comment.md").write_text(f"<!-- idmark review -->\n{words}\n")
        subprocess.run([CONTROL / "ci/comment", "comment.md"], cwd=tmp_path, env=env, check=True)
        assert [each["body"] for each in forge.comments[100:]] == [f"<!-- idmark review -->\n{words}\n"]
    assert forge.headers[header[0]] == header[1]


def test_comment_without_token(tmp_path: Path) -> None:
    """What is missing in the environment is said in a line, and not in a traceback."""
    (tmp_path / "comment.md").write_text("words")
    done = subprocess.run(
        [CONTROL / "ci/comment", "comment.md"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "comment: CI_API_V4_URL is not in the environment\n")


# --- what calls them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gateway", ["office", "branch"])
def test_sample_is_rendered(gateway: str) -> None:
    """The sample's files are what its policies render to, the facts filled in where there are some."""
    folder = CONTROL / "gateways" / gateway
    known = folder / "facts.json"
    desired = desire(load(folder / "policy.toml"), facts.load(known) if known.exists() else None)
    assert not desired.faults
    assert render.files(desired) == {
        name: (folder / name).read_text(encoding="utf-8") for name in (render.RULESET, render.ROUTING)
    }


@pytest.mark.parametrize(
    ("file", "schema"),
    [
        pytest.param(GITHUB, "vendor.github-workflows", id="github"),
        pytest.param(GITLAB, "vendor.gitlab-ci", id="gitlab"),
    ],
)
def test_schema(file: Path, schema: str) -> None:
    """The pipelines are what the forges' own schemas ask for."""
    words = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(file)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def shells() -> Iterator[tuple[str, str]]:
    """Every line of shell in the pipelines and hooks, with the file it stands in."""
    workflow, pipeline, hooks = (yaml.safe_load(path.read_text()) for path in (GITHUB, GITLAB, HOOKS))
    for step in workflow["jobs"]["review"]["steps"]:
        if "run" in step:
            yield "github", step["run"]
    for part in ("before_script", "script", "after_script"):
        for line in pipeline["idmark"][part]:
            yield "gitlab", line
    yield "pre-commit", hooks["repos"][0]["hooks"][0]["entry"]


@pytest.mark.parametrize(("where", "line"), [*shells()])
def test_shell(where: str, line: str) -> None:
    """A shell reads each line, each script that is called is there and may be run, and no expression is pasted in."""
    subprocess.run(["sh", "-n", "-c", line], check=True)
    assert "${{" not in line, where
    for script in re.findall(r"\bci/\w+", line):
        assert os.access(CONTROL / script, os.X_OK)


def test_least_rights() -> None:
    """The workflow may write comments, and nothing else; it never runs a fork's code with more than that."""
    workflow: dict[Any, Any] = yaml.safe_load(GITHUB.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["jobs"]["review"]["permissions"] == {"contents": "read", "pull-requests": "write"}
    # YAML 1.1 reads the key "on" as true.
    assert set(workflow[True]) == {"pull_request", "push"}


@pytest.mark.parametrize("script", ["ci/review", "ci/hooks/pre-commit"])
def test_posix(script: str) -> None:
    """The scripts are read by a POSIX shell, and may be run."""
    subprocess.run(["sh", "-n", CONTROL / script], check=True)
    assert os.access(CONTROL / script, os.X_OK)
