"""Trace files: what is read, what is refused by line, and the log that the recorder writes."""

import gzip
import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbm_core import ConfigError, StackConfig, load_config
from kvbm_core.groups import KvGroup
from kvbm_core.registry import Registry
from kvbm_engine import Recorder, check_record
from kvbm_replay import Course, generate
from kvbm_replay._course import Kind, read_events
from kvbm_replay._driver import replay
from kvbm_replay._layout import read_layout
from kvbm_replay._machine import Machine
from kvbm_replay._reader import read_trace, write_trace
from kvbm_replay._reference import lru_hits, reuse_hits

KEYS = (
    "timestamp", "input_length", "output_length", "engine_blocks", "hash_ids", "kvbm_log", "run",
    "block_tokens", "token_bytes", "lost", "looks", "stores", "turned", "groups",
)  # fmt: skip
VALUES = st.one_of(
    st.integers(-2, 2000), st.integers(), st.floats(allow_nan=False), st.none(), st.text(max_size=3),
    st.lists(st.integers(-3, 3) | st.integers(), max_size=5),
    st.lists(st.tuples(*[st.integers(0, 600)] * 3), max_size=3),
    st.lists(st.tuples(*[st.integers(0, 600)] * 2)),
)  # fmt: skip


def line_of(keys):
    return json.dumps({"timestamp": 1, "input_length": 600, "hash_ids": [1, 2], **keys}).encode()


LINES = st.binary(max_size=60) | st.builds(line_of, st.dictionaries(st.sampled_from(KEYS), VALUES))
TIERS = {"tiers": [{"backend": "cpu", "capacity": "1GiB"}]}
REQUEST = '{"timestamp": 5000, "input_length": 1030, "output_length": 3, "hash_ids": [1, 2, 3]}'
HEADER = '{"kvbm_log": 1, "run": "a", "block_tokens": 16, "token_bytes": 100}'
HEADER_2 = (
    '{"kvbm_log": 2, "run": "a", "block_tokens": 16, "token_bytes": 100, "groups": ['
    '{"block_tokens": 16, "block_bytes": 800, "rule": "all", "rule_tokens": 0}, '
    '{"block_tokens": 16, "block_bytes": 800, "rule": "window", "rule_tokens": 24}]}'
)
ROW_2 = (
    '{"timestamp": 0.008, "input_length": 40, "output_length": 1, "engine_blocks": 0, '
    '"looks": [[9, 0, 40]], "stores": [[20, 32]], "hash_ids": [7, 8]}'
)


@pytest.fixture
def written(tmp_path):
    """Write lines into a file; give its path."""

    def write(*lines, name="trace"):
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


def test_mooncakes_format_has_blocks_of_512_and_no_short_one(written):
    first = '{"timestamp": 0, "input_length": 512, "output_length": 9, "hash_ids": [1], "more": true}'
    trace = read_trace([written(REQUEST, "", first)])
    assert trace.block_tokens == 512
    assert [(each.at_s, each.blocks, each.asked, each.answer) for each in trace.requests] == [
        (0.0, [1], 1, []),
        (5.0, [1, 2], 2, []),
    ]
    assert trace.token_bytes is None


def test_a_packed_file_is_read(written, tmp_path):
    path = tmp_path / "trace.gz"
    path.write_bytes(gzip.compress(REQUEST.encode()))
    assert len(read_trace([path]).requests) == 1
    path.write_bytes(gzip.compress(REQUEST.encode())[:-9])
    with pytest.raises(ConfigError, match=r"trace.gz: it is damaged"):
        read_trace([path])


