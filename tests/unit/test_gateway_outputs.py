"""OutputCollector: nbformat's rules, bounds, and content that no honest kernel sends."""

from __future__ import annotations

import json
import time
import tracemalloc
from typing import Any

import msgspec
import pytest

from gateway.outputs import ErrorContent, OutputCollector, cell_error, to_json
from kernelprovisioner.wire import Message


def message(kind: str, content: Any, msg_id: str = "m") -> Message:
    """An iopub message as it comes off the wire."""
    frames = [b"{}", b"{}", b"{}", json.dumps(content).encode()]
    return Message("iopub", frames, {"msg_type": kind, "msg_id": msg_id}, {})


def collector(max_bytes: int = 1000, max_outputs: int = 10) -> OutputCollector:
    return OutputCollector(max_bytes=max_bytes, max_outputs=max_outputs)


def raw(value: Any) -> msgspec.Raw:
    return msgspec.Raw(json.dumps(value).encode())


def shown(outputs: OutputCollector) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = json.loads(to_json(outputs.outputs()))
    return listed


def display(value: str, display_id: str | None = None) -> dict[str, Any]:
    transient = {} if display_id is None else {"display_id": display_id}
    return {"data": {"text/plain": value}, "metadata": {}, "transient": transient}


def test_text_of_one_stream_is_one_output_until_something_else_comes() -> None:
    outputs = collector()
    for name, text in [("stdout", "a"), ("stdout", "b\n"), ("stderr", "e"), ("stdout", "c")]:
        outputs.take(message("stream", {"name": name, "text": text}))
    assert [(output["name"], output["text"]) for output in shown(outputs)] == [
        ("stdout", "ab\n"),
        ("stderr", "e"),
        ("stdout", "c"),
    ]
    assert outputs.written("stdout") == "ab\nc"


def test_an_update_changes_every_display_of_its_id_and_adds_none() -> None:
    outputs = collector()
    outputs.take(message("display_data", display("one", "x")))
    outputs.take(message("display_data", display("other", "y")))
    outputs.take(message("update_display_data", display("two", "x")))
    outputs.take(message("update_display_data", display("three", "unknown")))
    assert [output["data"]["text/plain"] for output in shown(outputs)] == ["two", "other"]
    assert all("transient" not in output for output in shown(outputs))


@pytest.mark.parametrize("wait", [True, False])
def test_clear_output_empties_what_is_shown_but_not_what_was_written(wait: bool) -> None:
    outputs = collector()
    outputs.take(message("stream", {"name": "stdout", "text": "old"}))
    outputs.take(message("clear_output", {"wait": wait}))
    assert [output["text"] for output in shown(outputs)] == (["old"] if wait else [])
    outputs.take(message("stream", {"name": "stdout", "text": "new"}))
    assert [output["text"] for output in shown(outputs)] == ["new"]
    assert outputs.written("stdout") == "oldnew"


def test_text_past_the_limit_is_cut_with_a_notice_that_counts() -> None:
    outputs = collector(max_bytes=10)
    for _ in range(4):
        outputs.take(message("stream", {"name": "stdout", "text": "12345"}))
    text = outputs.written("stdout")
    assert text.startswith("1234512345\n[samovar: stdout was cut here, 10 bytes more")
    assert shown(outputs)[0]["text"] == text


def test_a_character_is_not_cut_in_two() -> None:
    outputs = collector(max_bytes=4)
    outputs.take(message("stream", {"name": "stdout", "text": "aäöü"}))
    assert outputs.written("stdout").startswith("aä\n[samovar")


def test_outputs_past_the_limit_are_counted_and_an_error_is_kept_all_the_same() -> None:
    outputs = collector(max_outputs=2)
    for number in range(5):
        outputs.take(message("display_data", display(str(number))))
    outputs.take(message("error", {"ename": "E", "evalue": "v", "traceback": ["t"]}))
    kinds = [output["output_type"] for output in shown(outputs)]
    assert kinds == ["display_data", "display_data", "error", "stream"]
    assert "3 more outputs were cut" in shown(outputs)[-1]["text"]


def test_a_display_that_does_not_fit_is_left_out() -> None:
    outputs = collector(max_bytes=200)
    outputs.take(message("display_data", display("x" * 500, "x")))
    outputs.take(message("display_data", display("small", "x")))
    outputs.take(message("update_display_data", display("y" * 500, "x")))
    assert [output.get("data", {}).get("text/plain") for output in shown(outputs)] == ["small", None]
    assert "2 more outputs" in shown(outputs)[-1]["text"]


def test_clearing_gives_its_room_back() -> None:
    outputs = collector(max_bytes=100)
    for number in range(50):
        outputs.take(message("stream", {"name": "stdout", "text": f"progress {number:02d}\n"}))
        outputs.take(message("clear_output", {"wait": True}))
    assert shown(outputs)[0]["text"] == "progress 49\n"


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("stream", {"name": "stdlog", "text": "x"}),
        ("stream", {"name": ["stdout"], "text": "x"}),
        ("stream", {"name": "stdout", "text": 5}),
        ("stream", {}),
        ("stream", []),
        ("display_data", {"data": []}),
        ("display_data", {}),
        ("update_display_data", {"data": {}, "transient": 3}),
        ("update_display_data", {"transient": {"display_id": {}}}),
        ("comm_open", {"data": {}}),
        ("input_request", {"prompt": "password"}),
        ("", {}),
    ],
)
def test_what_does_not_fit_is_left_out(kind: str, content: dict[str, Any]) -> None:
    outputs = collector()
    outputs.take(message(kind, content))
    assert shown(outputs) == []


