"""Who is measuring: what the user says of himself wins, and a restart is the same instance."""

from __future__ import annotations

import socket
import uuid

import pytest
from opentelemetry.sdk.resources import HOST_NAME, SERVICE_INSTANCE_ID, SERVICE_NAME

from otel_tcppktlat.telemetry.pipeline import make_resource

RESOURCE = "OTEL_RESOURCE_ATTRIBUTES"


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (RESOURCE, "OTEL_SERVICE_NAME", "OTEL_EXPERIMENTAL_RESOURCE_DETECTORS"):
        monkeypatch.delenv(name, raising=False)


def test_by_default() -> None:
    first, second = make_resource().attributes, make_resource().attributes
    assert first[SERVICE_NAME] == "otel-tcppktlat"
    assert first[HOST_NAME] == socket.gethostname()
    assert first[SERVICE_INSTANCE_ID] == second[SERVICE_INSTANCE_ID]
    assert uuid.UUID(str(first[SERVICE_INSTANCE_ID])).version == 5


def test_another_host_is_another_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    here = make_resource().attributes[SERVICE_INSTANCE_ID]
    monkeypatch.setenv(RESOURCE, f"{HOST_NAME}=another")
    there = make_resource().attributes
    assert there[HOST_NAME] == "another"
    assert there[SERVICE_INSTANCE_ID] != here


def test_without_a_detector_of_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPERIMENTAL_RESOURCE_DETECTORS", "otel")
    found = []
    for name in ("one", "another"):
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        found.append(make_resource().attributes[SERVICE_INSTANCE_ID])
    assert found[0] != found[1]


def test_the_users_own_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RESOURCE, f"{SERVICE_INSTANCE_ID}=mine")
    assert make_resource().attributes[SERVICE_INSTANCE_ID] == "mine"
