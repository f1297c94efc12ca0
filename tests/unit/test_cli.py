"""The command line where it needs no kernel: exit codes, what is printed where, and never a traceback."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent import cli, facts, render
from agent.desired import desire
from agent.policy import load
from tests.unit.values import GATEWAY, INSIDE, OUTSIDE, host, identity, policy, toml

GOOD = toml(policy(INSIDE, OUTSIDE))


class Ran(NamedTuple):
    """What a command gave back."""

    code: int
    out: str
    err: str


Idmark = Callable[..., Ran]


@pytest.fixture
def idmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Idmark]:
    """Run idmark beside a good policy.toml, and with folders of its own for what it writes down."""
    monkeypatch.chdir(tmp_path)
    for name in ("STATE_DIRECTORY", "RUNTIME_DIRECTORY"):
        monkeypatch.setenv(name, str(tmp_path / name))
    Path("policy.toml").write_text(GOOD, encoding="utf-8")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def run(*words: str, policy: str = "policy.toml") -> Ran:
        try:
            code = cli.main(["-c", policy, *words])
        except SystemExit as left:  # argparse's way out
            code = left.code if isinstance(left.code, int) else 1
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        assert "internal error" not in err
        return Ran(code, out, err)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "agent", *words]


# --- check -----------------------------------------------------------------------------------------------------------


def test_check_good(idmark: Idmark) -> None:
    """A good policy is said to be, with its digest's beginning, and the exit code is 0."""
    digest = load(Path("policy.toml")).digest
    assert idmark("check") == (0, f"policy.toml: good: gw1 with inside, outside; policy {digest[:12]}\n", "")


def test_check_bad(idmark: Idmark) -> None:
    """Every fault is a line on stderr, with file and line; nothing is on stdout, and the exit code is 2."""
    Path("policy.toml").write_text(GOOD.replace("id = 1", "id = 64").replace("id = 2", "id = 2\nlinc = 7"))
    assert idmark("check") == (
        2,
        "",
        "policy.toml:3: identity.inside.id: 64 does not fit mask 0x3f000000 (1..63): "
        "kernel.mark_mask = 0x3f800000 would do\n"
        'policy.toml:14: identity.outside.linc: unknown key; did you mean "link"?\n',
    )


def test_check_json(idmark: Idmark) -> None:
    """For a program a good policy is usable, and its digest is whole."""
    ran = idmark("check", "--json")
    digest = load(Path("policy.toml")).digest
    assert (ran.code, ran.err) == (0, "")
    assert json.loads(ran.out) == {"usable": True, "faults": [], "warnings": [], "digest": digest}


def test_check_json_bad(idmark: Idmark) -> None:
    """For a program a fault is file, line, path and message, on stdout, and the exit code is 2 all the same."""
    Path("policy.toml").write_text(GOOD.replace("id = 1", "id = 64"))
    ran = idmark("check", "--json")
    assert (ran.code, ran.err) == (2, "")
    assert json.loads(ran.out) == {
        "usable": False,
        "faults": [
            {
                "file": "policy.toml",
                "line": 3,
                "path": "identity.inside.id",
                "message": "64 does not fit mask 0x3f000000 (1..63): kernel.mark_mask = 0x3f800000 would do",
            }
        ],
        "warnings": [],
    }


def test_warning(idmark: Idmark) -> None:
    """A warning is said on stderr and refuses nothing; for a program it is in the answer, and there alone."""
    Path("policy.toml").write_text(GOOD.replace("rule_priority = 4000", "rule_priority = 5215"))
    ran = idmark("check")
    assert ran.code == 0
    assert [line[:9] for line in ran.err.splitlines()] == ["warning: "] * 2
    quiet = idmark("check", "--json")
    assert (quiet.code, quiet.err) == (0, "")
    assert [f"warning: {line}" for line in json.loads(quiet.out)["warnings"]] == ran.err.splitlines()


# --- render ----------------------------------------------------------------------------------------------------------


def test_render_to_stdout(idmark: Idmark) -> None:
    """Without a folder both files are printed, each under its name."""
    ran = idmark("render")
    files = render.files(desire(load(Path("policy.toml")), None))
    assert ran == (0, "".join(f"# ==> {name} <==\n{text}\n" for name, text in files.items()), "")


