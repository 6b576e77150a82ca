"""collector-config/ as files: each is valid, alone and with what it is meant for, and beside a user's own pipelines."""

from __future__ import annotations

import contextlib
import itertools
import json
import pathlib
import re
import time
from collections import Counter
from typing import Any

import pytest
import requests
import yaml

from backends import application
from backends.chain import SERVER
from backends.servers import COLLECTOR_CONFIG, Collector, Jaeger, Prometheus, free_port, plain, validate
from backends.traffic import SlowReader
from otel_tcppktlat.demo.receiver import Receiver
from support.agent import Agent
from telemetry.told import DURATION, eventually

PROMETHEUS_ROUTES = ("prometheus/scrape.yaml", "prometheus/remote-write.yaml", "prometheus/otlp.yaml")
TRACES = ("jaeger.yaml", "tempo.yaml", "busy-hosts.yaml")
VARIABLES = {"VENDOR_OTLP_ENDPOINT": "https://vendor.example", "VENDOR_OTLP_HEADERS": '{api-key: "SECRET"}'}
COMBINATIONS = [
    *([file] for file in (*PROMETHEUS_ROUTES, *TRACES, "vendor.yaml", "vendor-delta.yaml")),
    *([metrics, traces] for metrics in PROMETHEUS_ROUTES for traces in TRACES),
    *([metrics, "vendor-delta.yaml"] for metrics in PROMETHEUS_ROUTES),
    ["prometheus/otlp.yaml", "jaeger.yaml", "persistent-queue.yaml"],
]
NO_COLLECTORS = {"deploy/daemonset.yaml", "grafana/datasources.yaml"}
ALONE = [COLLECTOR_CONFIG / file for combination in COMBINATIONS if len(combination) == 1 for file in combination]


@pytest.mark.parametrize("files", COMBINATIONS, ids="+".join)
def test_each_is_valid(files: list[str]) -> None:
    assert not validate(*files, environment=VARIABLES)


def test_the_daemonsets_configuration_is_valid() -> None:
    manifests = yaml.safe_load_all((COLLECTOR_CONFIG / "deploy/daemonset.yaml").read_text())
    (configuration,) = (one["data"]["config.yaml"] for one in manifests if one["kind"] == "ConfigMap")
    assert not validate(yaml.safe_load(configuration))


def test_every_file_is_tested() -> None:
    named = {file for combination in COMBINATIONS for file in combination} | {"tcppktlat.yaml"}
    there = {str(path.relative_to(COLLECTOR_CONFIG)) for path in COLLECTOR_CONFIG.glob("**/*.yaml")}
    assert there - NO_COLLECTORS == named


@pytest.mark.parametrize("path", ALONE, ids=lambda path: str(path.name))
def test_what_all_have_in_common_is_the_same(path: pathlib.Path) -> None:
    """The receiver and the limiter are written into each, so that each is complete; merged, they must not disagree."""
    fragment = yaml.safe_load((COLLECTOR_CONFIG / "tcppktlat.yaml").read_text())
    configuration = yaml.safe_load(path.read_text())
    assert configuration["receivers"] == fragment["receivers"]
    name = "memory_limiter/tcppktlat"
    assert configuration["processors"][name] == fragment["processors"][name]
    for pipeline in configuration["service"]["pipelines"].values():
        assert pipeline["processors"][0] == name


# Of 0.155, by their manifests in open-telemetry/opentelemetry-collector-releases: what these files name and they lack.
LACKS = {
    "core": {"transform", "cumulativetodelta", "file_storage"},
    "contrib": set(),
    "k8s": {"prometheus", "prometheusremotewrite"},
}


def test_the_readme_says_which_distribution_a_file_needs() -> None:
    rows = re.findall(r"^\| (`[^|]*\.yaml`) \| ([a-z0-9, ]+) \|$", (COLLECTOR_CONFIG / "README.md").read_text(), re.M)
    said = {file: set(names.split(", ")) for files, names in rows for file in re.findall("`([^`]+)`", files)}
    needed = {}
    for path in COLLECTOR_CONFIG.glob("**/*.yaml"):
        file = str(path.relative_to(COLLECTOR_CONFIG))
        if file not in NO_COLLECTORS:
            configuration = yaml.safe_load(path.read_text())
            kinds = ("receivers", "processors", "exporters", "extensions")
            components = {name.partition("/")[0] for kind in kinds for name in configuration.get(kind, {})}
            needed[file] = {name for name, lacking in LACKS.items() if not components & lacking}
    assert said == needed


