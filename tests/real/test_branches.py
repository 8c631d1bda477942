"""Conversations that branch, change place, shrink, fail or queue, with the real pi: each says what a person then sees
on the phone, and what the model was really sent."""

from __future__ import annotations

import contextlib
import copy
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.phone import Frame, Phone

from .conftest import LONG, Chat, Place, clone, eventually

OPEN_ELSEWHERE = "This pi session is open in another session: "
WAITING = '!tool bash {"command": "touch marker"}\n!say after the tool'  # asks, and so lasts as long as we like


def said(*words: str) -> list[str]:
    """The prompts by which these words are asked for."""
    return [f"!say {word}" for word in words]


def spoken(chat: Chat, *words: str) -> None:
    for word in words:
        chat.turn(f"!say {word}")


def questions(chat: Chat) -> list[str]:
    """The person's messages as they are read back."""
    return [event["text"] for event in chat.trace() if event["type"] == "user"]


def answers(chat: Chat) -> list[str]:
    return [event["text"] for event in chat.trace() if event["type"] == "assistant"]


def entry_of(chat: Chat, text: str) -> str:
    """What the app sends for a message one long-presses: the id of its row in the chat."""
    return str(next(event["id"] for event in chat.trace() if event["type"] == "user" and event["text"] == text))


def heard(place: Place) -> list[str]:
    """The person's messages in the last request to the model."""
    contents = [message["content"] for message in place.sees() if message["role"] == "user"]
    return [text if isinstance(text, str) else "".join(part.get("text", "") for part in text) for text in contents]


def pi_file(chat: Chat) -> Path:
    return Path(chat.session()["piSessionFile"])


def rows(chat: Chat) -> set[str]:
    return {session["id"] for session in chat.phone.sessions(chat.wid)}


def fork_path(chat: Chat) -> str:
    return f"/workspaces/{chat.wid}/sessions/{chat.sid}/fork"


def types_of(frames: list[Frame], *leave_out: str) -> list[str]:
    return [frame["type"] for frame in frames if frame["type"] not in leave_out]


@contextlib.contextmanager
def visiting(chat: Chat, sid: str, phone: Phone | None = None, stop: bool = True) -> Iterator[Chat]:
    """Another phone in a session of the same workspace."""
    other = copy.copy(chat)
    other.sid, other.phone = sid, clone(phone or chat.phone)
    try:
        other.connect()
        yield other
        other.phone.raise_errors()
    finally:
        other.phone.drop()
        if stop:
            other.phone.stop(other.wid, sid)


# ---- POST .../fork ---------------------------------------------------------------------------------------------------


def test_a_fork_is_a_new_session_that_ends_before_the_question(chat: Chat) -> None:
    spoken(chat, "one", "two", "three")
    before, file, source = chat.trace(), pi_file(chat), chat.session()
    content = file.read_bytes()
    made = chat.phone.fork(chat.wid, chat.sid, entry_of(chat, "!say three"))
    assert made["id"] != chat.sid and made["workspaceId"] == chat.wid
    assert made["status"] == "ready", "it is left running"
    assert [made.get(key) for key in ("model", "contextWindow")] == [source[key] for key in ("model", "contextWindow")]
    with visiting(chat, made["id"]) as fork:
        assert questions(fork) == said("one", "two") and answers(fork) == ["one", "two"]
        assert fork.turn("!say four") == "four"
        assert heard(chat.place) == said("one", "two", "four")
        assert questions(fork) == said("one", "two", "four")
        assert pi_file(fork) != file
        fork.phone.stop(fork.wid, fork.sid)
        assert questions(fork) == said("one", "two", "four")
        fork.connect()
        fork.turn("!say five")
        assert heard(chat.place) == said("one", "two", "four", "five")
    assert chat.trace() == before and file.read_bytes() == content
    assert chat.session()["status"] == "ready" and "session_ended" not in chat.phone.types()
    chat.turn("!say six")
    assert heard(chat.place) == said("one", "two", "three", "six")
    assert pi_file(chat) == file and rows(chat) == {chat.sid, made["id"]}


