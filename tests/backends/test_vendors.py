"""vendor.yaml and vendor-delta.yaml with the values of vendors.md, against servers with the vendors' demands."""

from __future__ import annotations

import contextlib
import gzip
import pathlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from backends import application, largest
from backends.chain import AGGREGATION
from backends.servers import COLLECTOR_CONFIG, Collector, Prometheus, free_port, validate
from backends.traffic import SlowReader
from backends.vendor import Demands, Vendor
from otel_tcppktlat.buckets import explicit_buckets, exponential_buckets
from otel_tcppktlat.demo.receiver import ServerTls
from support.agent import Agent
from support.certificates import Certificates, make_certificates
from telemetry.told import DURATION, eventually

VENDORS_MD = (COLLECTOR_CONFIG / "vendors.md").read_text()
PREFERENCE = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"
WAITS_S = (0.03, 0.06, 0.12)
# As the vendors document it (vendors.md has the sources); the placeholders are those of vendors.md.
VENDORS = {
    "Datadog": Demands(
        "/v1/metrics",
        "/v1/traces",
        {"dd-api-key": "KEY", "dd-otel-metric-config": '{"resource_attributes_as_tags": true}'},
        "delta",
        most_bytes=512 << 10,
        most_plain_bytes=15 << 20,
    ),
    "Dynatrace": Demands(
        "/api/v2/otlp/v1/metrics",
        "/api/v2/otlp/v1/traces",
        {"Authorization": "Api-Token TOKEN"},
        "delta",
        most_bytes=4_000_000,
        most_plain_bytes=8_000_000,
    ),
    "Elastic": Demands("/_otlp/v1/metrics", "/_otlp/v1/traces", {"Authorization": "ApiKey KEY"}, "delta"),
    "Grafana Cloud": Demands("/otlp/v1/metrics", "/otlp/v1/traces", {"Authorization": "Basic BASE64"}, "cumulative"),
    "Honeycomb": Demands(
        "/v1/metrics",
        "/v1/traces",
        {"X-Honeycomb-Team": "KEY", "X-Honeycomb-Dataset": "tcppktlat"},
        "cumulative",
    ),
    "New Relic": Demands(
        "/v1/metrics",
        "/v1/traces",
        {"api-key": "LICENSE KEY"},
        "delta",
        most_bytes=1_000_000,
        most_plain_bytes=1_000_000,
    ),
    "Splunk": Demands("/v2/datapoint/otlp", "/v2/trace/otlp", {"X-SF-Token": "TOKEN"}, "delta"),
}
CONVERTED = "delta beside Prometheus"  # vendor-delta.yaml
EXPONENTIAL = "delta, exponential"  # as New Relic advises
FORMS = {  # the agent's variables; those of vendors.md, where it has them
    "delta": {PREFERENCE: "delta"},
    "cumulative": {PREFERENCE: "cumulative"},
    EXPONENTIAL: dict(
        re.findall(rf"({PREFERENCE}|{AGGREGATION})=(\w+)", VENDORS_MD[VENDORS_MD.index("**New Relic**") :])
    ),
}


def row_of(vendor: str) -> list[str]:
    """The vendor's cells in vendors.md: name, endpoint, headers, histograms, exemplars."""
    (row,) = re.findall(rf"^\| ({vendor} \[.*) \|$", VENDORS_MD, re.M)
    return str(row).split(" | ")


def variables_of(vendor: str, url: str) -> dict[str, str]:
    """The variables that vendors.md gives for a vendor, with `url` in place of the scheme and host of its addresses."""

    def here(address: str) -> str:
        return url + urlsplit(address).path

    _, endpoint, headers, *_ = row_of(vendor)
    variables = {"VENDOR_OTLP_HEADERS": re.findall(r"`(\{.*\})`", headers)[0]}
    if addresses := re.findall(r"`(https://[^`]+)`", endpoint):
        return variables | {"VENDOR_OTLP_ENDPOINT": here(addresses[0])}
    of_vendor = VENDORS_MD[VENDORS_MD.index(f"**{vendor}**") :]
    for name in ("VENDOR_METRICS_URL", "VENDOR_TRACES_URL"):
        variables[name] = here(re.findall(rf"`{name}=(https://[^`]+)`", of_vendor)[0])
    return variables


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@dataclass
class Told:
    """What the vendors and the Prometheus beside one of them were told, of one port's traffic."""

    vendors: Mapping[str, Vendor]
    prometheus: Prometheus


