"""What Prometheus sees of a server."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mftmerge.serve.engine import Engine

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mftmerge_requests", "Requests by model and status code.", ["model", "status"], registry=self.registry
        )
        self.read = Counter("mftmerge_prompt_tokens", "Tokens of prompts.", ["model"], registry=self.registry)
        self.written = Counter("mftmerge_completion_tokens", "Tokens of answers.", ["model"], registry=self.registry)
        self.first = Histogram(
            "mftmerge_first_token_seconds", "From request to first token.", registry=self.registry, buckets=SECONDS
        )
        self.seconds = Histogram(
            "mftmerge_request_seconds", "From request to answer.", registry=self.registry, buckets=SECONDS
        )
        for place, (name, what) in enumerate((("running", "being written"), ("waiting", "that wait"))):
            gauge = Gauge(f"mftmerge_answers_{name}", f"Answers {what}.", registry=self.registry)
            gauge.set_function(partial(_load, engine, place))

    def text(self) -> Iterator[bytes]:
        """The page for Prometheus."""
        yield generate_latest(self.registry)


def _load(engine: Engine, place: int) -> float:
    return engine.load[place]
