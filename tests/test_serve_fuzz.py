"""Hostile requests: no crash, no 5xx but 503, and afterwards the same answers as before."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.config import SchemathesisConfig

from fuzzing import storm
from serving import FakeEngine, Live, live


def test_a_few_hundred_hostile_requests():
    seen = asyncio.run(storm(400, seed=17))
    statuses = {status for _, status in seen}
    assert sum(seen.values()) == 400 and {200, 400} <= statuses, seen


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(20))
def test_a_hundred_thousand_hostile_requests(seed: int):
    assert sum(asyncio.run(storm(5000, seed)).values()) == 5000


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(FakeEngine()) as made:
        yield made


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_requests_made_from_the_schema(server: Live, path: str):
    config = SchemathesisConfig()
    schema = schemathesis.openapi.from_dict(server.app.openapi(), config=config)
    operation = schema[path]["POST"]

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(case=operation.as_strategy())
    def sent(case: schemathesis.Case) -> None:
        done = case.call(base_url=server.url)
        assert done.status_code < 500 or done.status_code == 503, (case.body, done.text)
        assert str(done.status_code) in operation.definition.raw["responses"] or done.status_code == 200

    sent()
    assert server.ask(max_tokens=4).json()["choices"][0]["text"] == "abca"
