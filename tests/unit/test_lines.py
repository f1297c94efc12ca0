"""Metrics as text: byte for byte what prometheus_client writes, whatever was written before."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from agent.lines import Lines

FORMATS = [
    pytest.param("", id="text"),
    pytest.param("application/openmetrics-text; version=1.0.0", id="openmetrics"),
    pytest.param("text/plain; version=1.0.0; escaping=allow-utf-8", id="text-with-utf-8"),
]


class Roads(Collector):
    """Families whose samples keep their labels from one scrape to the next, and get other values."""

    def __init__(self, names: Iterable[str]) -> None:
        self.labels = [{"identity": name, "link": f"{name}0"} for name in names]
        self.value = 0.0

    def collect(self) -> Iterable[Metric]:
        """A family of each kind."""
        packets = CounterMetricFamily("packets", 'Packets, with a "quote" and a \\.')
        packets.samples = [Sample("packets_total", labels, self.value) for labels in self.labels]
        up = GaugeMetricFamily("up", "Whether it is up.")
        up.samples = [Sample("up", labels, self.value) for labels in self.labels]
        info = InfoMetricFamily("road", "What it is.")
        info.samples = [Sample("road_info", labels, 1) for labels in self.labels]
        return (packets, up, info)


@pytest.mark.parametrize("accept", FORMATS)
@given(st.lists(st.text(), max_size=4), st.lists(st.floats(min_value=0) | st.integers(0, 1 << 64), max_size=4))
def test_as_the_library_writes_it(accept: str, names: list[str], values: list[float]) -> None:
    """Of any labels and values, at the first scrape and at later ones, the text is the library's in each format."""
    encoder, content_type = choose_encoder(accept)
    registry, roads, lines = CollectorRegistry(), Roads(names), Lines()
    registry.register(roads)
    Histogram("seconds", "How long it took.", registry=registry).observe(0.1)
    for roads.value in values:
        assert lines.text(registry, encoder, content_type) == encoder(registry)


def test_other_labels_are_written_anew() -> None:
    """Samples that are others, or more, or in another order, get lines of their own."""
    encoder, content_type = choose_encoder("")
    registry, roads, lines = CollectorRegistry(), Roads(["a", "b"]), Lines()
    registry.register(roads)
    for labels in (roads.labels, roads.labels[::-1], [*roads.labels, {"identity": "c"}], [{"identity": "d"}], []):
        roads.labels = labels
        assert lines.text(registry, encoder, content_type) == encoder(registry)


def test_formats_do_not_mix() -> None:
    """Who asks for one format gets nothing that was written for another."""
    registry, lines = CollectorRegistry(), Lines()
    registry.register(Roads(["a"]))
    for accept in ("", "application/openmetrics-text; version=1.0.0", ""):
        encoder, content_type = choose_encoder(accept)
        assert lines.text(registry, encoder, content_type) == encoder(registry)