def test_render_to_folder(idmark: Idmark) -> None:
    """With a folder, which is made, the files are written, and their paths printed."""
    ran = idmark("render", "-o", "review/gw1")
    assert ran == (0, "review/gw1/ruleset.nft\nreview/gw1/routing.txt\n", "")
    files = render.files(desire(load(Path("policy.toml")), None))
    assert {path.name: path.read_text(encoding="utf-8") for path in Path("review/gw1").iterdir()} == files


def test_render_with_facts(idmark: Idmark) -> None:
    """With a facts file what is "auto" is filled in."""
    Path("facts.json").write_text(facts.dump(GATEWAY), encoding="utf-8")
    assert "from 203.0.113.2 lookup 4002" in idmark("render", "--facts", "facts.json").out
    assert "203.0.113.2" not in idmark("render").out


def test_render_check(idmark: Idmark) -> None:
    """--check is 0 when the folder holds exactly this and 1 when not, names each file that differs, writes nothing."""
    missing = idmark("render", "-o", "out", "--check")
    assert (missing.code, missing.err) == (1, "")
    assert not Path("out").exists()
    idmark("render", "-o", "out")
    assert idmark("render", "-o", "out", "--check") == (0, "", "")
    routing = Path("out/routing.txt")
    routing.write_text(routing.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    words = "out/routing.txt: is not what policy.toml renders to\n"
    assert idmark("render", "-o", "out", "--check") == (1, words, "")
    assert routing.read_text(encoding="utf-8").endswith("\n\n")


def test_render_on_a_wrong_host(idmark: Idmark) -> None:
    """A policy that can't be on the host of the facts is not rendered."""
    inside = identity("inside", 1, "vpn0", addresses=["192.0.2.130"], next_hop=["198.51.100.1"])
    Path("policy.toml").write_text(toml(policy(inside)), encoding="utf-8")
    Path("facts.json").write_text(facts.dump(host(*GATEWAY.links)), encoding="utf-8")
    ran = idmark("render", "-o", "out", "--facts", "facts.json")
    words = "identity.inside.next_hop: 198.51.100.1 is not on vpn0, which has 192.0.2.128/25"
    assert ran == (2, "", f"idmark: {words}\n")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        pytest.param(["render", "--check"], "render --check wants the folder to compare with: -o DIR", id="no-folder"),
        pytest.param(["render", "-o", "policy.toml"], "write policy.toml: File exists", id="folder-is-a-file"),
        pytest.param(["render", "-o", "taken"], "write taken/ruleset.nft: Is a directory", id="file-is-a-folder"),
        pytest.param(
            ["render", "-o", "taken", "--check"],
            "read taken/ruleset.nft: Is a directory",
            id="compare-with-a-folder",
        ),
        pytest.param(
            ["render", "-o", "policy.toml", "--check"],
            "read policy.toml/ruleset.nft: Not a directory",
            id="compare-in-a-file",
        ),
        pytest.param(["render", "--facts", "none.json"], "none.json: No such file or directory", id="no-facts"),
        pytest.param(["render", "--facts", "."], ".: Is a directory", id="facts-are-a-folder"),
        pytest.param(["explain", "10.9.0.5", "there"], "explain: there is not an address", id="no-address"),
        pytest.param(
            ["explain", "10.9.0.5", "fe80::1%eth0"],
            "explain: fe80::1%eth0 is not an address",
            id="zone",
        ),
        pytest.param(
            ["explain", "10.9.0.5", "2001:db8::1"],
            "explain 10.9.0.5 2001:db8::1: a packet has two addresses of one family",
            id="two-families",
        ),
        pytest.param(
            ["explain", "10.9.0.5", "192.0.2.1", "--facts", "facts.json"],
            "explain asks this host: --facts goes with --offline",
            id="facts-of-another-host",
        ),
        pytest.param(
            ["explain", "10.9.0.5", "192.0.2.1", "--offline", "--trace"],
            "explain --trace watches this host's packets: it takes no --offline",
            id="trace-without-a-host",
        ),
    ],
)
def test_trouble(idmark: Idmark, words: list[str], complaint: str) -> None:
    """What can't be done as asked is said in one line on stderr, and the exit code is 2."""
    Path("taken/ruleset.nft").mkdir(parents=True)
    assert idmark(*words) == (2, "", f"idmark: {complaint}\n")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda data: b"\xff\xfe\x00", id="no-text"),
        pytest.param(lambda data: data.replace(b"\n", b"\r\n"), id="other-line-ends"),
        pytest.param(lambda data: data[:-1], id="last-line-not-ended"),
    ],
)
def test_compare_byte_by_byte(idmark: Idmark, change: Callable[[bytes], bytes]) -> None:
    """A file that is not byte for byte what the policy renders to differs; that is no trouble."""
    idmark("render", "-o", "out")
    ruleset = Path("out/ruleset.nft")
    ruleset.write_bytes(change(ruleset.read_bytes()))
    ran = idmark("render", "-o", "out", "--check")
    assert ran == (1, "out/ruleset.nft: is not what policy.toml renders to\n", "")


