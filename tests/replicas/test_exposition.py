"""The metrics of several replicas on one page."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from loramux.replicas.exposition import merge

PAGE = """\
# HELP loramux_requests_total Answers.
# TYPE loramux_requests_total counter
loramux_requests_total{adapter="a"} %s
# HELP loramux_seconds Time.
# TYPE loramux_seconds histogram
loramux_seconds_bucket{le="1.0"} 2.0
loramux_seconds_bucket{le="+Inf"} 2.0
loramux_seconds_count 2.0
loramux_seconds_sum 1.0
"""


def test_each_sample_says_which_replica_it_is_from() -> None:
    text = merge({"0": PAGE % "3.0", "1": PAGE % "4.0"}).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    requests = {tuple(s.labels.items()): s.value for s in families["loramux_requests"].samples}
    assert requests == {
        (("adapter", "a"), ("replica", "0")): 3.0,
        (("adapter", "a"), ("replica", "1")): 4.0,
    }
    assert families["loramux_seconds"].type == "histogram"
    assert len(families["loramux_seconds"].samples) == 8
    assert text.count("# TYPE loramux_requests_total counter") == 1