def test_a_fork_is_named_after_its_source(chat: Chat) -> None:
    spoken(chat, "one")
    made = [chat.phone.fork(chat.wid, chat.sid, entry_of(chat, "!say one"))]
    chat.command("set_session_name", name="Cheese")
    spoken(chat, "two", "three")
    entry = entry_of(chat, "!say three")
    made.append(chat.phone.fork(chat.wid, chat.sid, entry))
    made.append(chat.phone.fork(chat.wid, chat.sid, entry, name="My own"))
    chat.command("set_session_name", name="n" * 200)
    made.append(chat.phone.fork(chat.wid, chat.sid, entry))
    wanted = [f"Fork: Session {chat.sid}", "Fork: Cheese", "My own", ("Fork: " + "n" * 200)[:160]]
    assert [session["name"] for session in made] == wanted
    stored = {session["id"]: session.get("name") for session in chat.phone.sessions(chat.wid)}
    assert [stored[session["id"]] for session in made] == wanted
    for session in made:
        chat.phone.stop(chat.wid, session["id"])
    chat.phone.resume(chat.wid, made[1]["id"])  # pi's own file carries the name of the source
    assert chat.phone.session_detail(chat.wid, made[1]["id"])["session"]["name"] == "Fork: Cheese"
    chat.phone.stop(chat.wid, made[1]["id"])


def test_a_fork_of_the_first_question_is_empty_and_stays_apart(chat: Chat) -> None:
    """pi writes no file for such a fork before its first answer: nothing may then fall back to the source's file."""
    spoken(chat, "one", "two")
    content, before = pi_file(chat).read_bytes(), chat.trace()
    made = chat.phone.fork(chat.wid, chat.sid, entry_of(chat, "!say one"))
    with visiting(chat, made["id"]) as fork:
        assert fork.trace() == []
        assert fork.command("get_fork_messages")["data"]["messages"] == []
        fork.phone.stop(fork.wid, fork.sid)
        assert fork.trace() == []
        fork.connect()
        fork.turn("!say three")
        assert heard(chat.place) == said("three") and questions(fork) == said("three")
    assert pi_file(chat).read_bytes() == content and chat.trace() == before


def test_a_stopped_session_can_be_forked(chat: Chat) -> None:
    spoken(chat, "one", "two")
    entry, before = entry_of(chat, "!say two"), chat.trace()
    chat.phone.stop(chat.wid, chat.sid)
    made = chat.phone.fork(chat.wid, chat.sid, entry)
    assert chat.session()["status"] == "stopped", "the source is not started by it"
    with visiting(chat, made["id"]) as fork:
        assert fork.turn("!say three") == "three"
        assert heard(chat.place) == said("one", "three")
    assert chat.trace() == before


def test_a_session_that_is_answering_can_be_forked(chat: Chat) -> None:
    spoken(chat, "one", "two")
    entry = entry_of(chat, "!say two")
    chat.ask(WAITING)
    asked = chat.wait("permission_request", sessionId=chat.sid)
    made = chat.phone.fork(chat.wid, chat.sid, entry)
    with visiting(chat, made["id"]) as fork:
        assert questions(fork) == said("one")
        assert fork.turn("!say three") == "three"
    assert chat.session()["status"] == "busy"
    chat.phone.answer(asked["id"], "allow")
    chat.wait("message_end", role="assistant", content="after the tool")
    chat.ready()
    assert questions(chat) == [*said("one", "two"), WAITING] and (chat.folder / "marker").exists()


def test_what_a_fork_does_is_asked_for_under_its_own_name(chat: Chat) -> None:
    spoken(chat, "one", "two")
    made = chat.phone.fork(chat.wid, chat.sid, entry_of(chat, "!say two"))
    with visiting(chat, made["id"]) as fork:
        fork.ask(WAITING)
        asked = fork.wait("permission_request")
        assert asked["sessionId"] == made["id"]
        fork.phone.answer(asked["id"], "deny")
        fork.ready()
    assert not (chat.folder / "marker").exists()


def test_a_fork_can_be_forked(chat: Chat) -> None:
    spoken(chat, "one", "two")
    first = chat.phone.fork(chat.wid, chat.sid, entry_of(chat, "!say two"))
    with visiting(chat, first["id"]) as fork:
        spoken(fork, "three", "four")
        second = fork.phone.fork(fork.wid, fork.sid, entry_of(fork, "!say four"))
        with visiting(chat, second["id"]) as again:
            assert questions(again) == said("one", "three")
            again.turn("!say five")
            assert heard(chat.place) == said("one", "three", "five")
        assert questions(fork) == said("one", "three", "four")
    assert questions(chat) == said("one", "two")