def users(receiver: Receiver, port: int, logs: pathlib.Path, health: int) -> dict[str, Any]:
    """A configuration such as a user has: a receiver, processors, exporters and an extension of one's own."""
    pipeline = {
        "receivers": ["otlp"],
        "processors": ["memory_limiter", "resource", "batch"],
        "exporters": ["otlphttp/mine"],
    }
    return {
        "extensions": {"health_check": {"endpoint": f"127.0.0.1:{health}"}},
        "receivers": {"otlp": {"protocols": {"grpc": {"endpoint": f"127.0.0.1:{port}"}}}},
        "processors": {
            "memory_limiter": {"check_interval": "1s", "limit_percentage": 80},
            "resource": {"attributes": [{"key": "through", "value": "mine", "action": "insert"}]},
            "batch": {},
        },
        "exporters": {"otlphttp/mine": {"endpoint": receiver.http_endpoint}, "file/mine": {"path": str(logs)}},
        "service": {
            "extensions": ["health_check"],
            "pipelines": {
                "metrics": pipeline,
                "traces": pipeline,
                "logs": {**pipeline, "exporters": ["file/mine"]},
            },
        },
    }


def application_got(receiver: Receiver, logs: pathlib.Path) -> tuple[list[Any], list[Any], list[Any]]:
    """What arrived of the application: points, spans and lines, without ids and times."""
    points = receiver.points(application.COUNTER)
    spans = [one for one in receiver.spans() if one.resource["service.name"] == application.NAME]
    lines = [json.loads(line) for line in logs.read_text().splitlines()] if logs.exists() else []
    return (
        [(one.value, one.attributes, one.resource) for one in points],
        [(one.name, one.attributes, one.resource) for one in spans],
        [
            (
                record["body"],
                scope["scope"],
                {one["key"]: plain(one["value"]) for one in resource["resource"]["attributes"]},
            )
            for line in lines
            for resource in line["resourceLogs"]
            for scope in resource["scopeLogs"]
            for record in scope["logRecords"]
        ],
    )


def test_the_fragment_beside_a_users_configuration(tmp_path: pathlib.Path) -> None:
    """The user's pipelines deliver what they did without it; the agent's data goes through its own."""
    fragment = yaml.safe_load(
        (COLLECTOR_CONFIG / "tcppktlat.yaml")
        .read_text()
        .replace("your_metrics_exporter", "otlphttp/mine")
        .replace("your_traces_exporter", "otlphttp/mine")
    )
    got = []
    for beside in ([], [fragment]):
        with Receiver() as receiver, contextlib.ExitStack() as stack:
            own_port, port, health = free_port(), free_port(), free_port()
            folder = tmp_path / f"{len(beside)}"
            logs = folder / "logs"
            mine = users(receiver, own_port, logs, health)
            collector = Collector(folder, mine, *beside)
            if not beside:
                collector.ready = f"127.0.0.1:{own_port}"
            stack.enter_context(collector)
            if beside:
                variables = {
                    "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{collector.otlp}",
                    "OTEL_METRIC_EXPORT_INTERVAL": "500",
                }
                agent = stack.enter_context(Agent(folder, ["-v", "-l", str(port)], variables))
                agent.wait_for_stderr("otel-tcppktlat: attached")
                stack.enter_context(SlowReader(b"reader", port)).wait(0.03)
                receiver.wait_for(lambda it: bool(it.points(DURATION)) and bool(it.spans()), 60)
                ours = [one.resource for one in receiver.points(DURATION)] + [one.resource for one in receiver.spans()]
                assert all("through" not in resource for resource in ours)
            application.send(f"127.0.0.1:{own_port}")
            eventually(lambda receiver=receiver, logs=logs: all(application_got(receiver, logs)))  # type: ignore[misc]
            assert requests.get(f"http://127.0.0.1:{health}", timeout=30).ok  # the extension
            assert collector.stop() == 0
            got.append(application_got(receiver, logs))
    assert got[0] == got[1]
    assert [one[2]["through"] for kind in got[1] for one in kind] == ["mine"] * 3


