"""`/metrics`, `/-/healthy` and `/-/ready` over HTTP, on a TCP port or a Unix socket, with TLS if asked for.

One connection, one request: a scraper that gets "Connection: close" makes a new one for the next scrape. Whoever
connects has a few seconds in all, from the TLS handshake to the last byte, and a bounded number of bytes to ask with.
When all places are taken the oldest connection gives up its own, so that silent ones never keep a scrape out.
"""

from __future__ import annotations

import errno
import gzip
import logging
import os
import selectors
import socket
import ssl
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException, parse_headers
from io import BytesIO
from ipaddress import IPv6Address
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder, gzip_accepted

from agent import IdmarkError
from agent.addresses import parse_address
from agent.lines import Lines

_log = logging.getLogger(__name__)

#: Connections at a time, and how many of those that lost their place may still be at work.
PLACES, LEAVING = 32, 32
#: Seconds that a connection may last; and those in which one that was refused may finish what it was sending.
PATIENCE, FAREWELL = 10.0, 1.0
#: Bytes of a request, and what is read of a refused one besides.
LONGEST, DISCARDED = 8192, 65536
#: Of zlib's levels the first: the ninth takes five times as long, 25 ms of 13,000 samples, for an eighth less bytes.
LEVEL = 1
UNIX = "unix:"
#: Group members may scrape through a Unix socket.
MODE = 0o660
#: linux/in.h, linux/in6.h: to listen on an address that the host may get later. The daemon starts before the network.
IP_FREEBIND, IPV6_FREEBIND = 15, 78


class ExpositionError(IdmarkError):
    """Metrics can't be served as was asked."""


@dataclass(frozen=True, slots=True)
class Response:
    """What a client is told."""

    status: HTTPStatus
    body: bytes
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "text/plain; charset=utf-8"),)

    def encode(self, *, with_body: bool) -> bytes:
        """The bytes on the wire; without the body they say its length all the same (RFC 9110, 9.3.2)."""
        headers = (*self.headers, ("Content-Length", str(len(self.body))), ("Connection", "close"))
        head = "".join(f"{name}: {value}\r\n" for name, value in headers)
        first = f"HTTP/1.1 {self.status.value} {self.status.phrase}\r\n"
        return f"{first}{head}\r\n".encode("latin-1") + (self.body if with_body else b"")