def test_app_10_forks(chat10: Chat) -> None:
    spoken(chat10, "one", "two")
    made = chat10.phone.fork(chat10.wid, chat10.sid, entry_of(chat10, "!say two"))
    with visiting(chat10, made["id"]) as fork:
        assert questions(fork) == said("one")
        assert fork.turn("!say three") == "three"


def test_a_fork_that_cannot_be_is_refused_and_leaves_nothing(chat: Chat) -> None:
    path, known = fork_path(chat), rows(chat)
    status, reply = chat.phone.request("POST", path, {"entryId": "deadbeef"})
    assert (status, reply["error"]) == (409, "Source session has no trace file to fork from")
    spoken(chat, "one")
    processes = len(chat.server.orphans())
    for body in ({}, {"entryId": ""}, {"entryId": 5}):
        status, reply = chat.phone.request("POST", path, body)
        assert (status, reply["error"]) == (400, "entryId required"), body
    answer = next(event["id"] for event in chat.trace() if event["type"] == "assistant").rpartition("-text-")[0]
    for entry in ("deadbeef", answer, "../../etc/passwd"):
        status, reply = chat.phone.request("POST", path, {"entryId": entry}, timeout=LONG)
        assert status == 500 and reply["error"], entry
    elsewhere = chat.phone.create_workspace("Elsewhere", hostMount=str(chat.folder))["id"]
    entry = {"entryId": entry_of(chat, "!say one")}
    for wid, wanted in ((elsewhere, 400), ("nosuchwk", 404)):
        assert chat.phone.request("POST", f"/workspaces/{wid}/sessions/{chat.sid}/fork", entry)[0] == wanted
    assert chat.phone.request("POST", f"/workspaces/{chat.wid}/sessions/nosuchse/fork", entry)[0] == 404
    assert rows(chat) == known
    eventually(lambda: len(chat.server.orphans()) <= processes, "the pi of every failed fork to end")  # one may list models
    assert chat.turn("!say go on") == "go on"


def test_a_fork_keeps_to_the_limit_of_sessions(own: Place, tmp_path: Path) -> None:
    own.server.config(maxSessionsPerWorkspace=1)
    own.server.start()
    chat = Chat(own, own.server.pair("1.1"), tmp_path / "project")
    chat.connect()
    spoken(chat, "one")
    status, reply = chat.phone.request("POST", fork_path(chat), {"entryId": entry_of(chat, "!say one")})
    assert status in (409, 500) and reply["error"] == "Workspace session limit reached (1)"
    assert rows(chat) == {chat.sid} and chat.turn("!say go on") == "go on"
    chat.phone.close()


# ---- fork, new_session and switch_session inside a session -----------------------------------------------------------


def test_a_fork_in_place_leaves_the_old_branch_on_disk(chat: Chat, phones: dict[str, Phone]) -> None:
    spoken(chat, "one", "two", "three")
    old = pi_file(chat)
    content, entry = old.read_bytes(), entry_of(chat, "!say three")
    with visiting(chat, chat.sid, phones["1.0"], stop=False) as other:
        chat.phone.mark()
        other.phone.mark()
        result = chat.command("fork", entryId=entry)
        told = chat.phone.since()
        states = [frame for frame in told if frame["type"] == "state" and told.index(frame) < told.index(result)]
        assert states and states[-1]["session"]["piSessionFile"] != str(old), "the state comes before the result"
        other.wait("rpc_result", command="fork", success=True)
    assert result["data"]["text"] == "!say three"
    assert questions(chat) == said("one", "two")
    chat.turn("!say four")
    assert heard(chat.place) == said("one", "two", "four")
    assert old.read_bytes() == content
    chat.phone.stop(chat.wid, chat.sid)
    assert questions(chat) == said("one", "two", "four")
    chat.connect()
    chat.turn("!say five")
    assert heard(chat.place) == said("one", "two", "four", "five")
    assert {str(old), str(pi_file(chat))} <= set(chat.session()["piSessionFiles"])