def what_is_missing(tmp_path: pathlib.Path, *files: str | dict[str, Any]) -> set[str]:
    """The names that `otelcol validate` asks for when a user's configuration has these files after it."""
    with Receiver() as receiver:
        mine = users(receiver, free_port(), tmp_path / "logs", free_port())
        return set(re.findall(r"your_\w+_exporter", validate(mine, *files)))


def test_the_fragment_with_busy_hosts_after_it_asks_for_the_metrics_exporter_alone(tmp_path: pathlib.Path) -> None:
    assert what_is_missing(tmp_path, "tcppktlat.yaml", "busy-hosts.yaml") == {"your_metrics_exporter"}


@pytest.mark.parametrize(
    ("filled", "missing"), [*itertools.permutations(("your_metrics_exporter", "your_traces_exporter"))]
)
def test_the_fragment_says_which_name_is_to_be_filled_in(tmp_path: pathlib.Path, filled: str, missing: str) -> None:
    fragment = yaml.safe_load((COLLECTOR_CONFIG / "tcppktlat.yaml").read_text().replace(filled, "otlphttp/mine"))
    assert what_is_missing(tmp_path, fragment) == {missing}


def test_busy_hosts_keep_the_span_of_every_exemplar(tmp_path: pathlib.Path) -> None:
    """Beside it, the sampler of the same Collector's other traces leaves exemplars that point to nothing."""
    sampled = {
        "receivers": {"otlp/tcppktlat": {"protocols": {"grpc": {"endpoint": "${env:TCPPKTLAT_LISTEN}"}}}},
        "processors": {"probabilistic_sampler": {"sampling_percentage": 50}},
        "exporters": {"otlp/sampled": {"endpoint": "${env:SAMPLED}", "tls": {"insecure": True}}},
        "service": {
            "pipelines": {
                "traces": {
                    "receivers": ["otlp/tcppktlat"],
                    "processors": ["probabilistic_sampler"],
                    "exporters": ["otlp/sampled"],
                }
            }
        },
    }
    with contextlib.ExitStack() as stack:
        whole, part = (stack.enter_context(Jaeger(tmp_path / name)) for name in ("whole", "part"))
        prometheus = stack.enter_context(Prometheus(tmp_path))
        environment = {"TRACES_OTLP": whole.otlp, "SAMPLED": part.otlp, "PROMETHEUS_URL": prometheus.url}
        files = ("prometheus/otlp.yaml", "busy-hosts.yaml")
        collector = stack.enter_context(Collector(tmp_path, *files, sampled, environment=environment))
        port, since_unix_s = free_port(), time.time()
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{collector.otlp}", "OTEL_METRIC_EXPORT_INTERVAL": "250"}
        agent = stack.enter_context(Agent(tmp_path, ["-v", "-l", str(port), "--span-rate", "1000"], variables))
        agent.wait_for_stderr("otel-tcppktlat: attached")
        stack.enter_context(SlowReader(b"reader", port)).wait(*[0.05] * 60)
        name = "tcppktlat_receive_queue_duration_seconds"
        eventually(lambda: prometheus.value(f"{name}_count{SERVER}") == 60)
        exemplars = prometheus.exemplars(f"{name}_bucket{SERVER}", since_unix_s)
        ids = {one["labels"]["trace_id"] for one in exemplars}
        assert len(ids) >= 10  # an exemplar an interval at least, of 3 s
        for trace_id in ids:
            eventually(lambda trace_id=trace_id: whole.span(trace_id))  # type: ignore[misc]
        eventually(lambda: any(part.span(trace_id) for trace_id in ids))
        agent.stop()
        assert collector.stop() == 0  # it sends what it still has
        kept = Counter(part.span(trace_id) is not None for trace_id in ids)
        assert kept[True] and kept[False]
