"""vLLM's tracing, for spans of ours: in the scheduler's process vLLM has made OpenTelemetry's provider."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

__all__ = ["open_tracer"]

logger = logging.getLogger("kvbm_vllm")


def open_tracer(vllm_config: Any) -> Tracer | None:
    """Give what makes spans where vLLM runs with ``--otlp-traces-endpoint``; a line says if there is none.

    vLLM sends all spans of its process there, as the variables ``OTEL_…`` say.
    """
    endpoint = vllm_config.observability_config.otlp_traces_endpoint
    if endpoint is None:
        return None
    try:
        from opentelemetry import trace
    except ImportError:
        why = "opentelemetry is not installed: pip install opentelemetry-sdk opentelemetry-exporter-otlp"
    else:
        if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
            logger.info("loads and stores have spans, kvbm.load and kvbm.store, at %s", endpoint)
            return trace.get_tracer("kvbm_vllm")
        why = "vLLM has made no tracer in its scheduler's process"
    logger.warning("vLLM's --otlp-traces-endpoint is set, and loads and stores have no spans: %s", why)
    return None