def test_a_log_has_the_blocks_of_answers_and_what_the_engine_had(written):
    row = (
        '{"timestamp": 1, "input_length": 32, "output_length": 20, "engine_blocks": 1, "hash_ids": [7, 8, 9]}'
    )
    trace = read_trace([written(HEADER, row, '{"lost": 2}')])
    [request] = trace.requests
    # An engine computes the last token of a prompt itself, so the block that ends with it is not asked for.
    assert (request.blocks, request.answer, request.asked, request.engine_blocks) == ([7, 8], [9], 1, 1)
    assert (trace.block_tokens, trace.token_bytes, trace.lost) == (16, 100, 2)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["{"], "trace:1: not a line of a trace"),
        ([REQUEST, "[]"], "trace:2: not a line of a trace: .*write one JSON object a line"),
        ([REQUEST, REQUEST.replace("1030", '"x"')], "trace:2: input_length: expected `int`, got `str`"),
        (
            [REQUEST, REQUEST.replace("[1, 2, 3]", "[1, null]")],
            r"trace:2: hash_ids\[1\]: expected `int`, got `null`",
        ),
        (['{"input_length": 3, "hash_ids": []}'], "trace:1: no timestamp; a request has timestamp, input_"),
        (['{"timestamp": 0, "input_length": 3}'], "trace:1: no hash_ids"),
        ([REQUEST.replace("1030", "9999")], "trace:1: hash_ids: 3; an input_length of 9999 has 19 blocks"),
        ([""], "trace: no requests"),
        ([HEADER], "trace: no requests"),
        ([HEADER.replace("1,", "3,", 1)], "trace:1: kvbm_log: 3; this release reads versions 1 and 2"),
        (
            [HEADER.replace("16,", '16, "groups": [{}],')],
            r"trace:1: groups\[0\]: object missing required field",
        ),
        ([HEADER_2.replace("window", "wall")], r"trace:1: groups\[1\].rule: invalid enum value 'wall'"),
        ([HEADER_2.replace("24", "0")], "trace:1: groups: a window of 0 rule_tokens"),
        ([HEADER_2.replace("16,", "8,", 1)], "trace:1: block_tokens: 8; write the greatest common divisor"),
        ([HEADER_2, ROW_2.replace("[9, 0, 40]", "[7, 0, 40]")], "trace:2: looks, stores: moments .8, 7, 20"),
        ([HEADER_2, ROW_2.replace("[20,", "[8,")], "trace:2: looks, stores: moments .8, 9, 8"),
        ([HEADER_2, ROW_2.replace("0, 40", "40, 40")], "trace:2: looks: .*write more tokens than the engine"),
        (
            [HEADER_2, ROW_2.replace("32]]", "48]]")],
            "trace:2: hash_ids: 2; looks and stores of 48 tokens need 3",
        ),
        ([HEADER, HEADER], "trace:2: a header must be the first line of its file"),
        (
            [HEADER.replace("16", "0")],
            "trace:1: a header must be the first line of its file, with block_tokens",
        ),
    ],
)
def test_a_wrong_line_is_named(written, lines, said):
    with pytest.raises(ConfigError, match=said):
        read_trace([written(*lines)])


@given(st.lists(LINES, max_size=4), st.booleans())
def test_any_lines_are_a_trace_or_a_mistake_that_is_named(tmp_path_factory, lines, with_groups):
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(b"\n".join([HEADER_2.encode()] * with_groups + lines))
    try:
        trace = read_trace([path])
    except ConfigError as mistake:
        said = str(mistake)
    else:
        check_replay(trace)
        return
    assert said.startswith(str(path))


def check_replay(trace):
    layout = read_layout(TIERS, trace.group_bytes or 512 * 131_072, Registry())
    outcome = replay(trace, layout, Machine())
    assert outcome.requests == len(trace.requests) > 0
    assert lru_hits(trace.requests, 5) <= reuse_hits(trace.requests) <= trace.accesses


def test_files_that_do_not_belong_together_are_refused(written, tmp_path):
    row = '{"timestamp": 1, "input_length": 32, "hash_ids": [7, 8]}'
    one, again = written(HEADER, row, name="one"), written(HEADER, row, name="again")
    assert len(read_trace([one, again]).requests) == 2
    with pytest.raises(ConfigError, match="two:1: this log is of another start of an engine"):
        read_trace([one, written(HEADER.replace('"a"', '"b"'), row, name="two")])
    with pytest.raises(ConfigError, match="other:1: no header"):
        read_trace([one, written(REQUEST, name="other")])
    with pytest.raises(ConfigError, match="nowhere: No such file or directory; write the path of a trace"):
        read_trace([tmp_path / "nowhere"])


def test_what_was_made_is_written_and_read_again(tmp_path):
    trace = generate("chat:seed=1,requests=40")
    write_trace(trace, tmp_path / "trace")
    again = read_trace([tmp_path / "trace"])
    assert [each.blocks for each in again.requests] == [each.blocks for each in trace.requests]
    assert [each.input_tokens for each in again.requests] == [each.input_tokens for each in trace.requests]
    with pytest.raises(ConfigError, match="blocks of 16 tokens; the format has 512: write block_tokens=512"):
        write_trace(generate("chat:block_tokens=16,requests=2"), tmp_path / "trace")


# ---- the recorder


def recorder_at(path, *, capacity_bytes):
    return Recorder(path, [KvGroup(16)], [1600], capacity_bytes)


def end(recorder, name, tokens, keys):
    """End a request that has nothing left to offer."""
    recorder.ended(name, tokens, tokens + 2, keys, 9.0)
    recorder.settle()


def keys_of(count, first=0):
    return [bytes([first + at]) * 32 for at in range(count)]


def test_the_recorder_keeps_two_files_of_bounded_size(tmp_path):
    path = tmp_path / "log"
    recorder = recorder_at(path, capacity_bytes=4_000)
    for at in range(40):
        recorder.looked(str(at), 16, 32, at / 10)
        end(recorder, str(at), 33, keys_of(2, first=at))
    recorder.close()
    files = [tmp_path / "log.1", path]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert all(1_000 < file.stat().st_size <= 2_000 for file in files)
    trace = read_trace(files)
    assert [request.at_s for request in trace.requests] == [at / 10 for at in range(40)][
        -len(trace.requests) :
    ]
    assert {request.engine_blocks for request in trace.requests} == {1}


