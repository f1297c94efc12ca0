"""Metrics over HTTP: what is answered, by TCP, Unix socket and TLS; and that nobody who connects keeps a scrape out."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import os
import re
import socket
import ssl
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import Metric

from agent import exposition
from agent.exposition import Exposition, ExpositionError
from tests.kernel.net import Host
from tests.kernel.running import eventually

HERE = "127.0.0.1:0"
#: More connections than there are places.
MANY = exposition.PLACES + exposition.LEAVING + 5


def yes() -> bool:
    """Ready, or healthy."""
    return True


def no() -> bool:
    """Not yet, or not any more."""
    return False


@pytest.fixture
def registry(netns: Host) -> CollectorRegistry:
    """A registry with one sample of 1, in a test with a namespace of its own."""
    assert netns
    registry = CollectorRegistry()
    Gauge("idmark_in_sync", "Whether.", registry=registry).set(1)
    return registry


@contextlib.contextmanager
def serving(registry: CollectorRegistry, listen: str = HERE, **options: Any) -> Iterator[Exposition]:
    """A server of the registry that answers."""
    options = {"ready": yes, "healthy": yes, **options}
    server = Exposition(listen, registry, **options)
    server.start()
    try:
        yield server
    finally:
        server.close()


def connect(server: Exposition) -> socket.socket:
    """A connection to a server."""
    if server.address.startswith("unix:"):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(20)
        sock.connect(server.address.removeprefix("unix:"))
        return sock
    host, _, port = server.address.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), timeout=20)


class Answer(NamedTuple):
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes


def ask(server: Exposition, request: str | bytes, tls: ssl.SSLContext | None = None) -> Answer:
    """One request on a connection of its own; a str is `METHOD TARGET`."""
    if isinstance(request, str):
        request = f"{request} HTTP/1.1\r\nHost: gw1\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(connect(server))
        if tls:
            sock = stack.enter_context(tls.wrap_socket(sock, server_hostname="gw1"))
        sock.sendall(request)
        response = http.client.HTTPResponse(sock, method=request.split(b" ")[0].decode("latin-1"))
        response.begin()
        return Answer(response.status, dict(response.getheaders()), response.read())


def is_served(server: Exposition) -> bool:
    """Whether a scrape gets its samples."""
    return b"\nidmark_in_sync 1.0\n" in ask(server, "GET /metrics").body


# --- what is answered ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listen", [HERE, "[::1]:0", "0.0.0.0:0", "[::]:0"])
def test_metrics(registry: CollectorRegistry, listen: str) -> None:
    """The registry's samples in the text format, over IPv4 and IPv6."""
    with serving(registry, listen) as server:
        answer = ask(server, "GET /metrics")
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert b"\nidmark_in_sync 1.0\n" in answer.body


def test_every_address(registry: CollectorRegistry) -> None:
    """[::] is every address of both families, as with other programs of Prometheus's world."""
    with serving(registry, "[::]:0") as server, socket.socket() as sock:
        sock.settimeout(5)
        sock.connect(("127.0.0.1", int(server.address.rpartition(":")[2])))


def test_unix_socket(registry: CollectorRegistry, tmp_path: Path) -> None:
    """A Unix socket serves too; its group may connect, nobody else; and its file goes with the server."""
    path = tmp_path / "metrics.sock"
    with serving(registry, f"unix:{path}") as server:
        assert server.address == f"unix:{path}"
        assert is_served(server)
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert not path.exists()


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        pytest.param("GET /metrics", 200, id="metrics"),
        pytest.param("GET http://gw1/metrics", 200, id="by-a-proxy"),
        pytest.param("GET /-/ready", 200, id="ready"),
        pytest.param("GET /-/healthy", 200, id="healthy"),
        pytest.param("GET /", 404, id="root"),
        pytest.param("GET /metrics/", 404, id="unknown-path"),
        pytest.param("POST /metrics", 405, id="post"),
        pytest.param("PUT /nothing", 404, id="put-nowhere"),
        pytest.param("GET /met rics", 400, id="four-words"),
    ],
)
def test_status(registry: CollectorRegistry, request_line: str, status: int) -> None:
    """Each request has the status that HTTP gives it."""
    with serving(registry) as server:
        assert ask(server, request_line).status == status


@pytest.mark.parametrize("path", ["/metrics", "/-/ready", "/nothing"])
def test_head(registry: CollectorRegistry, path: str) -> None:
    """HEAD has the head of GET, and no body."""
    with serving(registry) as server:
        got, head = ask(server, f"GET {path}"), ask(server, f"HEAD {path}")
        assert (head.status, head.headers, head.body) == (got.status, got.headers, b"")