class Exposition:
    """A server of one registry. `listen` is `127.0.0.1:9473`, `[::1]:9473` or `unix:/run/idmark/metrics.sock`.

    With a `certificate` (PEM; its `key` in a file of its own, or in the same one) it speaks TLS 1.2 or later, with
    `client_ca` only to clients that have a certificate of that authority. It listens from the moment that it is made
    and answers from `start` on, in the network namespace of this thread. Raises ExpositionError.
    """

    def __init__(
        self,
        listen: str,
        registry: CollectorRegistry,
        ready: Callable[[], bool],
        healthy: Callable[[], bool],
        *,
        certificate: Path | None = None,
        key: Path | None = None,
        client_ca: Path | None = None,
    ) -> None:
        self._registry, self._lines = registry, Lines()
        self._states = {"/-/ready": ("ready", ready), "/-/healthy": ("healthy", healthy)}
        self._tls = _tls(certificate, key, client_ca)
        self._path = Path(listen.removeprefix(UNIX)) if listen.startswith(UNIX) else None
        self._listener = _listen_unix(self._path) if self._path else _listen_tcp(listen)
        self._listener.setblocking(False)
        # What the file is: another server may have put its own in its place by the time that this one ends.
        self._inode = self._path.stat().st_ino if self._path else 0
        self._closing, self._close = socket.socketpair()
        self._guard = threading.Lock()
        self._connections: dict[socket.socket, bool] = {}  # and whether it still has its place, the oldest first
        self._thread = threading.Thread(target=self._accept, name="metrics", daemon=True)

    @property
    def address(self) -> str:
        """Where it listens, as in `listen`; port 0 has become a real one."""
        if self._path:
            return f"{UNIX}{self._path}"
        host, port, *_ = self._listener.getsockname()
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def start(self) -> None:
        """Answer, in threads of its own."""
        self._thread.start()

    def close(self) -> None:
        """Stop; whoever is being answered is cut off."""
        self._close.close()
        if self._thread.is_alive():
            self._thread.join()
        self._listener.close()
        self._closing.close()
        with self._guard:
            for connection in self._connections:
                _shut(connection)
        if self._path:
            with suppress(FileNotFoundError):
                if self._path.stat().st_ino == self._inode:
                    self._path.unlink()

    # --- connections -------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._closing, selectors.EVENT_READ)
            while True:
                if any(ready.fileobj is self._closing for ready, _ in selector.select()):
                    return
                try:
                    connection, _ = self._listener.accept()
                except OSError as error:
                    if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}:
                        # The connection stays in the queue, and select() would come back at once.
                        time.sleep(0.1)
                    continue  # else: it is gone already
                self._admit(connection)

    def _admit(self, connection: socket.socket) -> None:
        with self._guard:
            placed = [each for each, has_place in self._connections.items() if has_place]
            if len(placed) >= PLACES:
                _shut(placed[0])
                self._connections[placed[0]] = False
            crowded = len(self._connections) >= PLACES + LEAVING
            if not crowded:
                self._connections[connection] = True
        if crowded:
            connection.close()
            return
        try:
            threading.Thread(target=self._serve, args=(connection,), name="scrape", daemon=True).start()
        except RuntimeError as error:  # no more threads
            _log.warning("a connection for metrics was refused: %s", error)
            self._leave(connection)

    def _leave(self, connection: socket.socket) -> None:
        with self._guard:
            del self._connections[connection]
            connection.close()

    def _serve(self, connection: socket.socket) -> None:
        """One connection from its handshake to its end; whatever a client does wrong concerns nobody else."""
        deadline = time.monotonic() + PATIENCE
        try:
            # A copy of the descriptor: `_admit` may shut the connection down whatever becomes of the TLS above it.
            with connection.dup() as copy, self._secured(copy, deadline) as stream:
                head = _head(stream, deadline)
                if head is None:
                    answer, with_body = _plain(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE), True
                else:
                    answer, with_body = self._answer(head)
                _send(stream, answer.encode(with_body=with_body), deadline)
                if answer.status != HTTPStatus.OK:
                    _part(stream)
        except (OSError, EOFError):  # ssl.SSLError is an OSError; the client went away, or took too long
            _log.debug("a connection for metrics ended early", exc_info=True)
        finally:
            self._leave(connection)

    def _secured(self, connection: socket.socket, deadline: float) -> socket.socket:
        connection.settimeout(_left(deadline))
        if self._tls is None:
            return connection
        stream = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        try:
            stream.do_handshake()
        except OSError:
            stream.close()
            raise
        return stream

    # --- requests ----------------------------------------------------------------------------------------------------

    def _answer(self, head: bytes) -> tuple[Response, bool]:
        """The response to a request's head, and whether its body goes along."""
        line, _, fields = head.partition(b"\r\n")
        try:
            method, target, version = line.decode("ascii").split(" ")
            asked = urlsplit(target)
            headers = parse_headers(BytesIO(fields))
        except (ValueError, HTTPException):
            return _plain(HTTPStatus.BAD_REQUEST), True
        if not version.startswith("HTTP/1."):
            return _plain(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED), True
        path, with_body = asked.path, method != "HEAD"
        if path != "/metrics" and path not in self._states:
            return _plain(HTTPStatus.NOT_FOUND), with_body
        if method not in ("GET", "HEAD"):
            refusal = _plain(HTTPStatus.METHOD_NOT_ALLOWED)
            return Response(refusal.status, refusal.body, (*refusal.headers, ("Allow", "GET, HEAD"))), True
        if path == "/metrics":
            return self._metrics(asked.query, headers.get("Accept", ""), headers.get("Accept-Encoding", "")), with_body
        word, holds = self._states[path]
        if holds():
            return _plain(HTTPStatus.OK, f"idmark is {word}"), with_body
        return _plain(HTTPStatus.SERVICE_UNAVAILABLE, f"idmark is not {word}"), with_body

    def _metrics(self, query: str, accept: str, encoding: str) -> Response:
        """What prometheus_client makes of the registry: it knows the formats. `name[]` asks for some series only."""
        try:
            encoder, content_type = choose_encoder(accept)
        except (TypeError, ValueError):
            encoder, content_type = choose_encoder("")  # a version that is no number is nothing that we could give
        headers = [("Content-Type", content_type)]
        try:
            names = parse_qs(query).get("name[]")
            source = self._registry.restricted_registry(names) if names else self._registry
            body = self._lines.text(source, encoder, content_type)
            if gzip_accepted(encoding):
                body = gzip.compress(body, LEVEL)
                headers.append(("Content-Encoding", "gzip"))
        except Exception:
            # Ours or the library's mistake; the thread would end, and the scraper not hear of it.
            _log.exception("a scrape could not be answered")
            return _plain(HTTPStatus.INTERNAL_SERVER_ERROR)
        return Response(HTTPStatus.OK, body, tuple(headers))


