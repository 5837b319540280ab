"""The metrics of all replicas in one answer, each sample labelled with its replica."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

LABEL = "replica"


class _Merged:
    """A registry, as `generate_latest` wants one, over texts of several processes."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        """One metric a name, with the samples of all processes."""
        merged: dict[str, Metric] = {}
        for replica, text in self._texts.items():
            for family in text_string_to_metric_families(text):
                metric = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    metric.samples.append(sample._replace(labels={**sample.labels, LABEL: replica}))
        yield from merged.values()


def merged_metrics(texts: Mapping[str, str]) -> bytes:
    """Prometheus' text format of several processes in one; `texts` by the label that each gets."""
    return generate_latest(_Merged(texts))


def texts_by_replica(answers: Iterable[object]) -> dict[str, str]:
    """Of the answers to a broadcast, those that are metrics; a replica that has just died gave an exception."""
    return dict(answer for answer in answers if isinstance(answer, tuple))