@pytest.fixture(scope="module")
def told(certificates: Certificates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """An agent for each form of the metrics, with a Collector that hands its data to those of the vendors."""
    root = tmp_path_factory.mktemp("vendors")
    tls = ServerTls(certificates.server_certificate, certificates.server_key)
    with contextlib.ExitStack() as stack:
        prometheus = stack.enter_context(Prometheus(root / "prometheus"))
        vendors: dict[str, Vendor] = {}
        exporters: dict[str, dict[str, Any]] = {form: {} for form in FORMS}

        def add(name: str, known_as: str, form: str, *files: str, **environment: str) -> None:
            vendors[name] = stack.enter_context(Vendor(VENDORS[known_as], tls))
            environment |= {"VENDOR_CA_FILE": str(certificates.ca)}
            environment |= variables_of(known_as, vendors[name].url)
            collector = stack.enter_context(Collector(root / name, *files, environment=environment))
            exporters[form][f"otlp/{len(vendors)}"] = {"endpoint": collector.otlp, "tls": {"insecure": True}}

        for name, demands in VENDORS.items():
            add(name, name, demands.temporality, "vendor.yaml")
        add(EXPONENTIAL, "New Relic", EXPONENTIAL, "vendor.yaml")
        files = ("prometheus/otlp.yaml", "vendor-delta.yaml")
        add(CONVERTED, "New Relic", "cumulative", *files, PROMETHEUS_URL=prometheus.url)
        port = free_port()
        agents = []
        for form, those in exporters.items():
            pipeline = {"receivers": ["otlp/tcppktlat"], "exporters": list(those)}
            distributor = Collector(
                root / form,
                {
                    "receivers": {"otlp/tcppktlat": {"protocols": {"grpc": {"endpoint": "${env:TCPPKTLAT_LISTEN}"}}}},
                    "exporters": those,
                    "service": {"pipelines": {"metrics": pipeline, "traces": pipeline}},
                },
            )
            stack.enter_context(distributor)
            variables = {
                **FORMS[form],
                "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{distributor.otlp}",
                "OTEL_METRIC_EXPORT_INTERVAL": "1000",
            }
            folder = root / f"agent-{form}"
            folder.mkdir()
            agents.append(stack.enter_context(Agent(folder, ["-v", "-l", str(port)], variables)))
        for agent in agents:
            agent.wait_for_stderr("otel-tcppktlat: attached")
        stack.enter_context(SlowReader(b"reader", port)).wait(*WAITS_S)
        yield Told(vendors, prometheus)


def observed(vendor: Vendor) -> int:
    """Waits by the vendor's own reckoning."""
    points = [one for one in vendor.points if one.name == DURATION and one.attributes["tcppktlat.role"] == "server"]
    counts = [one.count or 0 for one in points]
    return sum(counts) if points and points[0].temporality == "delta" else max(counts, default=0)


@pytest.mark.parametrize("name", [*VENDORS, EXPONENTIAL, CONVERTED])
def test_everything_arrives_as_the_vendor_demands(told: Told, name: str) -> None:
    vendor = told.vendors[name]
    eventually(lambda: vendor.refused or observed(vendor) == len(WAITS_S))
    assert not vendor.refused
    exemplars = [one for point in vendor.points for one in point.exemplars]
    eventually(lambda: {one.span_id for one in exemplars} <= {span.span_id for span in vendor.spans})
    slow = [span for span in vendor.spans if span.end_unix_ns - span.start_unix_ns >= WAITS_S[0] * 1e9]
    assert len(slow) >= len(WAITS_S)
    assert {one.span_id for one in exemplars} >= {span.span_id for span in slow}
    kinds = {point.kind for point in vendor.points if point.name == DURATION}
    assert kinds == {"exponential_histogram" if name == EXPONENTIAL else "histogram"}


def test_prometheus_beside_a_delta_only_vendor_gets_totals(told: Told) -> None:
    query = 'tcppktlat_receive_queue_duration_seconds_count{tcppktlat_role="server"}'
    eventually(lambda: told.prometheus.value(query) == len(WAITS_S))


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({}, "at least one endpoint must be specified"),
        ({"VENDOR_OTLP_ENDPOINT": "https://a", "VENDOR_OTLP_HEADERS": "api-key=SECRET"}, "headers"),
        ({"VENDOR_OTLP_ENDPOINT": "https://a", "VENDOR_OTLP_HEADERS": "{api-key: 0123}"}, "headers"),
    ],
)
def test_what_is_missing_or_no_map_is_said(variables: Mapping[str, str], complaint: str) -> None:
    assert complaint in validate("vendor.yaml", environment=variables)