def test_allowed_methods(registry: CollectorRegistry) -> None:
    """A method that is refused is told which ones are not."""
    with serving(registry) as server:
        assert ask(server, "DELETE /metrics").headers["Allow"] == "GET, HEAD"


def test_not_ready(registry: CollectorRegistry) -> None:
    """Not ready and not healthy are 503, each by itself; metrics are there all the same."""
    with serving(registry, ready=no) as server:
        assert ask(server, "GET /-/ready")[::2] == (503, b"idmark is not ready\n")
        assert ask(server, "GET /-/healthy")[::2] == (200, b"idmark is healthy\n")
        assert is_served(server)
    with serving(registry, healthy=no) as server:
        assert ask(server, "GET /-/healthy")[::2] == (503, b"idmark is not healthy\n")


def test_compressed(registry: CollectorRegistry) -> None:
    """Who accepts gzip gets it: Prometheus does."""
    request = b"GET /metrics HTTP/1.1\r\nAccept-Encoding: gzip\r\n\r\n"
    with serving(registry) as server:
        answer = ask(server, request)
    assert answer.headers["Content-Encoding"] == "gzip"
    assert b"idmark_in_sync" in gzip.decompress(answer.body)


def test_openmetrics(registry: CollectorRegistry) -> None:
    """Who asks for OpenMetrics gets it: Prometheus does."""
    request = b"GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text;version=1.0.0\r\n\r\n"
    with serving(registry) as server:
        answer = ask(server, request)
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    assert answer.body.endswith(b"# EOF\n")


@pytest.mark.parametrize("version", ["1.x", "", "1.0.0.0.0", "\xff", "9" * 5000])
def test_unknown_format(registry: CollectorRegistry, version: str, caplog: pytest.LogCaptureFixture) -> None:
    """Who asks for a version that can't be gets one that can, and leaves no trace in the log."""
    accept = f"application/openmetrics-text;version={version}".encode("latin-1")
    with serving(registry) as server:
        assert ask(server, b"GET /metrics HTTP/1.1\r\nAccept: " + accept + b"\r\n\r\n").status == 200
    assert caplog.messages == []


def test_no_line_a_request(registry: CollectorRegistry, capfd: pytest.CaptureFixture[str]) -> None:
    """Requests, good and bad, leave nothing on standard output or error."""
    with serving(registry) as server:
        for request in ("GET /metrics", "GET /nothing", b"\0\1\2\r\n\r\n"):
            ask(server, request)
    assert capfd.readouterr() == ("", "")


class Broken:
    """A collector with a mistake."""

    def collect(self) -> Iterator[Metric]:
        raise KeyError("a mistake")


def test_mistake(registry: CollectorRegistry, caplog: pytest.LogCaptureFixture) -> None:
    """A mistake of ours is a failed scrape and in the log, not silence; the server goes on."""
    registry.register(Broken())
    with serving(registry) as server:
        assert ask(server, "GET /metrics").status == 500
        assert ask(server, "GET /-/ready").status == 200
    assert "a mistake" in caplog.text


# --- clients that do harm --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        pytest.param(b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 5000 + b"\r\n", 431, id="huge-head"),
        pytest.param(b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n", 431, id="huge-path"),
        pytest.param(b"\x16\x03\x01" + bytes(20_000), 431, id="endless-garbage"),
        pytest.param(b"\xff\xfe garbage\r\n\r\n", 400, id="garbage"),
        pytest.param(b"\r\n\r\n", 400, id="nothing"),
        pytest.param(b"GET http://[ HTTP/1.1\r\n\r\n", 400, id="no-url"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, id="http2"),
        pytest.param(b"POST /metrics HTTP/1.1\r\nContent-Length: 60000\r\n\r\n" + bytes(60_000), 405, id="body"),
    ],
)
def test_wrong_request(registry: CollectorRegistry, request_bytes: bytes, status: int) -> None:
    """A request that is no good is told so, and the next one is answered."""
    with serving(registry) as server:
        assert ask(server, request_bytes).status == status
        assert is_served(server)


def silent(sock: socket.socket) -> None:
    """Connected, and that is all."""


def slow(sock: socket.socket) -> None:
    """A request that doesn't end."""
    sock.sendall(b"GET /metrics HTTP/1.1\r\nX: ")