# --- explain ---------------------------------------------------------------------------------------------------------


def test_explain_offline(idmark: Idmark) -> None:
    """explain --offline follows the rendered text, and needs no kernel: without facts, and with those of a host."""
    ran = idmark("explain", "192.0.2.130", "198.51.100.10", "--offline")
    assert (ran.code, ran.err) == (0, "")
    assert "\n  identity   inside: the source is its own address\n" in ran.out
    assert "\n  rule       priority 4001 from 192.0.2.130 lookup 4001 protocol 73\n" in ran.out
    assert "  kernel  " not in ran.out
    Path("facts.json").write_text(facts.dump(GATEWAY), encoding="utf-8")
    ran = idmark("explain", "192.0.2.130", "10.9.0.5", "--offline", "--facts", "facts.json", "--json")
    found = json.loads(ran.out)
    assert (ran.code, found["identity"], found["agrees"]) == (0, "inside", None)
    assert {"what": "link", "words": "lan, behind this gateway"} in found["steps"]


# --- every verb ------------------------------------------------------------------------------------------------------

VERBS = {
    "check": [],
    "render": [],
    "plan": [],
    "apply": [],
    "status": [],
    "explain": ["192.0.2.130", "198.51.100.10"],
    "facts": [],
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        pytest.param("none.toml", "none.toml: cannot be read: No such file or directory", id="missing"),
        pytest.param(".", ".: is a directory", id="a-folder"),
        pytest.param("broken.toml", "broken.toml:1: is not TOML: ", id="no-toml"),
        pytest.param("binary.toml", "binary.toml:1: ", id="binary"),
        pytest.param("empty.toml", "empty.toml: gateway: is missing", id="empty"),
    ],
)
def test_no_usable_policy(idmark: Idmark, verb: str, name: str, complaint: str) -> None:
    """A policy that can't be used is trouble (2) for every verb, said in lines that begin with the file."""
    Path("broken.toml").write_text("gateway = \n")
    Path("binary.toml").write_bytes(b"\xff\xfe\x00")
    Path("empty.toml").write_text("")
    ran = idmark(verb, *VERBS[verb], policy=name)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(complaint)
    assert all(line.startswith(name) for line in ran.err.splitlines())


@pytest.mark.parametrize("verb", ["plan", "apply", "status", "explain", "facts", "remove"])
def test_privileges(idmark: Idmark, verb: str) -> None:
    """A verb that touches the kernel says so to a user who may not, in one line; nothing else happens."""
    # Without the capability in its bounding set no program gets it, root's neither (capabilities(7)).
    drop = ["setpriv", "--bounding-set", "-net_admin"] if os.geteuid() == 0 else []
    ran = subprocess.run(
        [*drop, *command("-c", "policy.toml", verb, *VERBS.get(verb, []))], capture_output=True, text=True, check=False
    )
    words = f"idmark: {verb} looks at the kernel's network state: it needs CAP_NET_ADMIN (sudo)\n"
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", words)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([], id="no-verb"),
        pytest.param(["fly"], id="no-such-verb"),
        pytest.param(["check", "--fly"], id="no-such-option"),
        pytest.param(["render", "-o"], id="option-without-value"),
        pytest.param(["explain", "10.9.0.5"], id="one-address"),
        pytest.param(["explain", "10.9.0.5", "192.0.2.1", "--trace", "nan"], id="no-time"),
    ],
)
def test_usage(idmark: Idmark, words: list[str]) -> None:
    """What is no command is trouble (2), with the usage on stderr."""
    ran = idmark(*words)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("usage: idmark ")


def test_schema(idmark: Idmark) -> None:
    """The schema is JSON Schema of a table that wants a gateway and identities, and allows no other keys."""
    ran = idmark("schema", policy="none.toml")
    schema = json.loads(ran.out)
    assert (ran.code, ran.err) == (0, "")
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["required"] == ["gateway", "identity"]
    assert set(schema["properties"]) == {"gateway", "downstream", "identity", "kernel"}
    assert schema["additionalProperties"] is False


