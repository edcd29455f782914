"""What Prometheus reads. Every metric has two names: `attlas:...`, and vLLM's own `vllm:...`, so that dashboards and alerts made
for vLLM show this server as it stands. Labels are vLLM's: `model_name`, `engine` ("0").

Gauges and counters are read from the engine's statistics when somebody asks; histograms are fed as tokens come.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from attlas.engine.request import EngineStats, Output
from attlas.serve.flight import Flight
from attlas.serve.worker import Observer, Worker

OURS, THEIRS = "attlas:", "vllm:"
LABELS = ["model_name", "engine"]
SHORT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
LONG = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0, 480.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("Seconds from a request's arrival to its first token.", SHORT),
    "time_per_output_token_seconds": ("Seconds between two tokens of an answer.", PER_TOKEN),
    "inter_token_latency_seconds": ("Seconds between two tokens of an answer (newer name of the same).", PER_TOKEN),
    "e2e_request_latency_seconds": ("Seconds from a request's arrival to its last token.", LONG),
    "request_queue_time_seconds": ("Seconds from a request's arrival until it leaves the queue.", LONG),
    "request_prefill_time_seconds": ("Seconds from there to its first token.", LONG),
    "request_decode_time_seconds": ("Seconds from its first token to its last.", LONG),
    "request_inference_time_seconds": ("Seconds from leaving the queue to its last token.", LONG),
    "request_prompt_tokens": ("Prompt tokens of a request.", TOKENS),
    "request_generation_tokens": ("Generated tokens of a request.", TOKENS),
    "request_params_max_tokens": ("The max_tokens of a request.", TOKENS),
    "request_params_n": ("The n of a request.", TOKENS[:5]),
}


class Metrics(Observer):
    """The metrics of one server, in a registry of its own."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.labels = [model_name, "0"]
        self.worker: Worker | None = None
        self.histograms = {
            name: Histogram(OURS + name, text, LABELS, registry=self.registry, buckets=buckets).labels(*self.labels)
            for name, (text, buckets) in HISTOGRAMS.items()
        }
        self.refused = Counter(
            OURS + "requests_refused", "Requests answered with an error, by status.", [*LABELS, "status"], registry=self.registry
        )
        self.lost = Counter(
            OURS + "requests_lost",
            "Requests ended early: abort = the client went or time was up, error = the engine failed.",
            [*LABELS, "reason"],
            registry=self.registry,
        )
        for reason in ("abort", "error"):
            self.lost.labels(*self.labels, reason)
        self.registry.register(_EngineCollector(self))

    # ---- fed by the engine's thread

    def on_output(self, flight: Flight, choice: int, output: Output, now: float) -> None:
        times, seen = flight.times, self.histograms
        if output.token_ids:
            if times.first is None:
                times.first, times.admitted = now, output.admitted or times.arrival
                seen["time_to_first_token_seconds"].observe(now - times.arrival)
                seen["request_queue_time_seconds"].observe(times.admitted - times.arrival)
                seen["request_prefill_time_seconds"].observe(now - times.admitted)
            before = times.newest.get(choice)
            if before is not None:
                gap = (now - before) / len(output.token_ids)
                for _ in output.token_ids:
                    seen["time_per_output_token_seconds"].observe(gap)
                    seen["inter_token_latency_seconds"].observe(gap)
            times.newest[choice] = now
            times.tokens += len(output.token_ids)
        if output.finish_reason is not None and flight.open == {choice}:
            self._finished(flight, now)

    def _finished(self, flight: Flight, now: float) -> None:
        times, params = flight.times, flight.jobs[0].params
        measured: dict[str, float] = {
            "e2e_request_latency_seconds": now - times.arrival,
            "request_prompt_tokens": flight.prompt_tokens,
            "request_generation_tokens": times.tokens,
            "request_params_max_tokens": params.max_tokens,
            "request_params_n": params.n,
        }
        if times.first is not None and times.admitted is not None:
            measured["request_decode_time_seconds"] = now - times.first
            measured["request_inference_time_seconds"] = now - times.admitted
        for name, value in measured.items():
            self.histograms[name].observe(value)

    def on_lost(self, flight: Flight, reason: str) -> None:
        self.lost.labels(*self.labels, reason).inc()

    # ---- asked for

    def refuse(self, status: int) -> None:
        self.refused.labels(*self.labels, str(status)).inc()

    def text(self) -> bytes:
        """All metrics in the text format, each under both names."""
        ours = generate_latest(self.registry).decode()
        return (ours + ours.replace(OURS, THEIRS)).encode()


class _EngineCollector:
    """Gauges and counters as the engine's newest statistics have them."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def collect(self) -> Iterator[Any]:
        worker = self.metrics.worker
        if worker is None:
            return
        for name, text, value in gauges(worker.stats, worker.held):
            yield self._family(GaugeMetricFamily, name, text, value)
        for name, text, value in counters(worker.stats):
            yield self._family(CounterMetricFamily, name, text, value)
        finished = CounterMetricFamily(
            OURS + "request_success", "Answers that ended, by reason.", labels=[*LABELS, "finished_reason"]
        )
        for reason in ("stop", "length", "abort"):
            finished.add_metric([*self.metrics.labels, reason], worker.stats.finished.get(reason, 0))
        yield finished

    def _family(self, kind: Any, name: str, text: str, value: float) -> Any:
        family = kind(OURS + name, text, labels=LABELS)
        family.add_metric(self.metrics.labels, value)
        return family


def usage(stats: EngineStats) -> float:
    """Share of the cache's pages that running sequences hold (0 ... 1)."""
    return stats.cache.used / stats.cache.total if stats.cache is not None and stats.cache.total else 0.0


def gauges(stats: EngineStats, held: int) -> list[tuple[str, str, float]]:
    return [
        ("num_requests_running", "Sequences in the forward of a step.", stats.running),
        ("num_requests_waiting", "Sequences that wait for a place.", max(stats.waiting, held - stats.running - stats.swapped)),
        ("num_requests_swapped", "Sequences whose pages are copied aside.", stats.swapped),
        ("kv_cache_usage_perc", "Share of the cache's pages in use; 1 = all.", usage(stats)),
        ("kv_cache_waste_ratio", "Share of the slots of used pages that hold no token.", getattr(stats.cache, "waste", 0.0)),
    ]


def counters(stats: EngineStats) -> list[tuple[str, str, float]]:
    return [
        ("prompt_tokens", "Tokens of prompts.", stats.prompt_tokens),
        ("generation_tokens", "Tokens of answers.", stats.generated_tokens),
        ("prefix_cache_queries", "Prompt tokens looked up in the cache.", stats.prompt_tokens),
        ("prefix_cache_hits", "Prompt tokens found in the cache.", stats.cached_tokens),
        ("num_preemptions", "Times a running sequence gave up its pages.", stats.preemptions),
        ("spec_decode_num_draft_tokens", "Drafted tokens.", stats.drafted),
        ("spec_decode_num_accepted_tokens", "Drafted tokens that stood.", stats.accepted),
        ("engine_steps", "Forwards.", stats.steps),
        ("engine_step_seconds", "Seconds in forwards.", stats.step_seconds),
    ]
