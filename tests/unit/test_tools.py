"""Errors, ids, JSON and what makes text from the model safe to show."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import oppi

from .support import few

STATUSES = {
    "OppiError": 500, "BadRequest": 400, "Unauthorized": 401, "Forbidden": 403, "NotFound": 404, "Conflict": 409,
    "SessionLimit": 409, "TooLarge": 413, "TooManyRequests": 429, "Unavailable": 503, "PiFailed": 500,
    "UsageError": 500,
}  # fmt: skip
SECRETS = ("sk_AAAAbbbbCCCCddddEEEEffff", "dt_AAAA-bbb_CCCCddddEEEEfff", "pt_AAAAbbbbCCCCddddEEEEffff")


@pytest.mark.parametrize(("name", "status"), STATUSES.items())
def test_each_error_knows_its_http_status(name: str, status: int) -> None:
    error = getattr(oppi, name)("what went wrong", "CODE")
    assert (error.status, str(error), error.code) == (status, "what went wrong", "CODE")
    assert isinstance(error, oppi.OppiError)


def test_the_clock_counts_integer_milliseconds() -> None:
    before, now, after = time.time(), oppi.now_ms(), time.time()
    assert isinstance(now, int)
    assert int(before * 1000) <= now <= int(after * 1000) + 1


def test_ids_and_tokens_have_the_form_of_the_wire() -> None:
    assert len({oppi.new_id() for _ in range(200)}) == 200
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{12}", oppi.new_id(12)) for _ in range(50))
    assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{7}", oppi.new_id()) for _ in range(1000))
    assert all(re.fullmatch(r"dt_[A-Za-z0-9_-]{24}", oppi.new_token("dt")) for _ in range(50))
    assert all(re.fullmatch(oppi.ID_PATTERN, oppi.new_id()) for _ in range(50))


def test_a_stored_hash_does_not_hold_the_token() -> None:
    for token in SECRETS:
        assert oppi.token_hash(token).startswith("sha256:")
        assert token[3:] not in oppi.token_hash(token)
    assert len({oppi.token_hash(token) for token in SECRETS}) == 3


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [("a", "a", True), ("a", "b", False), ("", "", True), ("a", "", False), ("é", "é", True), ("é", "e", False)],
)
def test_secrets_are_compared_whole(left: str, right: str, same: bool) -> None:
    assert oppi.same_secret(left, right) is same


def test_a_peer_cannot_break_a_comparison_with_a_lone_surrogate() -> None:
    assert not oppi.same_secret("\ud800", "secret")
    assert oppi.token_hash("\ud800") != oppi.token_hash("secret")


def test_json_is_compact_and_keeps_letters() -> None:
    assert oppi.dumps({"a": [1, "é\u2028"]}) == '{"a":[1,"é\u2028"]}'
    assert oppi.encode({"a": "日\ud83d"}) == '{"a":"日?"}'.encode()


@pytest.mark.parametrize(
    "text",
    ["", "{", "NaN", "[Infinity]", "-Infinity", "nope", "[1,]", "{'a':1}", "[" * 200_000, b"\xff", b'"\xed\xa0\x80"'],
)
def test_what_is_not_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        oppi.parse_json(text)


scalars = st.none() | st.booleans() | st.integers() | st.text()


@few
@given(st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_json_survives_a_round_trip(value: object) -> None:
    assert oppi.parse_json(oppi.encode(value)) == value
    assert oppi.parse_json(oppi.dumps(value)) == json.loads(oppi.dumps(value))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("rm x", "rm x"),
        ("two\nlines\tand tab", "two\nlines\tand tab"),
        ("a\x00b", "a\\u{0}b"),
        ("ls\rrm", "ls\\u{d}rm"),
        ("\x1b[2K", "\\u{1b}[2K"),
        ("a\u202eb", "a\\u{202e}b"),
        ("a\u2066b", "a\\u{2066}b"),
        ("zero\u200bwidth", "zero\\u{200b}width"),
        ("bom\ufeff", "bom\\u{feff}"),
        ("tag\U000e0041", "tag\\u{e0041}"),
        ("line\u2028sep", "line\\u{2028}sep"),
        ("filler\u3164", "filler\\u{3164}"),
        ("Büro 日本 🖥", "Büro 日本 🖥"),
    ],
)
def test_what_cannot_be_seen_is_made_visible(text: str, shown: str) -> None:
    assert oppi.visible(text) == shown


@pytest.mark.parametrize("token", SECRETS)
def test_logs_hold_no_token_and_no_control_character(token: str) -> None:
    line = oppi.redact(f"GET /x?token={token}&a=1 Bearer {token}\x1b[31m")
    assert token not in line
    assert token[3:] not in line
    assert "\x1b" not in line
    assert line.count(f"{token[:2]}_[redacted]") == 2


@pytest.mark.parametrize(
    ("text", "joined"),
    [
        ("plain", "plain"),
        ("\ud83d\ude00", "😀"),
        ("a\ud83d\ude00b", "a😀b"),
        ("\ud83d", "\ufffd"),
        ("\ude00x", "\ufffdx"),
    ],
)
def test_surrogate_halves_become_the_character(text: str, joined: str) -> None:
    assert oppi.join_surrogates(text) == joined


@few
@given(st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_encoded_in_parts_it_is_the_same(value: Any) -> None:
    assert oppi.encode_in_parts(value) == oppi.encode(value)


def test_the_head_of_a_message_is_its_first_line_and_its_fields() -> None:
    assert oppi.split_head(b"GET / HTTP/1.1") == ("GET / HTTP/1.1", [])
    head = b"HTTP/1.1 200 OK\r\nSet-Cookie: a\r\nX-Y:\t b c \r\nset-cookie:\r\nhost: h"
    assert oppi.split_head(head) == ("HTTP/1.1 200 OK", [("set-cookie", "a"), ("x-y", "b c"), ("set-cookie", ""), ("host", "h")])


@pytest.mark.parametrize(
    "lines",
    [
        "x", "x : 1", ": 1", " x: 1", "a: 1\r\n folded", "a: 1\nb: 2", "a: 1\rb", "a: \0", "a: \x7f", "", "a: 1\r\n",
        *(f"{name}: 1\r\n{name.title()}: 1" for name in oppi.ONCE),
    ],
)  # fmt: skip
def test_a_head_with_a_trick_in_it_is_refused(lines: str) -> None:
    with pytest.raises(oppi.BadRequest):
        oppi.split_head(b"GET / HTTP/1.1\r\n" + lines.encode("latin-1"))