def deaf(sock: socket.socket) -> None:
    """Asks, and does not read."""
    sock.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")


def rude(sock: socket.socket) -> None:
    """Half a request and a reset."""
    sock.sendall(b"GET /metr")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


@pytest.mark.parametrize("harm", [silent, slow, deaf, rude])
@pytest.mark.parametrize("with_tls", [False, True])
def test_scrapes_go_on(
    registry: CollectorRegistry, pki: Pki, harm: Callable[[socket.socket], None], with_tls: bool
) -> None:
    """More connections than there are places, all of them harmful, keep no scrape out."""
    # What the kernel takes off the server's hands, and what a deaf client's: less than this answer.
    for direction in ("tcp_wmem", "tcp_rmem"):
        Path("/proc/sys/net/ipv4", direction).write_text("4096 4096 4096\n")
    big = Gauge("big", "Beside which everything else is small.", ["label"], registry=registry)
    for number in range(500):
        big.labels(f"{number:0500}").set(1)
    options: dict[str, Any] = pki.server._asdict() if with_tls else {}
    with serving(registry, **options) as server, contextlib.ExitStack() as stack:
        for _ in range(MANY):
            harm(stack.enter_context(connect(server)))
        for _ in range(3):
            answer = ask(server, "GET /metrics", pki.client() if with_tls else None)
            assert b"idmark_in_sync 1.0\n" in answer.body


def test_threads_are_bounded(registry: CollectorRegistry) -> None:
    """However many connect, the server has so many threads and connections, and no more."""
    with serving(registry) as server, contextlib.ExitStack() as stack:
        for _ in range(3 * MANY):
            silent(stack.enter_context(connect(server)))
        assert is_served(server)
        assert len(server._connections) <= exposition.PLACES + exposition.LEAVING


@pytest.mark.parametrize("sent", [pytest.param(b"", id="silent"), pytest.param(b"GET /", id="dripping")])
def test_time_is_up(netns: Host, sent: bytes) -> None:
    """Whoever takes too long for his request has the connection closed, also if now and then something comes."""
    assert netns
    near, far = socket.socketpair()
    with near, far:
        far.sendall(sent)
        with pytest.raises(TimeoutError):
            exposition._head(near, time.monotonic() + 0.1)


def test_close(registry: CollectorRegistry) -> None:
    """Closed, it cuts off who is connected, and its port is free for the next one."""
    with serving(registry) as server:
        port = server.address
        client = connect(server)
        assert is_served(server)
    with client, serving(registry, port) as server:
        assert client.recv(1) == b""
        assert is_served(server)


def test_never_started(registry: CollectorRegistry) -> None:
    """A server that was never started can be closed."""
    Exposition(HERE, registry, yes, yes).close()


# --- TLS -------------------------------------------------------------------------------------------------------------


class Keys(NamedTuple):
    """A certificate and its key, in PEM files."""

    certificate: Path
    key: Path


class Pki(NamedTuple):
    """An authority with a server and a client, and a stranger."""

    authority: Keys
    server: Keys
    scraper: Keys
    stranger: Keys

    def client(self, own: Keys | None = None) -> ssl.SSLContext:
        """A client that trusts the authority, with a certificate of its own or none."""
        context = ssl.create_default_context(cafile=self.authority.certificate)
        if own:
            context.load_cert_chain(own.certificate, own.key)
        return context


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """Made by openssl(1)."""
    directory = tmp_path_factory.mktemp("pki")

    def make(name: str, *words: str) -> Keys:
        keys = Keys(directory / f"{name}.pem", directory / f"{name}.key")
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        files = ["-days", "2", "-out", os.fspath(keys.certificate), "-keyout", os.fspath(keys.key)]
        name_words = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
        subprocess.run([*command, *files, *name_words, *words], check=True, capture_output=True)
        return keys

    authority = make("authority")
    signed = ["-CA", os.fspath(authority.certificate), "-CAkey", os.fspath(authority.key)]
    signed += ["-addext", "basicConstraints=critical,CA:FALSE"]
    return Pki(authority, make("gw1", *signed), make("prometheus", *signed), make("stranger"))


def test_tls(registry: CollectorRegistry, pki: Pki) -> None:
    """With a certificate it speaks TLS, and a client that knows the authority is content."""
    with serving(registry, certificate=pki.server.certificate, key=pki.server.key) as server:
        assert ask(server, "GET /metrics", pki.client()).status == 200
        assert ask(server, "GET /nothing", pki.client()).status == 404