def begun_anew(chat: Chat, way: str) -> None:
    """A conversation of which pi writes the file only after an answer: the old file must not be taken for it."""
    spoken(chat, "one", "two")
    chat.command(way, **({"entryId": entry_of(chat, "!say one")} if way == "fork" else {}))
    assert chat.command("get_fork_messages")["data"]["messages"] == []


@pytest.mark.parametrize("way", ["fork", "new_session"])
def test_a_conversation_begun_anew_is_shown_empty_until_something_is_said(chat: Chat, way: str) -> None:
    begun_anew(chat, way)
    assert chat.trace() == []
    chat.ask(WAITING)
    asked = chat.wait("permission_request", sessionId=chat.sid)
    assert questions(chat) == [WAITING]
    chat.phone.answer(asked["id"], "deny")
    chat.ready()
    assert questions(chat) == [WAITING] == heard(chat.place)


@pytest.mark.parametrize("way", ["fork", "new_session"])
def test_a_conversation_begun_anew_stays_so_over_a_stop(chat: Chat, way: str) -> None:
    begun_anew(chat, way)
    [old] = pi_file(chat).parent.glob("*.jsonl")
    content, seq = old.read_bytes(), chat.phone.last_seq[chat.sid]
    chat.phone.stop(chat.wid, chat.sid)
    chat.connect()
    assert chat.wait("connected")["currentSeq"] >= seq, "it is the same session for the app"
    chat.turn("!say three")
    assert heard(chat.place) == said("three") and questions(chat) == said("three")
    assert old.read_bytes() == content, "the old conversation is kept as it was"


def test_a_new_session_in_the_middle_of_an_answer_ends_that_answer(chat: Chat) -> None:
    spoken(chat, "one")
    chat.ask("!slow 30\n!text 2000")
    chat.wait("text_delta")
    chat.command("new_session")
    chat.ready()
    assert chat.phone.types().count("agent_end") == 1
    chat.turn("!say two")
    assert heard(chat.place) == said("two") and questions(chat) == said("two")


def test_messages_to_fork_from_are_all_of_them(chat10: Chat) -> None:
    chat = chat10
    assert chat.command("get_fork_messages")["data"]["messages"] == []
    spoken(chat, "one", "two")
    odd = "!say with two\n\nparagraphs “quoted”"
    chat.turn(odd)
    wanted = [(entry_of(chat, text), text) for text in (*said("one", "two"), odd)]

    def messages() -> list[tuple[str, str]]:
        return [(item["entryId"], item["text"]) for item in chat.command("get_fork_messages")["data"]["messages"]]

    assert messages() == wanted
    chat.phone.stop(chat.wid, chat.sid)
    chat.connect()
    assert messages() == wanted


def test_a_fork_accepts_the_id_of_any_row_of_the_question(chat: Chat) -> None:
    """The apps cut `-text-0` and the like off the id of a row; an id that still has it means the same entry."""
    spoken(chat, "one", "two")
    chat.command("fork", entryId=entry_of(chat, "!say two") + "-text-0")
    assert questions(chat) == said("one")


def refused(chat: Chat, path: Any) -> str:
    """The reason for which switch_session was refused; the conversation has to be the one it was."""
    before = chat.session()["piSessionFile"]
    told = chat.phone.command("switch_session", chat.sid, timeout=LONG, sessionPath=path)
    assert told["success"] is False and told["error"], path
    assert chat.session()["piSessionFile"] == before
    return str(told["error"])


def test_switching_to_what_is_no_session_is_refused_and_harms_no_file(chat: Chat) -> None:
    """pi 0.73 would empty the file and begin a new session in its place."""
    spoken(chat, "one")
    own = pi_file(chat)
    notes, mine = chat.folder / "notes.jsonl", own.parent / "notes.jsonl"
    for path in (notes, mine):
        path.write_text('{"a shopping list": ["cheese"]}\n')
    header = chat.folder / "half.jsonl"
    header.write_text('{"type":"session"\n')
    empty, text = own.parent / "empty.jsonl", chat.folder / "README.md"
    empty.touch()
    text.write_text("# Mine\n")
    link = own.parent / "link.jsonl"
    link.symlink_to(notes)
    kept = {path: path.read_bytes() for path in (notes, mine, header, empty, text, own)}
    for odd in (notes, mine, header, empty, text, link, own.parent, "", "relative.jsonl", "/dev/null"):
        refused(chat, str(odd))
    assert {path: path.read_bytes() for path in kept} == kept
    refused(chat, 5)
    refused(chat, None)
    chat.turn("!say two")
    assert heard(chat.place) == said("one", "two")


