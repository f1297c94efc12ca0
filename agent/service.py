"""`idmark run`, put together: the daemon with its probes, its metrics, its log and its service manager."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry

from agent import IdmarkError, document, ledger
from agent.chronicle import Chronicle
from agent.daemon import SIGNALS, Daemon
from agent.exposition import Exposition
from agent.keeper import Keeper
from agent.kernel import KernelError, runtime
from agent.kernel.wake import Wake
from agent.ledger import STALE, Ledger
from agent.metrics import Metrics
from agent.model import Policy
from agent.notify import Notify, formatter
from agent.probes import Prober
from agent.reconcile import Seams
from agent.source import Source

#: Where the counters' values are that go on after a restart.
COUNTERS = "counters.json"
#: Seconds until the next try to serve metrics, where the address is taken.
RETRY = 10.0


@dataclass(frozen=True, slots=True)
class Listening:
    """Where metrics are served: ADDRESS:PORT or unix:PATH; and the files for TLS."""

    address: str
    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None


def run(policy: Path, listening: Listening | None, kernel: Seams) -> None:
    """Keep a policy in force until a signal says to stop. Raises PolicyError, KernelError."""
    log = _log()
    threading.excepthook = lambda failed: log.error(
        "internal error in %s, please report it: %r", failed.thread, failed.exc_value
    )
    with ExitStack() as stack:
        stack.enter_context(runtime.holding_run())
        wake = stack.enter_context(Wake(kernel.nfnl, SIGNALS))
        kernel.rtnl.prepare()
        document.prepare()
        registry = CollectorRegistry()
        metrics = Metrics(registry, runtime.directory() / COUNTERS)
        stack.callback(_close, metrics, log)
        for note in metrics.notes:
            log.warning("%s", note)
        before = _before(log)
        # Who counted as down when the last daemon ended is down still, until a probe is answered.
        prober = stack.enter_context(closing(Prober(wake.poke, before.down if before.age < STALE else {})))
        chronicle = Chronicle(metrics, Ledger(os.getpid(), time.time(), repairs=before.repairs), log)

        def keeper(first: Policy) -> Keeper:
            return Keeper(first, kernel, prober, metrics=metrics, chronicle=chronicle, log=log)

        daemon = Daemon(Source(policy), wake, keeper, metrics=metrics, notify=Notify(log), log=log)
        if listening:
            stack.enter_context(_served(listening, registry, daemon, prober, log))
        daemon.run()


def _before(log: logging.Logger) -> Ledger:
    """What the last daemon has left; nothing is no trouble."""
    try:
        return ledger.left() or Ledger(0, 0.0)
    except KernelError as error:
        log.warning("%s", error)
        return Ledger(0, 0.0)


def _close(metrics: Metrics, log: logging.Logger) -> None:
    try:
        metrics.close()
    except KernelError as error:
        log.warning("counters will not go on after a restart: %s", error)


@contextmanager
def _served(
    listening: Listening, registry: CollectorRegistry, daemon: Daemon, prober: Prober, log: logging.Logger
) -> Iterator[None]:
    """Serve metrics meanwhile, from when on that can be: an address that is taken leaves no host open."""
    ended = threading.Event()

    def serve() -> None:
        told = ""
        while True:
            try:
                exposition = Exposition(
                    listening.address,
                    registry,
                    ready=daemon.is_ready,
                    healthy=lambda: daemon.is_healthy() and prober.is_healthy(),
                    certificate=listening.certificate,
                    key=listening.key,
                    client_ca=listening.client_ca,
                )
                exposition.start()
                break
            except IdmarkError as error:
                if str(error) != told:
                    log.error("%s; to be tried again every %d seconds", error, RETRY)
                told = str(error)
            if ended.wait(RETRY):
                return
        log.info("metrics at %s", exposition.address)
        ended.wait()
        exposition.close()

    thread = threading.Thread(target=serve, name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _log() -> logging.Logger:
    """The agent's log, on stderr: the journal's, or a person's."""
    log = logging.getLogger("agent")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(sys.stderr))
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    return log