def test_every_address_of_the_table_has_the_vendors_path() -> None:
    """Not only the first of a row, which the other tests take; an ActiveGate puts its environment before it."""
    for vendor, demands in VENDORS.items():
        for address in re.findall(r"`(https://[^`]+)`", row_of(vendor)[1]):
            path = urlsplit(address).path.removeprefix("/e/ENVIRONMENT")
            assert (f"{path}/v1/metrics", f"{path}/v1/traces") == (demands.metrics_path, demands.traces_path), address


@pytest.mark.parametrize("file", ["vendor.yaml", "vendor-delta.yaml"])
def test_the_largest_request_is_within_every_vendors_limit(file: str) -> None:
    configuration = yaml.safe_load((COLLECTOR_CONFIG / file).read_text())
    most = {}
    for name, pipeline in configuration["service"]["pipelines"].items():
        (batch,) = (one for one in pipeline["processors"] if one.startswith("batch/"))
        most[name.partition("/")[0]] = configuration["processors"][batch]["send_batch_max_size"]
    for buckets in (explicit_buckets(), exponential_buckets()):
        largest_bytes = len(gzip.compress(largest.metrics(most["metrics"], buckets), 6))
        assert largest_bytes < min(demands.most_bytes for demands in VENDORS.values())
    assert len(largest.spans(most["traces"])) < min(demands.most_plain_bytes for demands in VENDORS.values())


def test_without_headers_the_collector_says_that_the_vendor_refuses(
    certificates: Certificates, tmp_path: pathlib.Path
) -> None:
    tls = ServerTls(certificates.server_certificate, certificates.server_key)
    with Vendor(VENDORS["New Relic"], tls) as vendor:
        environment = {"VENDOR_OTLP_ENDPOINT": vendor.url, "VENDOR_CA_FILE": str(certificates.ca)}
        with Collector(tmp_path, "vendor.yaml", environment=environment) as collector:
            application.send(collector.otlp)
            eventually(lambda: collector.log.count("401") >= 2)
        assert {one.split(":")[0] for one in vendor.refused} == {"401 /v1/metrics", "401 /v1/traces"}
        assert not vendor.points and not vendor.spans


def test_a_server_with_another_certificate_gets_nothing(certificates: Certificates, tmp_path: pathlib.Path) -> None:
    """VENDOR_CA_FILE is what makes the difference in the tests above."""
    tls = ServerTls(certificates.server_certificate, certificates.server_key)
    with Vendor(VENDORS["Elastic"], tls) as vendor, contextlib.ExitStack() as stack:
        environment = variables_of("Elastic", vendor.url)
        collector = stack.enter_context(Collector(tmp_path, "vendor.yaml", environment=environment))
        port = free_port()
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{collector.otlp}", "OTEL_METRIC_EXPORT_INTERVAL": "500"}
        stack.enter_context(Agent(tmp_path, ["-l", str(port)], variables))
        eventually(lambda: "certificate signed by unknown authority" in collector.log)
        assert not vendor.points and not vendor.refused