def test_switching_to_a_file_that_is_not_there_is_refused_and_makes_none(chat: Chat) -> None:
    spoken(chat, "one")
    for folder in (chat.folder, pi_file(chat).parent):
        path = folder / "missing.jsonl"
        refused(chat, str(path))
        assert not path.exists()
    chat.turn("!say two")
    assert heard(chat.place) == said("one", "two")


def test_switching_to_the_file_of_another_running_session_is_refused(chat: Chat) -> None:
    spoken(chat, "one")
    other = chat.phone.create_session(chat.wid, model="mock/mock-1")["id"]
    with visiting(chat, other) as second:
        second.turn("!say secret")
        theirs = pi_file(second)
        content = theirs.read_bytes()
        refused(chat, str(theirs))
        assert theirs.read_bytes() == content
        chat.turn("!say two")
        second.turn("!say three")
        assert heard(chat.place) == said("secret", "three")
    assert questions(chat) == said("one", "two")


def test_a_fork_cannot_switch_to_the_file_in_which_its_source_goes_on(chat: Chat) -> None:
    spoken(chat, "one", "two")
    source = pi_file(chat)
    made = chat.phone.fork(chat.wid, chat.sid, entry_of(chat, "!say two"))
    with visiting(chat, made["id"]) as fork:
        content = source.read_bytes()
        assert refused(fork, str(source)) in (OPEN_ELSEWHERE + chat.sid, "Not a file of this session")
        assert source.read_bytes() == content
        fork.turn("!say three")
        assert heard(chat.place) == said("one", "three")


def test_switching_back_and_forth_goes_on_where_each_was_left(chat: Chat) -> None:
    spoken(chat, "one", "two")
    first = pi_file(chat)
    chat.command("new_session")
    spoken(chat, "three")
    second = pi_file(chat)
    assert second != first
    chat.command("switch_session", sessionPath=str(first))
    assert questions(chat) == said("one", "two")
    chat.turn("!say four")
    assert heard(chat.place) == said("one", "two", "four")
    chat.command("switch_session", sessionPath=str(second))
    chat.turn("!say five")
    assert heard(chat.place) == said("three", "five") and questions(chat) == said("three", "five")
    chat.phone.stop(chat.wid, chat.sid)
    chat.connect()
    chat.turn("!say six")
    assert heard(chat.place) == said("three", "five", "six")


# ---- compaction ------------------------------------------------------------------------------------------------------


def long_conversation(chat: Chat) -> None:
    """Three turns, of which pi keeps two word by word when it compacts: 20,000 tokens, at four letters each."""
    for number in range(3):
        chat.turn(f"!say answer {number}\n" + "hello " * 8000)


SLOW_SUMMARY = "Mind this:\n!wait 5000\n!say the slow part"  # the model obeys it when it is asked for the summary


def test_both_apps_are_told_of_a_compaction(chat: Chat, phones: dict[str, Phone]) -> None:
    long_conversation(chat)
    with visiting(chat, chat.sid, phones["1.0"], stop=False) as other:
        for phone in (chat.phone, other.phone):
            phone.mark()
        result = chat.command("compact", customInstructions="Only the cheese.")
        assert "Only the cheese." in str(chat.place.sees())
        for reader in (chat, other):
            start = reader.wait("compaction_start", reason="manual")
            end = reader.wait("compaction_end")
            assert reader.phone.frames.index(start) < reader.phone.frames.index(end)
            assert end["summary"] == result["data"]["summary"] and end["tokensBefore"] == result["data"]["tokensBefore"]
            assert not end["aborted"] and not end["willRetry"]
            told = reader.phone.types()
            assert told.count("compaction_start") == told.count("compaction_end") == 1 and "error" not in told
    ids = [item["entryId"] for item in chat.command("get_fork_messages")["data"]["messages"]]
    assert len(ids) == 3, "one can still go back to what was said before the compaction"
    before = questions(chat)
    chat.phone.stop(chat.wid, chat.sid)
    chat.connect()
    assert chat.turn("!say after it") == "after it"
    assert result["data"]["summary"][:40] in str(chat.place.sees())
    assert questions(chat) == [*before, "!say after it"], "the whole conversation is still shown"


