"""What is in deploy/ for Prometheus and Grafana is sound, tested, and speaks of metrics that there are."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from prometheus_client import CollectorRegistry

from agent.metrics import Metrics

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES, TESTS = DEPLOY / "prometheus/idmark.rules.yml", DEPLOY / "prometheus/idmark.rules.test.yml"
DASHBOARD = DEPLOY / "grafana/idmark.json"


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["check", "config", "--syntax-only", "idmark.scrape.yml"], id="scrape-job"),
        pytest.param(["check", "rules", "--lint-fatal", "idmark.rules.yml"], id="rules"),
        pytest.param(["test", "rules", "idmark.rules.test.yml"], id="rules-tests"),
    ],
)
def test_promtool(words: list[str]) -> None:
    """promtool finds the scrape job and the rules in order, and the rules do what their tests say."""
    done = subprocess.run(["promtool", *words], cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


ALERTS = re.findall(r"alert: (\w+)", RULES.read_text())


@pytest.mark.parametrize("alert", ALERTS)
def test_alert_is_tested(alert: str) -> None:
    """Every alert has a test in which it fires, and one in which it doesn't."""
    expectations = re.split(r"- alertname: |promql_expr_test|  - name:", TESTS.read_text())
    mine = [text for text in expectations if text.startswith(f"{alert}\n")]
    assert {"exp_alerts" in text for text in mine} == {True, False}


def exposed(tmp_path: Path) -> Iterator[str]:
    """The names of all samples that there can be."""
    registry = CollectorRegistry()
    metrics = Metrics(registry, tmp_path / "counters.json")
    for family in (*registry.collect(), *metrics.describe()):
        if family.type == "histogram":
            yield from (f"{family.name}_{part}" for part in ("bucket", "count", "sum"))
        else:
            yield family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")


@pytest.mark.parametrize("file", [RULES, TESTS, DASHBOARD], ids=lambda file: file.name)
def test_names(file: Path, tmp_path: Path) -> None:
    """Rules and panels ask for metrics that there are: a misspelt one would be silent for ever."""
    asked = set(re.findall(r"(?<![\w:.])idmark_\w+", file.read_text()))
    assert asked
    assert asked <= set(exposed(tmp_path))


def dashboard_script() -> ModuleType:
    """The script, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("dashboard", DEPLOY / "grafana/dashboard.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_dashboard_is_built() -> None:
    """The dashboard that is kept here is what its script gives."""
    assert DASHBOARD.read_text() == dashboard_script().text()


def test_panels_fit() -> None:
    """No panel covers another, and none stands out of the grid of 24 columns."""
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + column, place["y"] + row) for column in range(place["w"]) for row in range(place["h"])}
        assert max(column for column, _ in cells) < 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells
