"""Metrics of several processes become one text that Prometheus' own parser reads."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sjd_vllm.deploy.scrape import merged_metrics, texts_by_replica


def text_of(amount: int) -> str:
    registry = CollectorRegistry()
    Counter("sjd_vllm:made", "Things.", ["status"], registry=registry).labels(status="200").inc(amount)
    Gauge("sjd_vllm:window", "A window.", registry=registry).set(2 * amount)
    Histogram("sjd_vllm:seconds", "Time.", buckets=(1, 2), registry=registry).observe(amount)
    return generate_latest(registry).decode()


def test_every_sample_is_kept_and_labelled() -> None:
    text = merged_metrics({"one": text_of(1), "two": text_of(5)}).decode()
    parsed = text_string_to_metric_families(text)
    families = {family.name: family for family in parsed if not family.name.endswith("_created")}
    assert set(families) == {"sjd_vllm:made", "sjd_vllm:window", "sjd_vllm:seconds"}
    assert families["sjd_vllm:made"].type == "counter"
    found = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert found["sjd_vllm:made_total", (("replica", "one"), ("status", "200"))] == 1
    assert found["sjd_vllm:made_total", (("replica", "two"), ("status", "200"))] == 5
    assert found["sjd_vllm:window", (("replica", "two"),)] == 10
    assert found["sjd_vllm:seconds_bucket", (("le", "2.0"), ("replica", "one"))] == 1
    assert found["sjd_vllm:seconds_bucket", (("le", "2.0"), ("replica", "two"))] == 0
    assert text.count("# TYPE sjd_vllm:made_total counter") == 1
    assert len(found) == 2 * (1 + 1 + 5)


def test_replicas_that_have_just_died_are_left_out() -> None:
    assert texts_by_replica([("one", "text"), RuntimeError("dead"), ("two", "")]) == {"one": "text", "two": ""}
