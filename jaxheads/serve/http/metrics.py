"""What Prometheus is told."""

from collections.abc import Iterator

from prometheus_client import (
  CollectorRegistry,
  Counter,
  Histogram,
  generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from jaxheads.serve.engine import EngineStats

_SECONDS = (
  *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
  *(1, 2.5, 5, 10, 30, 60),
)


class Metrics(Collector):
  """The numbers of one server.

  Attributes:
    requests: Requests for answers, by outcome: "ok", "invalid", "busy",
      "draining", "cancelled" (the client left), "timeout" or "error".
    stats: The engine's own numbers; None leaves them out.
  """

  def __init__(self) -> None:
    self._registry = CollectorRegistry()
    self.stats: EngineStats | None = None
    self.requests = Counter(
      "jaxheads_requests",
      "Requests for answers, by outcome.",
      ["outcome"],
      registry=self._registry,
    )
    self.prompt_tokens = Counter(
      "jaxheads_prompt_tokens",
      "Tokens of the prompts that the engine took.",
      registry=self._registry,
    )
    self.generated_tokens = Counter(
      "jaxheads_generated_tokens",
      "Tokens that answers were made of.",
      registry=self._registry,
    )
    self.first_token = Histogram(
      "jaxheads_time_to_first_token_seconds",
      "From a request's arrival in the engine to its first token.",
      buckets=_SECONDS,
      registry=self._registry,
    )
    self.inter_token = Histogram(
      "jaxheads_inter_token_seconds",
      "From one token of an answer to the next.",
      buckets=_SECONDS,
      registry=self._registry,
    )
    self._registry.register(self)

  def text(self) -> bytes:
    """The exposition format."""
    return generate_latest(self._registry)

  def clock(self, answers: int, began: float) -> "TokenClock":
    """Times the tokens of a response with so many answers."""
    return TokenClock(self, answers, began)

  def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
    """The engine's numbers, for the registry."""
    stats = self.stats
    if stats is None:
      return
    yield GaugeMetricFamily(
      "jaxheads_queue_length", "Requests that wait.", stats.waiting
    )
    yield GaugeMetricFamily(
      "jaxheads_running", "Requests that run.", stats.running
    )
    pages = GaugeMetricFamily(
      "jaxheads_pages", "Pages of the cache, by state.", labels=["state"]
    )
    pages.add_metric(["used"], stats.pages_used)
    pages.add_metric(["cached"], stats.pages_cached)
    pages.add_metric(["total"], stats.pages_total)
    yield pages
    yield GaugeMetricFamily(
      "jaxheads_failed_replicas",
      "Engines that have failed, while others go on.",
      stats.failed_replicas,
    )
    yield CounterMetricFamily(
      "jaxheads_preemptions",
      "Requests that gave up their pages for a while.",
      stats.preemptions,
    )
    yield CounterMetricFamily(
      "jaxheads_compilations",
      "Programs that the engine compiled.",
      stats.compilations,
    )


class TokenClock:
  """Observes when the tokens of one response come."""

  def __init__(self, metrics: Metrics, answers: int, began: float) -> None:
    self._metrics = metrics
    self._began = began
    self._last: list[float | None] = [None] * answers

  def token(self, index: int, time_s: float) -> None:
    """A token of answer `index` came."""
    last = self._last[index]
    self._metrics.generated_tokens.inc()
    if last is None:
      self._metrics.first_token.observe(time_s - self._began)
    else:
      self._metrics.inter_token.observe(time_s - last)
    self._last[index] = time_s
