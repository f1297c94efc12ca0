"""The Grafana dashboard, built: `python deploy/grafana/dashboard.py` writes idmark.json beside itself, for import.

Every panel asks Prometheus for the metrics that the README lists, of the gateways and identities that are chosen above.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from grafana_foundation_sdk.builders import (
    common,
    dashboard,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.variants import Dataquery
from grafana_foundation_sdk.models.common import BigValueColorMode, LegendDisplayMode, LegendPlacement, VisibilityMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    DataTransformerConfig,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMapping,
    ValueMappingResult,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

FILE = Path(__file__).with_name("idmark.json")
PROMETHEUS = DataSourceRef("prometheus", "${datasource}")

#: Which gateways, and which of their identities.
HOST = 'instance=~"$instance"'
WHICH = f'{HOST}, identity=~"$identity"'

#: A colour for what is as it should be, and for what isn't.
GOOD, BAD = "green", "red"

#: A query, and the legend of its series.
Query = tuple[str, str]


def over_time(queries: Iterable[Query]) -> list[Builder[Dataquery]]:
    """The queries of a panel with time in it."""
    return [
        prometheus.Dataquery().expr(expr).legend_format(legend).range().ref_id(letter)
        for letter, (expr, legend) in zip("ABCD", queries, strict=False)
    ]


def at_once(query: Query) -> list[Builder[Dataquery]]:
    """The query of a panel that shows what is."""
    expr, legend = query
    return [prometheus.Dataquery().expr(expr).legend_format(legend).instant().ref_id("A")]


def states(bad: str, good: str) -> list[ValueMapping]:
    """Words and colours for 0 and 1."""
    return [ValueMap({"0": ValueMappingResult(bad, BAD, index=0), "1": ValueMappingResult(good, GOOD, index=1)})]


def graph(title: str, description: str, unit: str, *queries: Query, width: int = 12) -> timeseries.Panel:
    """Values over time; below zero is what leaves."""
    legend = common.VizLegendOptions().display_mode(LegendDisplayMode.TABLE).placement(LegendPlacement.BOTTOM)
    return (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(PROMETHEUS)
        .unit(unit)
        .targets(over_time(queries))
        .fill_opacity(10)
        .show_points(VisibilityMode.NEVER)
        .legend(legend.show_legend(True))
        .span(width)
        .height(8)
    )


def timeline(title: str, description: str, words: tuple[str, str], *queries: Query) -> statetimeline.Panel:
    """A state over time, in words."""
    return (
        statetimeline.Panel()
        .title(title)
        .description(description)
        .datasource(PROMETHEUS)
        .mappings(states(*words))
        .show_value(VisibilityMode.NEVER)
        .targets(over_time(queries))
        .span(12)
        .height(7)
    )


def number(title: str, description: str, query: Query) -> stat.Panel:
    """One number for each gateway, on a ground that says whether it is a good one: 0 is."""
    steps = [Threshold(None, GOOD), Threshold(1, BAD)]
    return (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(PROMETHEUS)
        .decimals(0)
        .color_mode(BigValueColorMode.BACKGROUND)
        .thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
        .targets(at_once(query))
        .span(6)
        .height(4)
    )


def state(title: str, description: str, words: tuple[str, str], query: Query) -> stat.Panel:
    """One state for each gateway, in words."""
    return number(title, description, query).mappings(states(*words))


def identities() -> table.Panel:
    """What the identities are."""
    query = prometheus.Dataquery().expr(f"idmark_identity_info{{{WHICH}}}").format(PromQueryFormat.TABLE)
    hidden = dict.fromkeys(("Time", "Value", "__name__", "job"), True)
    return (
        table.Panel()
        .title("Identities")
        .description("Each identity's link, fwmark with its mask, and routing table.")
        .datasource(PROMETHEUS)
        .targets([query.instant().ref_id("A")])
        .with_transformation(DataTransformerConfig("organize", options={"excludeByName": hidden}))
        .span(12)
        .height(7)
    )


def rates(name: str, factor: str = "") -> list[Query]:
    """What arrives, above zero, and what leaves, below, for each identity."""
    rate = f"sum by (instance, identity) (rate({name}{{{WHICH}, direction=%s}}[$__rate_interval])){factor}"
    return [
        (rate % '"receive"', "{{instance}} {{identity}} receive"),
        (f"-({rate})" % '"transmit"', "{{instance}} {{identity}} transmit"),
    ]


def build() -> dashboard.Dashboard:
    """The whole dashboard."""
    instance = dashboard.QueryVariable("instance").label("Gateway").query("label_values(idmark_in_sync, instance)")
    identity = dashboard.QueryVariable("identity").label("Identity")
    identity = identity.query(f"label_values(idmark_identity_info{{{HOST}}}, identity)")
    board = (
        dashboard.Dashboard("idmark")
        .uid("idmark")
        .description("VPN gateways with several identities: what goes over which link, and whether that is as wanted.")
        .tags(["idmark", "vpn", "routing"])
        .time("now-6h", "now")
        .refresh("30s")
        .readonly()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    )
    for variable in (instance, identity):
        fresh = variable.datasource(PROMETHEUS).refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        board = board.with_variable(
            fresh.sort(VariableSort.ALPHABETICAL_ASC).multi(True).include_all(True).all_value(".*")
        )
    return daemon(traffic(now(board)))


def now(board: dashboard.Dashboard) -> dashboard.Dashboard:
    """Is all well?"""
    return (
        board.with_row(dashboard.Row("Is all well"))
        .with_panel(
            state(
                "Policy in force",
                "Whether the last pass left the policy in force.",
                ("not in force", "in force"),
                (f"min by (instance) (idmark_in_sync{{{HOST}}})", "{{instance}}"),
            )
        )
        .with_panel(
            state(
                "Policy file",
                "Whether the policy file is what is kept in force. A faulty one changes nothing: idmark check.",
                ("has faults", "is kept"),
                (f"min by (instance) (idmark_policy_last_reload_successful{{{HOST}}})", "{{instance}}"),
            )
        )
        .with_panel(
            number(
                "Misrouted packets",
                "Packets that were about to leave by a link which is not their identity's, in the time shown.",
                (
                    f"sum by (instance) (increase(idmark_identity_misrouted_packets_total{{{WHICH}}}[$__range]))",
                    "{{instance}}",
                ),
            )
        )
        .with_panel(
            number(
                "Fights",
                "Objects that another program kept changing back, in the time shown.",
                (f"sum by (instance) (increase(idmark_fights_total{{{HOST}}}[$__range]))", "{{instance}}"),
            )
        )
        .with_panel(
            timeline(
                "Links and probes",
                "Whether each identity's link is there, up and with carrier, and its probe answered where it has one.",
                ("down", "up"),
                (f"idmark_identity_link_up{{{WHICH}}}", "{{instance}} {{identity}} link"),
                (f"idmark_identity_probe_success{{{WHICH}}}", "{{instance}} {{identity}} probe"),
            )
        )
        .with_panel(
            timeline(
                "Routes",
                "Whether the kernel's own route lookup leads where the policy wants each identity's packets now.",
                ("wrong", "as wanted"),
                (f"idmark_identity_route_ok{{{WHICH}}}", "{{instance}} {{identity}} {{family}}"),
            )
        )
    )


def traffic(board: dashboard.Dashboard) -> dashboard.Dashboard:
    """What goes over which link?"""
    misrouted = f"sum by (instance, identity, action) (rate(idmark_identity_misrouted_packets_total{{{WHICH}}}"
    diverted = f"sum by (instance, identity) (rate(idmark_identity_diverted_packets_total{{{WHICH}}}"
    families = f"sum by (family, direction) (rate(idmark_identity_bytes_total{{{WHICH}}}[$__rate_interval])) * 8"
    return (
        board.with_row(dashboard.Row("Traffic by identity"))
        .with_panel(
            graph(
                "Bits a second",
                "By each identity's own link, IPv4 and IPv6 together. Below zero is what leaves.",
                "bps",
                *rates("idmark_identity_bytes_total", " * 8"),
            )
        )
        .with_panel(
            graph(
                "Packets a second",
                "By each identity's own link, IPv4 and IPv6 together. Below zero is what leaves.",
                "pps",
                *rates("idmark_identity_packets_total"),
            )
        )
        .with_panel(
            graph(
                "Misrouted",
                "Packets that were about to leave by a link which is not their identity's: dropped, or only counted.",
                "pps",
                (f"{misrouted}[$__rate_interval]))", "{{instance}} {{identity}} {{action}}"),
            )
        )
        .with_panel(
            graph(
                "Diverted",
                "Packets that left by another road, because when_down says so.",
                "pps",
                (f"{diverted}[$__rate_interval]))", "{{instance}} {{identity}}"),
            )
        )
        .with_panel(
            graph(
                "By address family",
                "Bits a second of the chosen identities together.",
                "bps",
                (families, "{{family}} {{direction}}"),
            )
        )
        .with_panel(identities())
    )


def daemon(board: dashboard.Dashboard) -> dashboard.Dashboard:
    """What does the daemon have to do?"""
    duration = f"sum by (instance, le) (rate(idmark_reconcile_duration_seconds_bucket{{{HOST}}}[$__rate_interval]))"
    return (
        board.with_row(dashboard.Row("The daemon"))
        .with_panel(
            graph(
                "Repairs and fights",
                "Objects that were put right, by kind, and those that another program keeps changing back.",
                "short",
                (
                    f"sum by (instance, kind) (increase(idmark_repairs_total{{{HOST}}}[$__rate_interval]))",
                    "{{instance}} {{kind}} repaired",
                ),
                (
                    f"sum by (instance, kind) (increase(idmark_fights_total{{{HOST}}}[$__rate_interval]))",
                    "{{instance}} {{kind}} fought over",
                ),
            )
        )
        .with_panel(
            graph(
                "Passes",
                "How long a pass takes: the kernel read, compared with the policy, and put right.",
                "s",
                (f"histogram_quantile(0.5, {duration})", "{{instance}} median"),
                (f"histogram_quantile(0.99, {duration})", "{{instance}} 99 %"),
            )
        )
        .with_panel(
            graph(
                "Failures",
                "Passes that failed, and scrapes that could not read the kernel.",
                "short",
                (
                    f"increase(idmark_reconcile_errors_total{{{HOST}}}[$__rate_interval])",
                    "{{instance}} passes failed",
                ),
                (f"1 - idmark_scrape_success{{{HOST}}}", "{{instance}} scrape failed"),
                width=8,
            )
        )
        .with_panel(
            graph(
                "Scrapes",
                "How long it takes to read the kernel for a scrape.",
                "s",
                (f"idmark_scrape_duration_seconds{{{HOST}}}", "{{instance}}"),
                width=8,
            )
        )
        .with_panel(
            graph(
                "Martian sources",
                "IPv4 packets that rp_filter or an impossible source stopped, on the whole machine.",
                "pps",
                (f"rate(idmark_martian_source_packets_total{{{HOST}}}[$__rate_interval])", "{{instance}}"),
                width=8,
            )
        )
    )


def text() -> str:
    """The dashboard as Grafana imports it; its panels are numbered."""
    built = build().build()
    for number, panel in enumerate(built.panels or (), start=1):
        panel.id_val = number
    return JSONEncoder(sort_keys=True, indent=2).encode(built) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
