"""The Grafana dashboard's queries as Grafana sends them: its variables filled in for «All», and its data sources."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from backends.servers import COLLECTOR_CONFIG

DASHBOARD: dict[str, Any] = json.loads((COLLECTOR_CONFIG / "grafana/dashboard.json").read_text())
DATA_SOURCES: list[dict[str, Any]] = yaml.safe_load((COLLECTOR_CONFIG / "grafana/datasources.yaml").read_text())[
    "datasources"
]
GRAFANAS_INTERVAL = "15s"  # of a data source that has no timeInterval
_SECONDS = {"s": 1, "m": 60, "h": 3600}
_MOST_POINTS = 1000  # of a panel; its width in pixels


def seconds(duration: str) -> int:
    """Grafana's notation, as 15s, 1m."""
    return int(duration[:-1]) * _SECONDS[duration[-1]]


def rate_interval_s(least_step: str) -> int:
    """$__rate_interval of a query with this minimum step ("" if it has none), at the dashboard's time range.

    The data source is a user's own, without timeInterval. Source: Grafana's documentation of the Prometheus data
    source: "max($__interval + Scrape interval, 4 * Scrape interval)"; a query's minimum step is its scrape interval.
    """
    scrape_s = seconds(least_step or GRAFANAS_INTERVAL)
    interval_s = max(range_s() // _MOST_POINTS, scrape_s)
    return max(interval_s + scrape_s, 4 * scrape_s)


def range_s() -> int:
    """The time range that the dashboard opens with."""
    assert DASHBOARD["time"]["to"] == "now"
    return seconds(DASHBOARD["time"]["from"].removeprefix("now-"))


def filled(text: str, least_step: str = "") -> str:
    """A query as Grafana sends it."""
    values = {one["name"]: one["allValue"] for one in DASHBOARD["templating"]["list"] if one.get("includeAll")}
    values |= {"__rate_interval": f"{rate_interval_s(least_step)}s", "__range": f"{range_s()}s"}
    return re.sub(r"\$(\w+)", lambda match: values[match[1]], text)


def queries() -> Iterator[tuple[str, str, bool]]:
    """(panel's title, PromQL, whether it asks for exemplars) of every query."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], filled(target["expr"], target.get("interval", "")), target.get("exemplar", False)


def label_values() -> Iterator[tuple[str, str]]:
    """(selector, label) of every variable that asks Prometheus for values."""
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert match
            yield filled(match[1]), match[2]
