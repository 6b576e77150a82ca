"""What the command line and the variables may not be: one line on stderr that names it, status 2, and nothing else."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from cli.printed import environment, run
from otel_tcppktlat import __version__
from support.certificates import make_certificates
from support.installed import install, open_folder

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
EXPORT = f"{ENDPOINT}=http://127.0.0.1:9"

# command line (variables first, as a shell takes them): what the line has to name
BAD = {
    "-1": "'-1'",
    "abc": "'abc'",
    "1.5": "MIN_US",
    "1000000000001": "MIN_US",
    "''": "MIN_US",
    "1 2": "2",
    "$'a\\nb'": "MIN_US",
    "1 $'a\\nb'": "unrecognized",
    "1 $'\\xff'": "unrecognized",
    "-p 0": "-p/--pid",
    "-p -5": "-p/--pid",
    "--pid x": "-p/--pid",
    "--pid=99999999": "-p/--pid",
    "-t 0": "-t/--tid",
    "-t \u00b2": "-t/--tid",
    "-l 0": "-l/--lport",
    "-l 70000": "-l/--lport",
    "--lport=": "-l/--lport",
    "-r 65536": "-r/--rport",
    "-r": "-r/--rport",
    "-z": "-z",
    "--nonsense": "--nonsense",
    "--flavour btf": "--flavour",
    "--user no-such-user": "no-such-user",
    "--user root": "root",
    "--user ''": "--user",
    "--user \u00b2": "--user",
    "--user 4294967299999999": "--user",
    "--otlp nonsense": "'nonsense'",
    "--otlp ''": "''",
    "--otlp ftp://host:1": "'ftp://host:1'",
    "--otlp http://": "'http://'",
    "--otlp http://host:0": "'http://host:0'",
    "--otlp http://host:99999": "99999",
    "--otlp http://host:x": "host:x",
    "--otlp 'http://a b:4317'": "a b",
    "--otlp 'http://[::1:4317'": "[::1",
    "--otlp": "--otlp",
    "--attributes pid": "'pid'",
    "--attributes server.port,nonsense": "'nonsense'",
    "--boundaries ''": "--boundaries",
    "--boundaries 1,x": "--boundaries",
    "--boundaries 2,1": "--boundaries",
    "--boundaries 1,1": "--boundaries",
    "--boundaries 0,1": "--boundaries",
    "--boundaries=-1": "--boundaries",
    "--boundaries nan": "--boundaries",
    "--boundaries inf": "--boundaries",
    f"--boundaries {','.join(str(n) for n in range(1, 130))}": "127",
    "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION=base2_exponential_bucket_histogram --boundaries 1":
        "--boundaries",
    "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION=x": "AGGREGATION=x",
    "--series-limit 0": "--series-limit",
    "--series-limit 1000000": "--series-limit",
    "--span-rate -1": "--span-rate",
    "--span-rate nan": "--span-rate",
    "--span-rate x": "--span-rate",
    f"{ENDPOINT}=nonsense://x": ENDPOINT,
    f"{ENDPOINT}=http://": ENDPOINT,
    "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT='foo bar'": "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
    f"{ENDPOINT}=host:4318 OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf": ENDPOINT,
    f"{EXPORT} OTEL_EXPORTER_OTLP_PROTOCOL=http/json": "OTEL_EXPORTER_OTLP_PROTOCOL=http/json",
    f"{EXPORT} OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=x": "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=x",
    f"{EXPORT} OTEL_EXPORTER_OTLP_COMPRESSION=zstd": "OTEL_EXPORTER_OTLP_COMPRESSION=zstd",
    f"{EXPORT} OTEL_EXPORTER_OTLP_METRICS_COMPRESSION=x": "OTEL_EXPORTER_OTLP_METRICS_COMPRESSION=x",
    f"{EXPORT} OTEL_METRIC_EXPORT_INTERVAL=x": "OTEL_METRIC_EXPORT_INTERVAL=x",
    f"{EXPORT} OTEL_METRIC_EXPORT_INTERVAL=0": "OTEL_METRIC_EXPORT_INTERVAL=0",
    f"{EXPORT} OTEL_METRIC_EXPORT_INTERVAL=inf": "OTEL_METRIC_EXPORT_INTERVAL=inf",
    f"{EXPORT} OTEL_METRIC_EXPORT_TIMEOUT=-1": "OTEL_METRIC_EXPORT_TIMEOUT=-1",
    f"{EXPORT} OTEL_EXPORTER_OTLP_TIMEOUT=x": "OTEL_EXPORTER_OTLP_TIMEOUT=x",
    f"{EXPORT} OTEL_EXPORTER_OTLP_TRACES_TIMEOUT=0": "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT=0",
    f"{EXPORT} OTEL_BSP_MAX_QUEUE_SIZE=0": "OTEL_BSP_MAX_QUEUE_SIZE=0",
    f"{EXPORT} OTEL_BSP_MAX_QUEUE_SIZE=x": "OTEL_BSP_MAX_QUEUE_SIZE=x",
    f"{EXPORT} OTEL_BSP_MAX_QUEUE_SIZE=5 OTEL_BSP_MAX_EXPORT_BATCH_SIZE=6": "OTEL_BSP_MAX_EXPORT_BATCH_SIZE=6",
    f"{EXPORT} OTEL_BSP_MAX_EXPORT_BATCH_SIZE=0": "OTEL_BSP_MAX_EXPORT_BATCH_SIZE=0",
    f"{EXPORT} OTEL_BSP_SCHEDULE_DELAY=-1": "OTEL_BSP_SCHEDULE_DELAY=-1",
    f"{EXPORT} OTEL_BSP_EXPORT_TIMEOUT=1s": "OTEL_BSP_EXPORT_TIMEOUT=1s",
    f"{EXPORT} OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT=x": "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT=x",
    f"{EXPORT} OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT=-1": "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT=-1",
    f"{EXPORT} OTEL_TRACES_SAMPLER=sometimes": "OTEL_TRACES_SAMPLER=sometimes",
    f"{EXPORT} OTEL_TRACES_SAMPLER=traceidratio OTEL_TRACES_SAMPLER_ARG=2": "OTEL_TRACES_SAMPLER_ARG=2",
    f"{EXPORT} OTEL_METRICS_EXEMPLAR_FILTER=x": "OTEL_METRICS_EXEMPLAR_FILTER=x",
    f"{EXPORT} OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE=x": "TEMPORALITY_PREFERENCE=x",
    f"{EXPORT} OTEL_EXPORTER_OTLP_HEADERS=a=b,Authorization:x": "OTEL_EXPORTER_OTLP_HEADERS: entry 2",
    f"{EXPORT} OTEL_EXPORTER_OTLP_TRACES_HEADERS=a=b%0A.c": "OTEL_EXPORTER_OTLP_TRACES_HEADERS: entry 1",
    "OTEL_METRICS_EXPORTER=nonsense": "OTEL_METRICS_EXPORTER=nonsense",
    "OTEL_TRACES_EXPORTER=nonsense": "OTEL_TRACES_EXPORTER=nonsense",
    "OTEL_METRICS_EXPORTER=otlp,console": "OTEL_METRICS_EXPORTER",
    f"{EXPORT} OTEL_EXPORTER_OTLP_CERTIFICATE=/no/such/file": 
        "OTEL_EXPORTER_OTLP_CERTIFICATE: cannot read /no/such/file",
    f"{EXPORT} OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY=/no/such/file":
        "OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY: cannot read /no/such/file",
    f"{ENDPOINT}=https://h OTEL_EXPORTER_OTLP_METRICS_CERTIFICATE=/proc": "OTEL_EXPORTER_OTLP_METRICS_CERTIFICATE",
    f"{ENDPOINT}=https://h OTEL_EXPORTER_OTLP_CERTIFICATE=/etc/passwd": "OTEL_EXPORTER_OTLP_CERTIFICATE",
    f"{ENDPOINT}=https://h OTEL_EXPORTER_OTLP_CLIENT_KEY=KEY": "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE is not",
    f"{ENDPOINT}=https://h OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE=CERT": "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE",
    f"{ENDPOINT}=https://h OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE=CERT OTEL_EXPORTER_OTLP_CLIENT_KEY=OTHER":
        "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE",
    f"{ENDPOINT}=https://h OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf REQUESTS_CA_BUNDLE=/no/such/file":
        "REQUESTS_CA_BUNDLE",
    f"{ENDPOINT}=https://h GRPC_DEFAULT_SSL_ROOTS_FILE_PATH=/no/such/file": "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
}  # fmt: skip


def _run(command: str) -> subprocess.CompletedProcess[str]:
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command.replace('&', '')}"], capture_output=True, check=True
    ).stdout
    split = [os.fsdecode(word) for word in words.split(b"\0")[:-1]]
    variables: dict[str, str] = {}
    while split and "=" in split[0] and not split[0].startswith("-"):
        name, _, value = split.pop(0).partition("=")
        variables[name] = value
    return run(*split, variables=variables)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """All of them, a few at a time."""
    made = make_certificates(tmp_path_factory.mktemp("made"))
    files = {"KEY": made.client_key, "CERT": made.client_certificate, "OTHER": made.server_key}
    with ThreadPoolExecutor(4) as pool:

        def start(command: str) -> Future[subprocess.CompletedProcess[str]]:
            for name, path in files.items():
                command = command.replace(f"={name} ", f"={path} ").removesuffix(f"={name}") + (
                    f"={path}" if command.endswith(f"={name}") else ""
                )
            return pool.submit(_run, command)

        yield {command: start(command) for command in BAD}


@pytest.mark.parametrize("command", BAD)
def test_bad_input(results: dict[str, Future[subprocess.CompletedProcess[str]]], command: str) -> None:
    done = results[command].result()
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.endswith("\n"), done.stderr
    assert done.stderr.startswith("otel-tcppktlat: ")
    assert BAD[command] in done.stderr
    assert done.returncode == 2


@pytest.mark.parametrize("option", ["-?", "--help", "-h", "--usage", "-V", "--version"])
def test_help(option: str) -> None:
    done = run(option)
    assert (done.returncode, done.stderr) == (0, "")
    if "ersion" in option or option == "-V":
        assert done.stdout == f"otel-tcppktlat {__version__}\n"
        return
    for text in ("-p", "-t", "-l", "-r", "-T", "-w", "-v", "-?", "--usage", "-V", "MIN_US", "--otlp", "--span-rate"):
        assert text in done.stdout
    long_forms = ("--pid", "--tid", "--lport", "--rport", "--timestamp", "--wide", "--verbose", "--help", "--version")
    assert option == "--usage" or all(name in done.stdout for name in long_forms)


def test_without_privilege() -> None:
    """One line that says what it takes; and --help still helps."""
    with open_folder() as folder:
        installed = install(folder)

        def as_nobody(*arguments: str) -> subprocess.CompletedProcess[str]:
            user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
            return subprocess.run(
                [*user, "/usr/bin/python3", "-m", "otel_tcppktlat", *arguments],
                env={**environment(), **installed},
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=60,
            )

        done = as_nobody()
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert "root" in done.stderr
        assert as_nobody("--usage").returncode == 0
        assert as_nobody("-p", "0").returncode == 2
