"""What a server's `/metrics` answers, taken apart: the one place that reads Prometheus's text format."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from kvbm_metrics._table import METRICS, Kind, Metric

__all__ = ["Page", "Sample", "read_page"]

_NAME: Final = re.compile(r"(?:\w+[:_])?kvbm_(\w+)")
"""An engine puts a prefix before the names; some releases write vLLM's colon as an underscore."""
_EXPORTED: Final[Mapping[str, Metric]] = {
    f"{metric.exported('')}{'_bucket' if metric.kind is Kind.HISTOGRAM else ''}": metric
    for metric in METRICS.values()
}
"""Of histograms the buckets alone are used."""


class Sample(NamedTuple):
    """One number."""

    name: str
    """As the server writes it."""
    labels: Mapping[str, str]
    value: float
    """Finite."""
    metric: Metric | None
    """The row of our table that it is of; None: it is another's, or a histogram's sum or count."""


class Page(NamedTuple):
    """All that a server said at one moment."""

    samples: list[Sample]
    has_ours: bool
    """True if metrics of ours are there, be it without a number yet."""


def read_page(text: str) -> Page:
    """Take apart what a server's `/metrics` answers.

    Raises:
        ValueError: The text is something else.
    """
    samples, has_ours = [], False
    try:
        for family in text_string_to_metric_families(text):
            has_ours = has_ours or _NAME.fullmatch(family.name) is not None
            for name, labels, value, *_ in family.samples:
                found = _NAME.fullmatch(name)
                if math.isfinite(value):
                    samples.append(Sample(name, labels, value, _EXPORTED.get(found[1]) if found else None))
    except (KeyError, IndexError) as error:  # Of a text that only begins like metrics.
        raise ValueError(f"the text is no metrics ({error!r})") from error
    return Page(samples, has_ours)