def test_one_file(registry: CollectorRegistry, pki: Pki, tmp_path: Path) -> None:
    """Certificate and key may be in one file, or the key in its own."""
    both = tmp_path / "both.pem"
    both.write_bytes(pki.server.certificate.read_bytes() + pki.server.key.read_bytes())
    with serving(registry, certificate=both) as server:
        assert ask(server, "GET /metrics", pki.client()).status == 200


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_tls_version(registry: CollectorRegistry, pki: Pki) -> None:
    """TLS before 1.2 is refused."""
    old = pki.client()
    old.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("DEFAULT:@SECLEVEL=0")
    with (
        serving(registry, certificate=pki.server.certificate, key=pki.server.key) as server,
        pytest.raises(OSError, match=r"(?i)version|reset"),
    ):
        ask(server, "GET /metrics", old)


def test_mutual_tls(registry: CollectorRegistry, pki: Pki) -> None:
    """With a client authority only its clients get anything."""
    with serving(
        registry,
        certificate=pki.server.certificate,
        key=pki.server.key,
        client_ca=pki.authority.certificate,
    ) as server:
        assert ask(server, "GET /metrics", pki.client(pki.scraper)).status == 200
        for stranger in (pki.client(), pki.client(pki.stranger)):
            # TLS 1.3 lets a client speak before it hears of the refusal: it may find a closed connection instead.
            with pytest.raises((OSError, http.client.HTTPException)):
                ask(server, "GET /metrics", stranger)


def test_plain_to_tls(registry: CollectorRegistry, pki: Pki) -> None:
    """A request without TLS gets nothing where TLS is spoken, and the next one with TLS its answer."""
    with serving(registry, certificate=pki.server.certificate, key=pki.server.key) as server:
        with pytest.raises((OSError, http.client.HTTPException)):
            ask(server, "GET /metrics")
        assert ask(server, "GET /metrics", pki.client()).status == 200


def test_prometheus(registry: CollectorRegistry, pki: Pki, tmp_path: Path) -> None:
    """A real Prometheus scrapes it with certificates on both sides, as the scrape job shows in its comments."""
    job = (Path(__file__).parents[2] / "deploy/prometheus/idmark.scrape.yml").read_text()
    job = re.sub("(?m)^    # (?=scheme|tls_config|  )", "    ", job).replace("15s", "1s")
    words = ["--web.listen-address=127.0.0.1:9090", f"--storage.tsdb.path={tmp_path}/data"]
    with serving(registry, **pki.server._asdict(), client_ca=pki.authority.certificate) as server:
        for name, value in {
            "127.0.0.1:9473": server.address,
            "/etc/prometheus/idmark-ca.pem": f"{pki.authority.certificate}\n      server_name: gw1",
            "/etc/prometheus/prometheus.pem": f"{pki.scraper.certificate}",
            "/etc/prometheus/prometheus.key": f"{pki.scraper.key}",
        }.items():
            assert name in job
            job = job.replace(name, value)
        (tmp_path / "prometheus.yml").write_text(job)
        command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", *words]
        with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as prometheus:
            try:
                assert eventually(lambda: sample("idmark_in_sync") == "1"), (tmp_path / "log").read_text()
            finally:
                prometheus.terminate()


def sample(name: str) -> str | None:
    """The value of the one series of a name that Prometheus has; None while it has none, or is not up."""
    connection = http.client.HTTPConnection("127.0.0.1", 9090, timeout=10)
    with contextlib.closing(connection):
        try:
            connection.request("GET", f"/api/v1/query?query={name}")
        except OSError:
            return None
        answer = connection.getresponse()
        found = json.load(answer)["data"]["result"] if answer.status == 200 else []
    return found[0]["value"][1] if found else None


# --- what can't be had -----------------------------------------------------------------------------------------------


def refusal(registry: CollectorRegistry, listen: str = HERE, **options: Any) -> str:
    """Why a server can't be made."""
    with pytest.raises(ExpositionError) as refused:
        Exposition(listen, registry, yes, yes, **options)
    return str(refused.value)


