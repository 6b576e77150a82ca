"""The Grafana dashboard's queries, with Grafana's variables filled in as Grafana does for «All»."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from backends.servers import COLLECTOR_CONFIG

DASHBOARD: dict[str, Any] = json.loads((COLLECTOR_CONFIG / "grafana/dashboard.json").read_text())
_VALUES = {"__rate_interval": "10m", "__range": "10m"}


def filled(text: str) -> str:
    """A query as Grafana sends it."""
    everything = {one["name"]: one["allValue"] for one in DASHBOARD["templating"]["list"] if one.get("includeAll")}
    values = {**everything, **_VALUES}
    return re.sub(r"\$(\w+)", lambda match: values[match[1]], text)


def queries() -> Iterator[tuple[str, str, bool]]:
    """(panel's title, PromQL, whether it asks for exemplars) of every query."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], filled(target["expr"]), target.get("exemplar", False)


def label_values() -> Iterator[tuple[str, str]]:
    """(selector, label) of every variable that asks Prometheus for values."""
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert match
            yield filled(match[1]), match[2]
