"""Spans of loads and stores: of a real engine at a real collector, and of each way that a load can end."""

import logging
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import grpc
import pytest

pytest.importorskip("vllm")
from engines import BLOCK_TOKENS, drain, forget
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.util._once import Once

from kvbm_core import Capabilities, Op, Planner, Reason, TierStatus
from kvbm_core.leader.endings import Took
from kvbm_core.plan import Fill, FillReason, Load, Plan, Store
from kvbm_engine import Spans
from kvbm_engine._spans import MOST_PER_S
from kvbm_vllm._tracing import open_tracer

BLOCKS = 6
BLOCK_BYTES = 3 * 2 * 2 * 32 * BLOCK_TOKENS * 2
"""Of the random Llama: layers, keys and values, heads, their size, tokens, bfloat16."""
ENDPOINT = SimpleNamespace(observability_config=SimpleNamespace(otlp_traces_endpoint="http://collector:4317"))


def sent(digit, *, sampled=True):
    """A trace context as a client sends it."""
    return {"traceparent": f"00-{digit * 32}-{digit * 16}-0{int(sampled)}"}


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans over gRPC, as OpenTelemetry's does."""

    def __init__(self):
        self.spans = []
        self._server = grpc.server(ThreadPoolExecutor(1))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request, context):  # noqa: N802 - gRPC's name.
        scopes = [scope for each in request.resource_spans for scope in each.scope_spans]
        self.spans += [span for scope in scopes for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def of(self, digit):
        """The spans of a trace, by name and tier."""
        return {
            (span.name, of(span).get("kvbm.tier")): span
            for span in self.spans
            if span.trace_id.hex() == digit * 32
        }

    def close(self):
        self._server.stop(0).wait()


def of(span):
    """The attributes of a span or an event."""
    values = {each.key: each.value for each in span.attributes}
    return {
        key: [one.string_value for one in value.array_value.values]
        if value.HasField("array_value")
        else getattr(value, value.WhichOneof("value"))
        for key, value in values.items()
    }


@pytest.fixture
def collector(monkeypatch):
    """A collector, and a process that has no provider of spans but one that an engine makes."""
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER_SET_ONCE", Once())
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "")  # vLLM writes it.
    made = Collector()
    yield made
    made.close()


@pytest.mark.engine
def test_a_collector_gets_loads_and_stores_in_the_traces_of_their_requests(collector, start, llama, tmp_path):
    from vllm import SamplingParams

    tiers = [
        {"backend": "cpu", "capacity": "64MiB"},
        {"backend": "lmdb", "capacity": "64MiB", "path": str(tmp_path / "lmdb")},
    ]
    llm = start(llama, tiers, otlp_traces_endpoint=collector.endpoint, disable_log_stats=False)
    params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    prompt = {"prompt_token_ids": [*range(5, BLOCKS * BLOCK_TOKENS + 10)]}
    began_ns = time.time_ns()
    for number, headers in enumerate((sent("a"), sent("b"), sent("c", sampled=False), None)):
        llm.llm_engine.add_request(str(number), prompt, params, trace_headers=headers)
        drain(llm)
        forget(llm)
    trace.get_tracer_provider().force_flush()
    ended_ns = time.time_ns()
    trace.get_tracer_provider().shutdown()

    first, again = collector.of("a"), collector.of("b")
    assert {*first} == {("llm_request", None), ("kvbm.store", "cpu"), ("kvbm.store", "lmdb")}
    assert {*again} == {("llm_request", None), ("kvbm.load", None)}
    assert collector.of("c") == {}
    [alone] = [each for each in collector.spans if each.name == "kvbm.load" and not each.parent_span_id]
    for (_, tier), span in first.items():
        if tier:
            assert of(span) == {
                "kvbm.tier": tier, "kvbm.outcome": "stored", "kvbm.blocks": BLOCKS,
                "kvbm.bytes": BLOCKS * BLOCK_BYTES,
            }  # fmt: skip
    load = again["kvbm.load", None]
    assert load.parent_span_id.hex() == "b" * 16
    for each in (load, alone):
        about = of(each)
        assert about.pop("gen_ai.request.id")[0] == ("1" if each is load else "3")
        assert about == {
            "kvbm.outcome": "loaded", "kvbm.blocks": BLOCKS, "kvbm.bytes": BLOCKS * BLOCK_BYTES,
            "kvbm.tokens": BLOCKS * BLOCK_TOKENS, "kvbm.tiers": ["cpu"],
        }  # fmt: skip
        assert [(event.name, of(event).get("kvbm.tier")) for event in each.events] == [
            ("planned", None), ("ended", "cpu"),
        ]  # fmt: skip
        times = [each.start_time_unix_nano, *(e.time_unix_nano for e in each.events), each.end_time_unix_nano]
        assert [began_ns, *times, ended_ns] == sorted([began_ns, *times, ended_ns])


# Step by step, without an engine.


