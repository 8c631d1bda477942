"""Numbers, memory and queues between a session and its phones, against simple models."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import oppi

from .support import many

HELD = 5  # ring length in the model tests
steps = st.lists(st.one_of(st.integers(1, 8), st.just("restart"), st.just("crash")), max_size=10)


def run(script: list[Any]) -> tuple[oppi.SessionLog, list[dict[str, Any]]]:
    """A log after appends (by number), stops and crashes; and every durable message there ever was."""
    log, ever = oppi.SessionLog(0), []
    for step in script:
        if isinstance(step, int):
            ever += [log.append({"type": "message_end", "n": len(ever) + number}) for number in range(step)]
        else:
            log = oppi.SessionLog(log.seq if step == "restart" else log.seq + oppi.SEQ_STEP)
    return log, ever


@many
@given(steps, st.integers(-3, 60) | st.integers(990, 3100))
def test_catching_up_is_complete_only_if_nothing_is_missing(script: list[Any], since: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oppi, "RING", HELD)
        log, ever = run(script)
        messages, complete = log.since(since)
    if complete:
        assert messages == [message for message in ever if message["seq"] > since]
    else:
        assert messages == []
    if log.base <= since <= log.seq and log.seq - since <= HELD:
        assert complete


@many
@given(steps)
def test_numbers_never_go_back(script: list[Any]) -> None:
    log, ever = run(script)
    numbers = [message["seq"] for message in ever]
    assert numbers == sorted(set(numbers))
    assert log.seq >= max(numbers, default=0)


def test_a_phone_that_knows_more_than_the_server_reloads() -> None:
    log, _ = run([3])
    assert log.since(4) == ([], False)
    assert log.since(3) == ([], True)


def test_a_new_start_of_the_session_is_no_continuation() -> None:
    log, ever = run([3, "restart"])
    assert [log.since(since)[1] for since in (0, 1, 2, 3, 4)] == [False, False, False, True, False]
    assert ever[-1]["seq"] == 3


def test_a_log_holds_five_hundred_messages_and_does_not_share_them() -> None:
    log, _ = run([501])
    assert log.since(0) == ([], False)
    assert len(log.since(1)[0]) == 500
    original = {"type": "error"}
    assert log.append(original)["seq"] == 502
    assert original == {"type": "error"}


# turns


def turn(command: str = "prompt", text: str = "", at: int = 0, **more: Any) -> oppi.Turn:
    return oppi.Turn(command, "h", at, text, **more)


def cache(*turns: tuple[str, str, str]) -> oppi.TurnCache:
    """A cache of (id, command, text), all dispatched."""
    found = oppi.TurnCache()
    for name, command, text in turns:
        found.add(name, turn(command, text))
        found.advance(name, "dispatched")
    return found


def test_one_id_is_one_turn() -> None:
    turns = oppi.TurnCache()
    assert turns.known("t", "prompt", "h", 0) is None
    turns.add("t", turn())
    found = turns.known("t", "prompt", "h", 1)
    assert found is not None
    assert (found.stage, found.command) == ("accepted", "prompt")


@pytest.mark.parametrize(("command", "content"), [("steer", "h"), ("prompt", "other")])
def test_an_id_that_stands_for_something_else_is_a_conflict(command: str, content: str) -> None:
    turns = oppi.TurnCache()
    turns.add("t", turn())
    with pytest.raises(oppi.Conflict, match="^clientTurnId conflict: t$"):
        turns.known("t", command, content, 0)


def test_turns_are_forgotten_a_quarter_of_an_hour_after_they_were_last_asked_about() -> None:
    minute, turns = 60_000, oppi.TurnCache()
    turns.add("t", turn())
    assert turns.known("t", "prompt", "h", 15 * minute)
    assert turns.known("t", "prompt", "h", 30 * minute)
    assert turns.known("t", "prompt", "h", 45 * minute + 1) is None


def test_a_held_turn_is_never_forgotten() -> None:
    turns = oppi.TurnCache()
    turns.add("t", turn(payload={"message": "hi"}))
    assert turns.known("t", "prompt", "h", 10**9)
    for number in range(256):
        turns.add(str(number), turn())
    assert "t" in turns.held()
    assert turns.release(["t", "unknown"])
    assert not turns.release(["t"])
    assert turns.held() == {}


def test_the_cache_keeps_the_256_turns_used_last() -> None:
    turns = oppi.TurnCache()
    for number in range(256):
        turns.add(str(number), turn())
    assert turns.known("0", "prompt", "h", 0)
    turns.add("new", turn())
    assert turns.known("0", "prompt", "h", 0)
    assert turns.known("1", "prompt", "h", 0) is None


def test_no_more_is_accepted_than_can_be_held() -> None:
    turns = oppi.TurnCache()
    for number in range(256):
        turns.add(str(number), turn(payload={}))
    with pytest.raises(oppi.Conflict, match="^Too many messages wait for pi$"):
        turns.add("new", turn())
    assert len(turns.turns) == 256


def test_a_stage_only_moves_forward() -> None:
    turns = oppi.TurnCache()
    turns.add("t", turn())
    stages = ["accepted", "dispatched", "dispatched", "accepted", "started", "dispatched"]
    assert [turns.advance("t", stage) for stage in stages] == [False, True, False, False, True, False]
    assert turns.advance("unknown", "started") is False


def test_which_turn_begins() -> None:
    turns = cache(("p1", "prompt", "a"), ("p2", "prompt", "b"), ("s1", "steer", "x"), ("s2", "follow_up", "x"))
    assert [turns.starting(key, text) for key, text in (("p1", "x"), ("", "x"), ("", "y"))] == ["p1", "s1", ""]
    for key in ("p1", "s1"):
        turns.advance(key, "started")
    assert [turns.starting("p1"), turns.starting("p1", "x"), turns.starting("gone", "b")] == ["", "s2", "p2"]


def test_turns_outlive_the_server() -> None:
    turns = cache(("a", "prompt", "x"), ("b", "steer", "y"))
    turns.add("c", turn(text="z", at=7, payload={"message": "z"}))
    assert oppi.TurnCache(turns.stored()).turns == turns.turns
    good = turns.stored()
    odd = [None, 3, {}, {**good[0], "stage": "flying"}, {**good[0], "payload": []}, {**good[0], "id": []}]
    assert list(oppi.TurnCache([*odd, *good]).turns) == ["a", "b", "c"]


def user(text: str, at: int) -> dict[str, Any]:
    content = [{"type": "text", "text": text}]
    return {"type": "message", "id": f"e{at}", "message": {"role": "user", "content": content, "timestamp": at}}


def test_what_pis_file_holds_is_delivered() -> None:
    held = {
        "early": turn(text="go on", at=10_000),
        "again": turn(text="go on", at=20_000),
        "other": turn(text="stop", at=20_000),
        "skill": turn(text="/skill:review", at=30_000),
    }
    entries = [user("go on", 5_000), user("go on", 10_500), {"type": "label"}, user("<expanded>", 30_001)]
    assert oppi.delivered(held, oppi.user_texts(entries)) == ["early", "skill"]
    assert oppi.delivered(held, oppi.user_texts([*entries, user("go on", 20_000)])) == ["early", "again", "skill"]


def test_a_held_turn_is_part_of_the_trace_until_pi_has_it() -> None:
    image = {"type": "image", "mimeType": "image/png", "data": "QQ=="}
    held = {"t": turn(text="look", at=1_700_000_000_123, payload={"message": "look", "images": [image]})}
    (event,) = oppi.held_events(held, [])
    assert event["text"] == "look\ndata:image/png;base64,QQ=="
    assert (event["id"], event["type"], event["timestamp"]) == ("held-t", "user", "2023-11-14T22:13:20.123Z")
    assert oppi.held_events(held, [("look", 1_700_000_000_200)]) == []


# outboxes


def joined(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with all adjacent deltas of one kind and session joined: what a person sees."""
    found: list[dict[str, Any]] = []
    for message in messages:
        last = found[-1] if found else {"type": ""}
        if "delta" in message and (last["type"], last.get("sessionId")) == (message["type"], message.get("sessionId")):
            found[-1] = {**last, "delta": last["delta"] + message["delta"]}
        else:
            found.append(message)
    return found


