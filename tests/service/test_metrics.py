"""Distributions count as prometheus_client's own histograms do."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics
from prometheus_client.exposition import generate_latest

from expertd.metrics.distribution import Distribution
from expertd.metrics.registry import SECONDS

VALUES = st.one_of(st.sampled_from(SECONDS), st.floats(0, 1e3))


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), VALUES), max_size=30))
def test_the_exposition_is_the_librarys(values: list[tuple[str, float]]) -> None:
    disable_created_metrics()
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    histogram = Histogram("x_seconds", "Text.", ("name",), buckets=SECONDS, registry=theirs)
    distribution = Distribution("x_seconds", "Text.", SECONDS, ("name",))
    ours.register(distribution)
    for name, value in values:
        histogram.labels(name).observe(value)
        distribution.observe([value], name)
    assert generate_latest(ours) == generate_latest(theirs)


def test_one_without_labels_is_there_before_its_first_value() -> None:
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    Histogram("x", "Text.", buckets=(1, 2), registry=theirs)
    ours.register(Distribution("x", "Text.", (1.0, 2.0)))
    assert generate_latest(ours) == generate_latest(theirs)


def test_threads_lose_no_value() -> None:
    distribution = Distribution("x", "Text.", (1.0, 2.0), ("name",))
    work = lambda: [distribution.observe([1.5], "a") for _ in range(5000)]  # noqa: E731
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (family,) = distribution.collect()
    found = {(sample.name, sample.labels.get("le")): sample.value for sample in family.samples}
    assert found["x_count", None] == found["x_bucket", "2.0"] == 20000
    assert (found["x_bucket", "1.0"], found["x_sum", None]) == (0, 30000)