class Traced:
    """Spans over two tiers of 100 bytes a block, and what came of them."""

    def __init__(self):
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        can = Capabilities(capacity_bytes=1 << 20)
        self.planner = Planner([[TierStatus(name, can, [], (128,), (100,)) for name in ("cpu", "disk")]])
        self.spans = Spans(provider.get_tracer("test"), self.planner.tiers)

    def load(self, *loads, name="a", headers=None, turn_s=1.0, planned_s=3.0):
        self.spans.asked(name, turn_s)
        self.spans.asked(name, planned_s)
        request = SimpleNamespace(request_id=name, trace_headers=headers)
        self.spans.admitted(request, 64, planned_s)
        self.spans.planned(Plan(loads=[*loads]))

    def stored(self, op, now_s=9.0, *, tier=1, failures=(), is_last=True):
        state = self.planner.tiers[tier]
        self.spans.ended([Took(Op.STORE, state, 2.0, op, dict(failures), is_last)], now_s)

    def told(self):
        spans = self._exporter.get_finished_spans()
        self._exporter.clear()
        assert "0 requests loading, 0 stores" in repr(self.spans), "something is remembered for ever"
        return spans


def part(op, tier, blocks, request="a"):
    return Load(op, request, tier, -1, [b"%d" % at for at in range(blocks)], [*range(blocks)])


@pytest.mark.parametrize(
    ("failures", "about"),
    [
        ({}, {"kvbm.outcome": "loaded", "kvbm.blocks": 7, "kvbm.bytes": 700}),
        (
            {0: Reason.CORRUPT, 1: Reason.DEADLINE, 2: Reason.DEADLINE},
            {"kvbm.outcome": "in part", "kvbm.blocks": 4, "kvbm.bytes": 400, "kvbm.failed_blocks": 3,
             "kvbm.reason": "deadline"},
        ),
    ],
    ids=["well", "in part"],
)  # fmt: skip
def test_a_load_is_one_span_from_its_turn_to_its_last_tier(failures, about):
    made = Traced()
    host, disk = part(1, 0, 4), part(2, 1, 3)
    made.load(host, disk)
    made.spans.loaded(host, {}, 4.0)
    assert made._exporter.get_finished_spans() == ()
    made.spans.loaded(disk, failures, 7.0)
    [span] = made.told()
    common = {"gen_ai.request.id": "a", "kvbm.tokens": 64, "kvbm.tiers": ("cpu", "disk")}
    assert dict(span.attributes) == common | about
    assert (span.end_time - span.start_time) == pytest.approx(6e9)
    moments = [(event.name, (event.timestamp - span.start_time) / 1e9) for event in span.events]
    assert moments == [("planned", 2.0), ("ended", 3.0), ("ended", 6.0)]
    assert span.parent is None


def test_a_load_that_fails_or_whose_request_is_gone_says_so():
    made = Traced()
    one, other = part(1, 1, 2), part(2, 1, 2, "b")
    made.load(one)
    made.spans.loaded(one, dict.fromkeys(range(2), Reason.MISSING), 4.0)
    made.load(other, name="b", headers=sent("d"))
    made.spans.gone("b", 5.0)
    made.spans.loaded(other, {}, 6.0)  # It comes too late for anybody.
    made.spans.asked("c", 1.0)  # It was computed.
    made.spans.gone("c", 2.0)
    failed, aborted = made.told()
    assert [failed.attributes[name] for name in ("kvbm.outcome", "kvbm.reason")] == ["failed", "missing"]
    assert aborted.attributes["kvbm.outcome"] == "aborted"
    assert f"{aborted.parent.span_id:x}" == "d" * 16


def test_a_store_of_several_requests_is_in_the_trace_of_the_first_and_linked_to_the_others():
    made = Traced()
    store = Store(5, [b"1", b"2"], [1, 2], [0, 1])
    for headers in (sent("a"), sent("a"), None, sent("b")):
        made.spans.offered([5], SimpleNamespace(trace_headers=headers))
    made.stored(store, tier=0, is_last=False)
    made.stored(store, failures={1: Reason.FULL})
    made.stored(Fill(6, 0, 1, [b"3"], 0, 0, FillReason.DEMOTION))
    first, second, fill = made.told()
    for span in (first, second):
        assert f"{span.context.trace_id:x}" == "a" * 32
        assert [f"{link.context.trace_id:x}" for link in span.links] == ["b" * 32]
    assert second.attributes["kvbm.outcome"] == "in part"
    assert fill.parent is None
    assert dict(fill.attributes) == {
        "kvbm.outcome": "stored", "kvbm.blocks": 1, "kvbm.tier": "disk", "kvbm.bytes": 100,
        "kvbm.source": "cpu", "kvbm.cause": "demotion",
    }  # fmt: skip


def test_there_are_so_many_spans_a_second_and_no_more():
    made = Traced()
    for number in range(MOST_PER_S + 3):
        made.stored(Store(number, [b"1"], [1], [1]), 9.0)
    made.stored(Store(1, [b"1"], [1], [1]), 10.0)
    *_, last = told = made.told()
    assert len(told) == MOST_PER_S + 1
    assert last.attributes["kvbm.left_out_spans"] == 3


def test_where_tracing_is_off_or_cannot_be_had_there_are_no_spans(collector, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "kvbm_vllm")
    off = SimpleNamespace(observability_config=SimpleNamespace(otlp_traces_endpoint=None))
    assert open_tracer(off) is None
    assert caplog.messages == []
    assert open_tracer(ENDPOINT) is None
    assert "no spans: vLLM has made no tracer in its scheduler's process" in caplog.text
    trace.set_tracer_provider(TracerProvider())
    assert open_tracer(ENDPOINT) is not None
    assert "kvbm.load and kvbm.store, at http://collector:4317" in caplog.text
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    assert open_tracer(ENDPOINT) is None
    assert "no spans: opentelemetry is not installed: pip install opentelemetry-sdk" in caplog.text
