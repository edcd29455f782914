"""What people and dashboards look at: metrics, the state of the engine, the page."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from attlas.serve.load import load
from attlas.serve.options import ServeOptions
from attlas.serve.overview import page_cells
from serving import NAME, FakeEngine, Live, live

LABELS = {"model_name": NAME, "engine": "0"}


def samples(server: Live) -> dict[str, float]:
    """Name and further labels -> value."""
    found = {}
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for s in family.samples:
            assert all(s.labels[name] == value for name, value in LABELS.items()), s
            rest = {name: value for name, value in s.labels.items() if name not in LABELS}
            found[s.name + "".join(f" {name}={value}" for name, value in sorted(rest.items()))] = s.value
    return found


def test_metrics_count_what_happened_under_both_names():
    with live(FakeEngine(rows=2)) as server:
        assert server.ask(max_tokens=7, n=3).is_success and server.ask(max_tokens=50, stop="ca").is_success
        assert server.ask(n=0).status_code == 400
        server.until_idle()
        found = samples(server)
        want = {
            "prompt_tokens_total": 6,
            "generation_tokens_total": 3 * 7 + 4,
            "request_success_total finished_reason=length": 3,
            "request_success_total finished_reason=stop": 1,
            "num_requests_running": 0,
            "num_requests_waiting": 0,
            "time_to_first_token_seconds_count": 2,
            "e2e_request_latency_seconds_count": 2,
            "time_per_output_token_seconds_count": 3 * 6 + 3,
            "inter_token_latency_seconds_count": 3 * 6 + 3,
            "request_queue_time_seconds_count": 2,
            "request_prefill_time_seconds_count": 2,
            "request_decode_time_seconds_count": 2,
            "request_inference_time_seconds_count": 2,
            "request_params_max_tokens_sum": 57,
            "request_params_n_sum": 4,
            "request_prompt_tokens_sum": 6,
            "request_generation_tokens_sum": 25,
            "requests_refused_total status=400": 1,
        }
        for name, value in want.items():
            assert found[f"vllm:{name}"] == found[f"attlas:{name}"] == value, name
        whole = found["vllm:e2e_request_latency_seconds_sum"]
        parts = ("queue", "prefill", "decode")
        assert sum(found[f"vllm:request_{part}_time_seconds_sum"] for part in parts) == pytest.approx(whole)
        for name in ("kv_cache_usage_perc", "prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total"):
            assert f"vllm:{name}" in found


def test_metrics_while_requests_run_and_wait():
    engine = FakeEngine(rows=2)
    with live(engine) as server, httpx.Client(timeout=30) as client:
        body = {"prompt": "abc", "max_tokens": 40, "n": 5, "stream": True}
        engine.seconds = 0.02
        with client.stream("POST", f"{server.url}/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            found = samples(server)
            assert (found["vllm:num_requests_running"], found["vllm:num_requests_waiting"]) == (2, 3)
            assert found["vllm:kv_cache_usage_perc"] == 1.0
            (request,) = server.get("/v1/engine").json()["requests"]
            assert request["answers"] == 5 and request["first_token"] and request["tokens"] >= 2
        server.until_idle()
        assert samples(server)["vllm:requests_lost_total reason=abort"] == 1


@pytest.fixture(scope="module")
def real() -> Iterator[Live]:
    options = ServeOptions(max_len=128, max_running=3, page_size=8)
    with live(served=load(options), keys=("one", "two")) as made:
        yield made


def test_the_state_of_a_real_engine_shows_only_what_is_the_keys_own(real: Live):
    keys = {key: {"Authorization": f"Bearer {key}"} for key in ("one", "two")}
    body = {"prompt": "a beginning that is shared, ", "max_tokens": 3, "ignore_eos": True}
    first, second = (real.post("/v1/completions", json=body, headers=keys["one"]).json() for _ in range(2))
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 24
    other = real.post("/v1/completions", json=body, headers=keys["two"]).json()
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0, "another key's prompt was found"
    real.post("/v1/completions", json={**body, "cache_salt": "x"}, headers=keys["one"])
    trees = {key: real.get("/v1/engine", headers=headers).json()["tree"] for key, headers in keys.items()}
    assert len(trees["one"]) == 2 * len(trees["two"]) > 0
    told = real.get("/v1/engine", headers=keys["one"]).json()
    assert len(told["pages"]) == told["stats"]["cache"]["total"] == 48 and told["pages_per_cell"] == 1
    assert told["pages"].count("c") == told["stats"]["cache"]["cached"] > 0
    assert told["stats"]["hit_rate"] == pytest.approx(24 / (4 * 28))
    assert "beginning" not in str(told)


def test_page_cells():
    assert page_cells([-1, 0, 1, 2, 30]) == (".c129", 1)
    cells, each = page_cells([-1] * 40_000 + [1])
    assert each == 3 and len(cells) == 13_334 and cells[-1] == "1"
    assert page_cells([]) == ("", 1)


def test_the_page_is_self_contained_and_builds_nothing_from_text(real: Live):
    done = real.get("/", headers={"Authorization": "Bearer one"})
    assert done.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in done.headers["content-security-policy"]
    addresses = set(re.findall(r"https?://[^\"' ]+", done.text)) - {"http://www.w3.org/2000/svg"}
    assert not addresses and " src=" not in done.text and "<link" not in done.text
    assert "innerHTML" not in done.text and "document.write" not in done.text
    assert 'fetch("/v1/engine"' in done.text