def test_a_prompt_during_a_slow_compaction_is_acknowledged_in_time_and_runs_once(chat: Chat) -> None:
    """The app gives up after 4 s, and pi 0.73 says yes to such a prompt and then forgets it."""
    long_conversation(chat)
    chat.phone.mark()
    chat.phone.send("compact", sessionId=chat.sid, customInstructions=SLOW_SUMMARY, requestId="c")
    chat.wait("compaction_start")
    start = chat.phone.mark()
    chat.phone.prompt(chat.sid, "!say not lost")  # within the app's own limit
    assert "compaction_end" not in chat.phone.types(start), "this was to be sent while pi compacts"
    chat.wait("message_end", role="assistant", content="not lost")
    chat.ready()
    told = chat.phone.types(start)
    assert told.index("compaction_end") < told.index("agent_start") and told.count("agent_start") == 1
    assert "error" not in told and questions(chat)[3:] == said("not lost")


def tiny(place: Place, folder: Path) -> Chat:
    """A chat whose model has room for little, on a pi that compacts accordingly."""
    settings = {"retry": {"baseDelayMs": 300}, "compaction": {"reserveTokens": 1000, "keepRecentTokens": 400}}
    (place.server.agent_dir / "settings.json").write_text(json.dumps(settings))
    place.server.start()
    chat = Chat(place, place.server.pair("1.1"), folder / "project")
    chat.connect()
    chat.command("set_model", provider="mock", modelId="mock-tiny")
    return chat


def test_a_full_context_is_compacted_by_itself_and_loses_no_prompt(own: Place, tmp_path: Path) -> None:
    chat = tiny(own, tmp_path)
    chat.turn("!usage 3000 50\n!say one\n" + "hello " * 600)
    phone10 = own.server.pair("1.0")
    with visiting(chat, chat.sid, phone10, stop=False) as other:
        other.phone.mark()
        chat.ask("!usage 7600 50\n!say two\n" + "hello " * 600)
        chat.wait("compaction_start", reason="threshold")
        chat.phone.prompt(chat.sid, "!usage 900 5\n!say three", wait=None)
        end = chat.wait("compaction_end")
        assert not end["aborted"] and end["summary"]
        chat.wait("message_end", role="assistant", content="three")
        other.wait("compaction_start", reason="threshold")
        assert other.wait("compaction_end")["summary"] == end["summary"]
        chat.wait(lambda f: f["type"] == "state" and f["session"]["status"] == "ready")
        assert "error" not in chat.phone.types()
    assert [text.split("\n")[1] for text in questions(chat)] == said("one", "two", "three")
    chat.phone.close()


# ---- retries ---------------------------------------------------------------------------------------------------------


def test_a_turn_that_fails_for_good_is_one_turn_with_one_error(chat: Chat, phones: dict[str, Phone]) -> None:
    spoken(chat, "warm")
    with visiting(chat, chat.sid, phones["1.0"], stop=False) as other:
        other.phone.mark()
        chat.ask(f"!fail 99 503 {chat.sid}")
        chat.ready()
        other.wait("agent_end")
        for reader in (chat, other):
            reader.wait(lambda f: f["type"] == "state" and f["session"]["status"] == "ready")
            told = reader.phone.since()
            kinds = types_of(told)
            attempts = [frame["attempt"] for frame in told if frame["type"] == "retry_start"]
            assert attempts == [1, 2, 3] and all(f["errorMessage"] for f in told if f["type"] == "retry_start")
            ends = [frame for frame in told if frame["type"] == "retry_end"]
            assert [frame["success"] for frame in ends] == [False] and "503" in ends[0]["finalError"]
            assert kinds.count("agent_start") == 1 and kinds.count("agent_end") == 1
            errors = [frame["error"] for frame in told if frame["type"] == "error"]
            assert len(errors) == 1 and "503" in errors[0]
            assert kinds.index("error") < kinds.index("agent_end")
            busy = [frame["session"]["status"] for frame in told if frame["type"] == "state"]
            assert "ready" not in busy[busy.index("busy") : -1], "it is busy until all attempts are over"
    shown = [event for event in chat.trace() if "503" in str(event.get("text")) and event["type"] != "user"]
    assert len(shown) == 1, "who opens the chat later must see why there is no answer, once"
    assert chat.turn("!say go on") == "go on"