deltas = st.builds(
    lambda kind, text, session: {"type": kind, "delta": text, "sessionId": session},
    st.sampled_from(["text_delta", "thinking_delta"]), st.text(max_size=5), st.sampled_from("ab"),
)  # fmt: skip
others = st.builds(
    lambda kind, n: {"type": kind, "output": n}, st.sampled_from(["tool_output", "state"]), st.integers()
)


@many
@given(st.lists(st.one_of(deltas, deltas, deltas, others, st.just("drain")), max_size=40))
def test_a_slow_phone_gets_everything_in_order(script: list[Any]) -> None:
    box, sent, got = oppi.Outbox(), [], []
    for step in script:
        if step == "drain":
            got += list(box.drain())
        else:
            sent.append(step)
            assert box.push(step, 10) is True
            assert sum(1 for m in box.waiting if "delta" in m) == sum(
                1 for m in joined(list(box.waiting)) if "delta" in m
            )
    got += list(box.drain())
    assert joined(got) == joined(sent)
    assert box.size == 0


def test_messages_are_shared_by_phones_and_so_never_changed() -> None:
    first, second = ({"type": "text_delta", "delta": text, "sessionId": "s"} for text in "ab")
    boxes = [oppi.Outbox(), oppi.Outbox()]
    for box in boxes:
        box.push(first, 1)
        box.push(second, 1)
    assert (first["delta"], second["delta"]) == ("a", "b")
    assert [list(box.drain()) for box in boxes] == [[{**first, "delta": "ab"}]] * 2


def test_an_outbox_that_outgrows_its_bound_says_so() -> None:
    box = oppi.Outbox()
    assert box.push({"type": "state"}, oppi.OUTBOX_LIMIT) is True
    assert box.push({"type": "state"}, 1) is False
    assert len(list(box.drain())) == 2
    assert box.push({"type": "state"}, 1) is True


def test_merged_deltas_stay_well_below_the_frame_limit_of_a_phone() -> None:
    box = oppi.Outbox()
    for _ in range(100):
        box.push({"type": "text_delta", "delta": "x" * 10_000}, 1)
    sizes = [len(message["delta"]) for message in box.drain()]
    assert sum(sizes) == 1_000_000
    assert max(sizes) <= 256 * 1024
