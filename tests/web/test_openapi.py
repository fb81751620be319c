"""The API keeps to its own OpenAPI document, whatever it is sent: it never fails, and answers in no other form."""

import tempfile
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from simpletuner.server.app import create_app
from simpletuner.server.guard import RAW_BODIES, Access
from simpletuner.server.roots import Roots

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]
schemathesis.serializer.alias("application/zip", "application/octet-stream")
WORKSPACE = tempfile.TemporaryDirectory(prefix="simpletuner-openapi-")
"""Nothing can be trained in it: a run that is started fails at its configuration."""
SCHEMA = schemathesis.openapi.from_asgi(
    "/api/openapi.json",
    # The name that schemathesis calls every application by.
    create_app(Roots(Path(WORKSPACE.name).resolve()), Access(hosts=frozenset({"testserver"}))),
).exclude(path="/api/run/events")
"""All but the stream, which never ends; it has tests of its own."""


@pytest.mark.slow
@SCHEMA.parametrize()
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much, HealthCheck.too_slow],
)
def test_answers_keep_to_the_document(case: schemathesis.Case) -> None:
    checks = list(CHECKS)
    if any(case.path == path for _, path in RAW_BODIES):
        # What a form could send is refused before anything asks whether there is such a method.
        checks.remove(unsupported_method)
    case.call_and_validate(checks=checks, timeout=20)