def _plain(status: HTTPStatus, text: str = "") -> Response:
    return Response(status, f"{text or status.phrase}\n".encode())


# --- the stream ------------------------------------------------------------------------------------------------------


def _left(deadline: float) -> float:
    """Seconds until the deadline, for settimeout(). Raises TimeoutError when they are over."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _head(stream: socket.socket, deadline: float) -> bytes | None:
    """A request up to its empty line; None if it is too long. Raises EOFError, and OSError when it takes too long."""
    data = b""
    while b"\r\n\r\n" not in data:
        if len(data) >= LONGEST:
            return None
        stream.settimeout(_left(deadline))
        more = stream.recv(LONGEST - len(data))
        if not more:
            raise EOFError
        data += more
    return data.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"


def _send(stream: socket.socket, data: bytes, deadline: float) -> None:
    left = memoryview(data)
    while left:
        stream.settimeout(_left(deadline))
        left = left[stream.send(left) :]


def _part(stream: socket.socket) -> None:
    """Let a refused client read why: closed with something unread the kernel sends RST, which takes the words along."""
    deadline = time.monotonic() + FAREWELL
    socket.socket.shutdown(stream, socket.SHUT_WR)
    for _ in range(DISCARDED // LONGEST):
        stream.settimeout(_left(deadline))
        if not stream.recv(LONGEST):
            return


def _shut(connection: socket.socket) -> None:
    """Wake whoever waits for a connection, and let it see the end."""
    with suppress(OSError):  # the client was faster
        connection.shutdown(socket.SHUT_RDWR)


# --- what was asked for ----------------------------------------------------------------------------------------------


def _listen_tcp(listen: str) -> socket.socket:
    doing = f"listen on {listen}"
    host, colon, port = listen.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ExpositionError(f"{doing}: an IPv6 address stands in brackets, as in [::1]:9473")
    if not colon or not host:
        raise ExpositionError(f"{doing}: this is no ADDRESS:PORT, as 127.0.0.1:9473, nor {UNIX}/PATH")
    if not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ExpositionError(f"{doing}: {port or 'nothing'} is no port (0..65535)")
    try:
        address = parse_address(host)
    except ValueError as error:
        raise ExpositionError(f"{doing}: {host} {error}") from None
    ipv6 = isinstance(address, IPv6Address)
    listener = socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if ipv6:
            listener.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
            # [::] is every address of both families, whatever net.ipv6.bindv6only says.
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        else:
            listener.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
        listener.bind((host, int(port)))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ExpositionError(f"{doing}: {os.strerror(error.errno or 0)}") from error
    return listener


def _listen_unix(path: Path) -> socket.socket:
    doing = f"listen on {UNIX}{path}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _clear(path, doing)
        listener.bind(os.fspath(path))
        # Nobody can connect before listen().
        path.chmod(MODE)
        listener.listen()
    except OSError as error:
        listener.close()
        raise ExpositionError(f"{doing}: {os.strerror(error.errno) if error.errno else error}") from error
    except ExpositionError:
        listener.close()
        raise
    return listener


def _clear(path: Path, doing: str) -> None:
    """Take away a socket that a process left behind which is no more."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ExpositionError(f"{doing}: a file is there that is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(1)
        try:
            client.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except TimeoutError:
            pass  # its queue is full: somebody is there, and busy
    raise ExpositionError(f"{doing}: another process listens there")


def _tls(certificate: Path | None, key: Path | None, client_ca: Path | None) -> ssl.SSLContext | None:
    if certificate is None:
        if key or client_ca:
            raise ExpositionError(f"serve metrics by TLS: {key or client_ca} is of no use without a certificate")
        return None
    doing = f"serve metrics by TLS with certificate {certificate}" + (f" and key {key}" if key else "")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # An encrypted key would have OpenSSL ask for a password at the terminal.
        context.load_cert_chain(certificate, key, password=_no_password)
        if client_ca:
            doing = f"serve metrics to clients with a certificate of {client_ca}"
            context.load_verify_locations(client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except ssl.SSLError as error:
        raise ExpositionError(f"{doing}: {_words(error)}") from error
    except OSError as error:
        raise ExpositionError(f"{doing}: {os.strerror(error.errno or 0)}") from error
    except ValueError as error:
        raise ExpositionError(f"{doing}: {error}") from error
    return context


def _no_password() -> str:
    raise ValueError("the key is encrypted; give one that isn't, readable by idmark only")


def _words(error: ssl.SSLError) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return "the key does not fit the certificate"
    return f"this is no PEM file of what it should be ({error.reason or error})"
