"""The lab as fixtures: a new one for every test, which costs less than to clean up after the one before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from agent.lab.lab import Lab
from tests.lab.gateway import Gateway


class Build(Protocol):
    """Builds a lab with this VPN and tunnel MTU; it ends with the test. One at a time: the hosts' names are taken."""

    def __call__(self, kind: str = "wireguard", mtu: int | None = None) -> Lab: ...


class BuildGateway(Protocol):
    """As Build, with an administrator at the gateway, who has done nothing yet."""

    def __call__(self, kind: str = "wireguard", mtu: int | None = None) -> Gateway: ...


@pytest.fixture
def build() -> Iterator[Build]:
    """Builds the lab that the test wants."""
    with contextlib.ExitStack() as stack:
        yield lambda kind="wireguard", mtu=None: stack.enter_context(Lab(kind, mtu))


@pytest.fixture
def lab(build: Build) -> Lab:
    """A lab with WireGuard, where nothing of idmark is installed."""
    return build()


@pytest.fixture
def build_gateway(build: Build, tmp_path: Path) -> BuildGateway:
    """Builds the lab that the test wants, with an administrator."""
    return lambda kind="wireguard", mtu=None: Gateway(build(kind, mtu), tmp_path)


@pytest.fixture
def gateway(build_gateway: BuildGateway) -> Gateway:
    """A lab with WireGuard and an administrator at its gateway, who has done nothing yet."""
    return build_gateway()