def test_equal_keys_have_equal_hashes_in_one_start_only(tmp_path):
    hashes = []
    for start in ("first", "second"):
        recorder = recorder_at(tmp_path / start, capacity_bytes=1 << 20)
        for name in "ab":
            recorder.looked(name, 0, 32, 0.0)
            end(recorder, name, 40, keys_of(3))
        recorder.close()
        one, other = (
            json.loads(line)["hash_ids"] for line in (tmp_path / start).read_text().splitlines()[1:]
        )
        assert one == other
        assert len({*one}) == 3
        assert max(one) < 1 << 48
        hashes.append(one)
    assert not {*hashes[0]} & {*hashes[1]}


def test_what_it_cannot_take_is_counted_and_a_request_is_written_once(tmp_path, monkeypatch):
    let_go, write = threading.Event(), Recorder._write
    monkeypatch.setattr(Recorder, "_write", lambda self, row: (let_go.wait(), write(self, row)))
    recorder = recorder_at(tmp_path / "log", capacity_bytes=1 << 20)
    for at in range(1_200):
        recorder.looked(str(at), 0, 32, 0.0)
        recorder.looked(str(at), 16, 32, 9.0)  # It was preempted, and admitted again.
        end(recorder, str(at), 40, keys_of(1))
        end(recorder, str(at), 40, keys_of(1))
    end(recorder, "never admitted", 40, keys_of(1))
    let_go.set()
    recorder.close()
    trace = read_trace([tmp_path / "log"])
    assert len(trace.requests) + trace.lost == 1_200
    # One may have been taken out already when the queue was full.
    assert trace.lost in (175, 176)
    assert {(request.engine_blocks, len(request.course.looks)) for request in trace.requests} == {(0, 2)}


def test_moments_are_in_order_and_those_of_one_step_follow_each_other(tmp_path):
    recorder = recorder_at(tmp_path / "log", capacity_bytes=1 << 20)
    for name, came_s in (("b", 7.0), ("a", 7.001)):
        recorder.arrived(name, came_s)
    recorder.turned("a", 16, 7.002)
    recorder.turned("b", 0, 7.003)
    recorder.looked("b", 0, 40, 7.003)  # It had room at once.
    recorder.turned("a", 16, 7.004)
    recorder.looked("a", 16, 40, 7.005)
    for name in "ab":
        recorder.offered(name, 40, 7.5)
        recorder.offered(name, 41, 7.6)  # No other block is complete.
    recorder.ended("a", 40, 42, keys_of(2), 7.9)
    recorder.ended("b", 40, 60, keys_of(3), 7.9)
    recorder.settle({"b"})  # It has a block to offer.
    recorder.offered("b", 59, 8.0)
    recorder.settle()
    recorder.close()
    first, second = read_trace([tmp_path / "log"]).requests
    assert (first.at_s, second.at_s) == (0.0, 0.001)
    assert first.course == Course([(3001, 0, 40)], [(500_001, 40), (1_000_000, 59)], None, 900_001)
    assert second.course == Course([(5000, 16, 40)], [(500_000, 40)], (2000, 16), 900_000)
    events = list(read_events([first, second]))
    assert [(each.kind, each.request) for each in events if each.goes_on] == [(Kind.STORE, 1)]
    assert [(each.request, each.has_ended) for each in events if each.is_last] == [(1, False), (0, True)]


def test_a_disk_that_fails_ends_the_recording_and_nothing_else(tmp_path, caplog):
    recorder = recorder_at(tmp_path / "log", capacity_bytes=4_000)
    (tmp_path / "log").unlink()
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "in the way").touch()
    (tmp_path / "log.1").touch()
    for at in range(60):
        recorder.looked(str(at), 0, 32, 0.0)
        end(recorder, str(at), 33, keys_of(2))
    recorder.close()
    recorder.close()
    assert "nothing more is recorded" in caplog.text


def test_a_place_that_cannot_be_written_is_refused_early(tmp_path):
    def check(**settings):
        check_record(load_config({"tiers": [{"backend": "cpu", "capacity": "1GiB"}], **settings}))

    assert StackConfig(tiers=()).record is None
    check()
    check(record=str(tmp_path / "log"))
    with pytest.raises(ConfigError, match=r"record: .*write a file in a folder that can be written"):
        check(record=str(tmp_path / "no" / "log"))
    with pytest.raises(ConfigError, match="write a file in a folder"):
        check(record=str(tmp_path))
    with pytest.raises(ConfigError, match="record_capacity: 1000; write at least 1MiB"):
        check(record=str(tmp_path / "log"), record_capacity=1000)
    with pytest.raises(ConfigError, match=r"record: .*No such file"):
        recorder_at(tmp_path / "no" / "log", capacity_bytes=1 << 20)