def test_strange_errors_become_errors() -> None:
    for content in ({}, {"ename": 5, "evalue": [], "traceback": "no list"}, {"traceback": [1, None, "line"]}):
        outputs = collector()
        outputs.take(message("error", content))
        (output,) = shown(outputs)
        assert output["output_type"] == "error" and isinstance(output["ename"], str)


def test_a_huge_error_is_cut_and_its_end_is_kept() -> None:
    lines = [f"frame {number} " + "x" * 1000 for number in range(1000)]
    error = cell_error(ErrorContent("E" * 10**6, "v" * 10**6, raw(lines)))
    assert sum(map(len, error.traceback)) < 70_000
    assert error.traceback[-1] == lines[-1]
    assert "cut" in error.traceback[0] and "cut" in error.evalue
    outputs = collector(max_bytes=10)
    outputs.take(message("error", {"ename": "E", "evalue": "v" * 10**6, "traceback": lines}))
    assert shown(outputs)[0]["output_type"] == "error"


def test_tracebacks_lose_their_colours_for_plain_text() -> None:
    error = cell_error(ErrorContent("E", "v", raw(["\x1b[31mred\x1b[39m", "\x1b[38;5;28;01mx\x1b[0m"])))
    assert error.plain_traceback == "red\nx\n"
    assert cell_error(ErrorContent("E", "v")).plain_traceback == "E: v\n"


def test_lone_surrogates_do_not_break_the_answer() -> None:
    outputs = collector()
    outputs.take(message("stream", {"name": "stdout", "text": "\ud800"}))
    outputs.take(message("display_data", display("\udfff")))
    assert shown(outputs)[0]["text"] == "\N{REPLACEMENT CHARACTER}"
    assert shown(outputs)[1]["data"]["text/plain"] == "\N{REPLACEMENT CHARACTER}"


def test_numbers_of_any_size_do_not_break_the_answer() -> None:
    outputs = collector(max_bytes=5000)
    outputs.take(message("display_data", {"data": {"application/json": 10**400}}))
    outputs.take(message("display_data", {"data": {"application/json": float("inf")}}))
    assert [output["data"]["application/json"] for output in shown(outputs)] == [10**400, None]


def test_bytes_that_are_no_text_become_replacement_characters() -> None:
    for kind, content in [
        ("stream", b'{"name": "stdout", "text": "a\xffb"}'),
        ("display_data", b'{"data": {"text/plain": "a\xffb"}}'),
    ]:
        outputs = collector()
        outputs.take(Message("iopub", [b"{}", b"{}", b"{}", content], {"msg_type": kind}, {}))
        assert "a\N{REPLACEMENT CHARACTER}b" in to_json(outputs.outputs()).decode()


@pytest.mark.parametrize("where", ["data", "metadata", "else"])
@pytest.mark.parametrize("kind", ["display_data", "execute_result", "update_display_data", "stream", "error"])
def test_a_text_that_describes_millions_of_objects_makes_none(kind: str, where: str) -> None:
    bomb = b"[" + b"[]," * 2_000_000 + b"[]]"
    fields = {"data": b"{}", "name": b'"stdout"', "text": b'"x"', where: b'{"a":' + bomb + b"}"}
    content = b"{" + b",".join(b'"%s":%s' % (name.encode(), value) for name, value in fields.items()) + b"}"
    outputs = collector(max_bytes=1000)
    tracemalloc.start()
    try:
        outputs.take(Message("iopub", [b"{}", b"{}", b"{}", content], {"msg_type": kind}, {}))
        assert tracemalloc.get_traced_memory()[1] < 3 * len(content)
    finally:
        tracemalloc.stop()


def test_updates_of_many_displays_at_once_are_cheap() -> None:
    outputs = collector(max_bytes=8 << 20, max_outputs=1000)
    for _ in range(1000):
        outputs.take(message("display_data", display("x" * 8000, "all")))
    update = message("update_display_data", display("y", "all"))
    began = time.process_time()
    for _ in range(1000):
        outputs.take(update)
    assert time.process_time() - began < 2, "an update may not cost what all its displays hold"
    assert {output["data"]["text/plain"] for output in shown(outputs)} == {"y"}


def test_the_value_of_the_last_expression_is_known_as_text() -> None:
    outputs = collector()
    assert outputs.result_text is None
    outputs.take(message("execute_result", {"data": {"text/plain": "42"}, "execution_count": 3}))
    assert outputs.result_text == "42"
    assert shown(outputs)[0] == {
        "output_type": "execute_result",
        "data": {"text/plain": "42"},
        "metadata": {},
        "execution_count": 3,
    }


@pytest.mark.parametrize("line", ["", "x"])
def test_a_traceback_of_very_many_lines_costs_little(line: str) -> None:
    error = cell_error(ErrorContent("E", "v", raw([line] * 10**6)))
    assert error.traceback == ("[samovar: the traceback was cut: it has too many lines]",)
    error = cell_error(ErrorContent("E", "v", raw([line] * 10**4)))
    assert len(error.traceback) == 1001 and "cut" in error.traceback[0]


def test_long_ids_are_not_remembered() -> None:
    outputs = collector()
    outputs.take(message("stream", {"name": "stdout", "text": "x"}, "i" * 60_000))
    assert outputs.stream_ids == set() and outputs.written("stdout") == "x"
    outputs.take(message("display_data", display("one", "i" * 60_000)))
    outputs.take(message("update_display_data", display("two", "i" * 60_000)))
    assert shown(outputs)[-1]["data"]["text/plain"] == "one"
