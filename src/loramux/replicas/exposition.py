"""One page of Prometheus metrics from the pages of all replicas: each sample says which it is from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

LABEL = "replica"


class _Pages:
    """A collector of samples that were collected elsewhere."""

    def __init__(self, pages: Mapping[str, str]) -> None:
        self._pages = pages

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for replica, page in self._pages.items():
            for family in text_string_to_metric_families(page):
                merged = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    merged.samples.append(sample._replace(labels={**sample.labels, LABEL: replica}))
        yield from families.values()


def merge(pages: Mapping[str, str]) -> bytes:
    """The exposition of replica -> its exposition, with the label `replica` added."""
    registry = CollectorRegistry()
    registry.register(_Pages(pages))
    return generate_latest(registry)