@pytest.mark.parametrize(
    ("listen", "why"),
    [
        pytest.param("127.0.0.1:65536", "listen on 127.0.0.1:65536: 65536 is no port (0..65535)", id="port-too-large"),
        pytest.param("127.0.0.1:-1", "listen on 127.0.0.1:-1: -1 is no port (0..65535)", id="port-negative"),
        pytest.param("127.0.0.1:http", "listen on 127.0.0.1:http: http is no port (0..65535)", id="port-name"),
        pytest.param("127.0.0.1:", "listen on 127.0.0.1:: nothing is no port (0..65535)", id="no-port"),
        pytest.param("9473", "9473: this is no ADDRESS:PORT, as 127.0.0.1:9473, nor unix:/PATH", id="port-alone"),
        pytest.param(":9473", ":9473: this is no ADDRESS:PORT, as 127.0.0.1:9473, nor unix:/PATH", id="no-address"),
        pytest.param("localhost:9473", "listen on localhost:9473: localhost is not an address", id="name"),
        pytest.param("::1:9473", "::1:9473: an IPv6 address stands in brackets, as in [::1]:9473", id="no-brackets"),
        pytest.param("unix:/nowhere/s", "listen on unix:/nowhere/s: No such file or directory", id="no-directory"),
        pytest.param(f"unix:/{'x' * 120}", "AF_UNIX path too long", id="path-too-long"),
        pytest.param("unix:/run", "listen on unix:/run: a file is there that is no socket", id="no-socket"),
    ],
)
def test_bad_address(registry: CollectorRegistry, listen: str, why: str) -> None:
    """An address that is none is refused with what is wrong about it."""
    assert why in refusal(registry, listen)


def test_address_in_use(registry: CollectorRegistry) -> None:
    """A port that somebody listens on is said to be taken."""
    with serving(registry) as server:
        assert refusal(registry, server.address) == f"listen on {server.address}: Address already in use"


def test_address_to_come(registry: CollectorRegistry, netns: Host) -> None:
    """An address that the host doesn't have yet can be listened on: the daemon starts before the network."""
    for address in ("192.0.2.7", "2001:db8::7"):
        listen = f"[{address}]:9473" if ":" in address else f"{address}:9473"
        with serving(registry, listen) as server:
            netns.ip("address", "add", address, "dev", "lo")
            assert is_served(server)


def test_socket_in_use(registry: CollectorRegistry, tmp_path: Path) -> None:
    """A Unix socket that another live process listens on is left to it."""
    listen = f"unix:{tmp_path}/metrics.sock"
    with serving(registry, listen) as server:
        assert refusal(registry, listen) == f"listen on {listen}: another process listens there"
        assert is_served(server)


def test_stale_socket(registry: CollectorRegistry, tmp_path: Path) -> None:
    """A Unix socket that a dead process left behind is replaced."""
    path = tmp_path / "metrics.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(path))
        dead.listen()
    with serving(registry, f"unix:{path}") as server:
        assert is_served(server)


def test_socket_of_the_next(registry: CollectorRegistry, tmp_path: Path) -> None:
    """A server that closes late leaves the socket of the one that took its place."""
    path = tmp_path / "metrics.sock"
    with serving(registry, f"unix:{path}"):
        path.unlink()
        after = Exposition(f"unix:{path}", registry, yes, yes)
    assert path.is_socket()
    after.close()


def test_bad_certificates(registry: CollectorRegistry, pki: Pki, tmp_path: Path) -> None:
    """Keys and certificates that are of no use are refused, each by its name."""
    server, stranger = pki.server, pki.stranger
    garbage, missing = tmp_path / "garbage.pem", tmp_path / "missing.pem"
    garbage.write_text("garbage")
    locked = tmp_path / "locked.key"
    words = ["openssl", "ec", "-aes256", "-passout", "pass:secret", "-in", f"{server.key}", "-out", f"{locked}"]
    subprocess.run(words, check=True, capture_output=True)
    doing = f"serve metrics by TLS with certificate {server.certificate}"
    assert refusal(registry, certificate=server.certificate, key=missing) == (
        f"{doing} and key {missing}: No such file or directory"
    )
    assert refusal(registry, certificate=server.certificate, key=stranger.key) == (
        f"{doing} and key {stranger.key}: the key does not fit the certificate"
    )
    assert "the key is encrypted" in refusal(registry, certificate=server.certificate, key=locked)
    assert f"certificate {garbage}: this is no PEM file" in refusal(registry, certificate=garbage)
    assert f"{server.certificate}: this is no PEM file" in refusal(registry, certificate=server.certificate)
    assert f"a certificate of {garbage}: this is no PEM" in refusal(registry, **server._asdict(), client_ca=garbage)
    assert "is of no use without a certificate" in refusal(registry, key=server.key)
    assert "is of no use without a certificate" in refusal(registry, client_ca=pki.authority.certificate)