def test_an_error_that_is_not_worth_a_retry_is_shown_at_once(chat: Chat) -> None:
    chat.ask(f"!error 400 no such thing {chat.sid}")
    chat.ready()
    told = chat.phone.since()
    assert [("no such thing" in f["error"]) for f in told if f["type"] == "error"] == [True]
    assert "retry_start" not in types_of(told) and types_of(told).count("agent_end") == 1
    assert chat.turn("!say go on") == "go on"


def test_attempts_that_end_well_are_one_turn_for_the_phone(chat10: Chat) -> None:
    chat, times = chat10, 1 if chat10.place.new else 3  # this pi's client tries three times before it says so
    chat.ask(f"!fail {times} 503\n!say recovered {chat.sid}")
    chat.ready()
    told = chat.phone.since()
    kinds = types_of(told)
    once = ["agent_start", "retry_start", "retry_end", "agent_end"]
    assert [kind for kind in kinds if kind in (*once, "error")] == once
    assert next(f["success"] for f in told if f["type"] == "retry_end") is True
    assert chat.phone.text() == f"recovered {chat.sid}"


def test_a_wait_for_the_next_attempt_can_be_ended(own: Place, tmp_path: Path) -> None:
    (own.server.agent_dir / "settings.json").write_text('{"retry": {"baseDelayMs": 60000}}')
    own.server.start()
    chat = Chat(own, own.server.pair("1.1"), tmp_path / "project")
    chat.connect()
    chat.ask("!fail 99 503")
    chat.wait("retry_start")
    chat.command("abort_retry")
    assert chat.wait("retry_end")["success"] is False
    chat.ready()
    assert chat.phone.types().count("agent_end") == 1
    assert chat.turn("!say go on") == "go on"
    chat.phone.close()


# ---- the queue -------------------------------------------------------------------------------------------------------


def queued(chat: Chat, steer: list[str], follow: list[str]) -> dict[str, str]:
    """Put messages into the queue of a running turn; the id of each."""
    ids = {}
    for kind, words in (("steer", steer), ("follow_up", follow)):
        for text in said(*words):
            mark = chat.phone.mark()
            ids[text] = chat.phone.prompt(chat.sid, text, kind=kind, timeout=LONG).client_turn_id
            chat.wait("queue_state", since=mark)
    return ids


def held(queue: dict[str, Any]) -> list[list[str]]:
    return [[item["message"] for item in queue[name]] for name in ("steering", "followUp")]


def test_queued_messages_are_delivered_in_order(chat: Chat) -> None:
    chat.ask(WAITING)
    asked = chat.wait("permission_request", sessionId=chat.sid)
    ids = queued(chat, ["s1", "s2"], ["f1", "f2"])
    queue = chat.command("get_queue")["data"]
    assert held(queue) == [said("s1", "s2"), said("f1", "f2")]
    assert [item["id"] for name in ("steering", "followUp") for item in queue[name]] == list(ids.values())
    start = chat.phone.mark()
    chat.phone.answer(asked["id"], "allow")
    chat.wait("agent_end")
    chat.wait(lambda f: f["type"] == "state" and f["session"]["status"] == "ready")
    told = chat.phone.since(start)
    begun = [frame for frame in told if frame["type"] == "queue_item_started"]
    assert [(frame["kind"], frame["item"]["id"]) for frame in begun] == list(
        zip(["steer", "steer", "follow_up", "follow_up"], ids.values())
    )
    versions = [frame["queueVersion"] for frame in begun]
    assert versions == sorted(versions) and versions[0] > queue["version"]
    started = [frame["clientTurnId"] for frame in told if frame["type"] == "turn_ack" and frame["stage"] == "started"]
    assert started == list(ids.values())
    states = [frame["queue"] for frame in told if frame["type"] == "queue_state"]
    assert held(states[-1]) == [[], []]
    assert [frame["version"] for frame in states] == sorted({frame["version"] for frame in states})
    assert heard(chat.place) == [WAITING, *said("s1", "s2", "f1", "f2")] == questions(chat)
    assert types_of(told).count("agent_end") == 1