#: What takes longer to import than most verbs to run.
HEAVY = {"agent.model", "asyncio", "prometheus_client", "pydantic", "pyroute2", "rich"}


def imported(*words: str) -> set[str]:
    """The modules that a command has imported by its end."""
    code = "import sys\nfrom agent import cli\ntry:\n    cli.main(sys.argv[1:])\nfinally:\n    print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    return {*ran.stdout.splitlines()[-1].split()}


@pytest.mark.parametrize("word", ["--version", "--help"])
def test_light_start(word: str) -> None:
    """Who asks for little waits for little: none of the heavy packages is imported for it."""
    assert HEAVY.isdisjoint(imported(word))


@pytest.mark.parametrize("verb", ["check", "render"])
def test_a_good_policy_is_read_without_pydantic(tmp_path: Path, verb: str) -> None:
    """pydantic has the words for a policy with faults: one without is not kept waiting for it, nor for the kernel."""
    (tmp_path / "policy.toml").write_text(GOOD)
    assert (HEAVY - {"agent.model"}).isdisjoint(imported("-c", str(tmp_path / "policy.toml"), verb))


@pytest.mark.parametrize("room", ["argparse", "agent.policy"])
def test_interrupted_at_the_start(tmp_path: Path, room: str) -> None:
    """Ctrl-C while rooms are imported ends it without a traceback: by the signal, or with the code that says so."""
    script = (
        "import os, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {room!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "sys.argv[1:] = ['-c', 'nowhere.toml', 'check']\n"
        "from agent.__main__ import main\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("words", [["--help"], ["render", "--help"], ["--version"]])
def test_help(idmark: Idmark, words: list[str]) -> None:
    """Help and version are on stdout, with exit code 0, and help names every verb and the exit codes."""
    ran = idmark(*words)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("idmark " if words == ["--version"] else "usage: idmark ")
    if words == ["--help"]:
        assert all(f" {verb} " in ran.out for verb in (*VERBS, "remove", "schema", "lab"))
        assert "0 in force or nothing found, 1 differs or something found, 2 trouble" in " ".join(ran.out.split())


def test_the_collector_of_cycles_goes_on(idmark: Idmark) -> None:
    """A verb does without the collector, and leaves it as it was to whoever called it."""
    assert idmark("check").code == 0
    assert gc.isenabled()


def test_reader_gone(tmp_path: Path) -> None:
    """When whoever reads our output has gone, idmark ends without a word."""
    (tmp_path / "policy.toml").write_text(GOOD)
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as stdout:
        ran = subprocess.run(
            command("-c", str(tmp_path / "policy.toml"), "render"), stdout=stdout, stderr=subprocess.PIPE, check=False
        )
    assert (ran.returncode, ran.stderr) == (2, b"")


def test_terminal_without_unicode(tmp_path: Path) -> None:
    """On a terminal that can't show a letter of a link's name it is spelled, and idmark goes on."""
    (tmp_path / "policy.toml").write_text(GOOD.replace('"vpn0"', '"vpné"'), encoding="utf-8")
    ran = subprocess.run(
        command("-c", str(tmp_path / "policy.toml"), "render"),
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert rb"dev 'vpn\xe9' table 4001" in ran.stdout


# --- laws ------------------------------------------------------------------------------------------------------------

lines_of_good = st.sampled_from(GOOD.splitlines())
edits = st.lists(lines_of_good | st.text(max_size=20) | st.sampled_from(["[identity.inside]", 'members = ["file:."]']))
no_facts = st.text() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps)


@given(edits)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_never_a_traceback(idmark: Idmark, edited: list[str]) -> None:
    """Whatever stands in the policy, check and render end with 0 or 2, and with words of ours on stderr if it is 2."""
    Path("policy.toml").write_text("\n".join(edited), encoding="utf-8", errors="surrogatepass")
    for verb in ("check", "render"):
        ran = idmark(verb)
        assert ran.code in {0, 2}
        assert (ran.code == 2) == all(line.startswith("policy.toml:") for line in ran.err.splitlines() or [""])
        assert (ran.code == 2) == (not ran.out)


@given(no_facts)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_never_a_traceback_on_facts(idmark: Idmark, text: str) -> None:
    """Whatever stands in a facts file that nobody took, render refuses it in one line."""
    Path("facts.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    ran = idmark("render", "--facts", "facts.json")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("idmark: facts.json: ")
    assert ran.err.count("\n") == 1