def test_the_queue_can_be_rewritten_while_a_turn_runs(chat: Chat) -> None:
    chat.ask(WAITING)
    asked = chat.wait("permission_request", sessionId=chat.sid)
    queued(chat, ["s1"], ["f1", "f2"])
    queue = chat.command("get_queue")["data"]
    drafts: dict[str, Any] = {"steering": []}
    drafts["followUp"] = [queue["followUp"][1], {"message": "!say new"}, queue["steering"][0]]
    start = chat.phone.mark()
    if not chat.place.new:
        told = chat.phone.command("set_queue", chat.sid, timeout=LONG, baseVersion=queue["version"], **drafts)
        assert told["success"] is False and told["error"]
        assert chat.command("get_queue")["data"] == queue
        wanted = said("s1", "f1", "f2")
    else:
        wrong = chat.phone.command("set_queue", chat.sid, timeout=LONG, baseVersion=queue["version"] + 5, **drafts)
        assert wrong["error"] == f"Queue version mismatch: expected {queue['version']}, got {queue['version'] + 5}"
        assert chat.command("get_queue")["data"] == queue
        changed = chat.command("set_queue", baseVersion=queue["version"], **drafts)["data"]
        assert held(changed) == [[], said("f2", "new", "s1")] and changed["version"] > queue["version"]
        assert changed["followUp"][0]["id"] == queue["followUp"][1]["id"], "a message that stays keeps its id"
        shown = [frame["queue"] for frame in chat.phone.since(start) if frame["type"] == "queue_state"]
        assert changed in shown and "queue_item_started" not in chat.phone.types(start)
        nothing: dict[str, Any] = {"baseVersion": queue["version"], "steering": [], "followUp": []}
        late = chat.phone.command("set_queue", chat.sid, timeout=LONG, **nothing)
        assert late["error"] == f"Queue version mismatch: expected {changed['version']}, got {queue['version']}"
        wanted = said("f2", "new", "s1")
    chat.phone.answer(asked["id"], "allow")
    chat.wait("agent_end")
    chat.wait(lambda f: f["type"] == "state" and f["session"]["status"] == "ready", since=start)
    assert heard(chat.place) == [WAITING, *wanted] == questions(chat)


def test_the_queue_of_an_idle_session_is_empty_and_takes_nothing(chat: Chat) -> None:
    spoken(chat, "one")
    queue = chat.command("get_queue")["data"]
    assert held(queue) == [[], []]
    draft: dict[str, Any] = {"baseVersion": queue["version"], "steering": [{"message": "!say never"}], "followUp": []}
    told = chat.phone.command("set_queue", chat.sid, timeout=LONG, **draft)
    assert told["success"] is False
    if chat.place.new:
        assert told["error"] == "Message queue can only contain items while a turn is streaming"
    for kind, wanted in (("steer", "Steer"), ("follow_up", "Follow-up")):
        refusal = chat.phone.command(kind, chat.sid, timeout=LONG, message="!say never")
        assert refusal["error"] == f"{wanted} requires an active streaming turn"
    spoken(chat, "two")
    assert questions(chat) == said("one", "two")


def test_two_forks_at_the_same_moment_are_two_sessions(chat: Chat) -> None:
    spoken(chat, "one", "two")
    entry, made = entry_of(chat, "!say two"), []

    def fork() -> None:
        made.append(clone(chat.phone).fork(chat.wid, chat.sid, entry))

    threads = [threading.Thread(target=fork) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert rows(chat) == {chat.sid, *(session["id"] for session in made)} and len(made) == 2
    for number, session in enumerate(made):
        with visiting(chat, session["id"]) as found:
            found.turn(f"!say own {number}")
            assert questions(found) == said("one", f"own {number}") == heard(chat.place)
