"""Prompts that meet each other, a stop, or a change of the conversation: each runs, once, and is kept."""

from __future__ import annotations

import pytest

from .conftest import LONG, Chat, clone, eventually


def answered(chat: Chat, *texts: str) -> None:
    for text in texts:
        chat.wait("message_end", role="assistant", content=text)

    def kept() -> bool:
        said = [event["text"] for event in chat.trace() if event["type"] == "assistant"]
        return sorted(said[-len(texts) :]) == sorted(texts)

    eventually(kept, f"{texts} in the conversation that is read back")


def test_two_prompts_of_one_phone_at_the_same_moment_both_run(chat: Chat) -> None:
    chat.turn("!say warm")
    for number in range(3):
        chat.phone.mark()
        texts = [f"first {number}", f"second {number}"]
        for text in texts:
            chat.phone.send("prompt", sessionId=chat.sid, message=f"!say {text}", requestId=text, clientTurnId=text)
        answered(chat, *texts)
    assert "error" not in chat.phone.types()


def test_two_prompts_while_pi_starts_both_run(chat: Chat) -> None:
    other = chat.phone.create_session(chat.wid, model="mock/mock-1")["id"]
    chat.phone.mark()
    chat.phone.send("subscribe", sessionId=other, requestId="s")
    for text in ("one", "two"):
        chat.phone.send("prompt", sessionId=other, message=f"!say {text}", requestId=text, clientTurnId=text)
    for text in ("one", "two"):
        chat.wait("message_end", role="assistant", content=text, sessionId=other)


def test_prompts_of_two_phones_at_the_same_moment_both_run(chat: Chat) -> None:
    chat.turn("!say warm")
    other = clone(chat.phone)
    other.open()
    other.subscribe(chat.sid)
    for number in range(3):
        chat.phone.mark()
        for phone, text in ((chat.phone, f"mine {number}"), (other, f"yours {number}")):
            phone.send("prompt", sessionId=chat.sid, message=f"!say {text}", requestId=text, clientTurnId=text)
        answered(chat, f"mine {number}", f"yours {number}")
    other.close()


def test_a_turn_can_be_stopped_after_two_prompts_at_once(chat: Chat) -> None:
    chat.turn("!say warm")
    chat.phone.mark()
    for text in ("!slow 30\n!text 2000", "!say second"):
        chat.phone.send("prompt", sessionId=chat.sid, message=text, requestId=text, clientTurnId=text)
    chat.wait(lambda f: f["type"] == "text_delta" and "w5 " in f["delta"])
    assert chat.session()["status"] == "busy"
    chat.phone.send("stop", sessionId=chat.sid)
    chat.wait("stop_confirmed")
    assert "w1500" not in chat.phone.text()


@pytest.mark.parametrize("kind", ["steer", "follow_up"])
def test_what_is_queued_just_as_the_run_ends_is_answered_or_refused(chat: Chat, kind: str) -> None:
    """pi by itself would keep it until somebody sends another prompt."""
    for number in range(4):
        chat.phone.mark()
        chat.ask(f"!say run {number}")
        chat.wait("message_end", role="assistant", content=f"run {number}")
        chat.phone.send(kind, sessionId=chat.sid, message=f"!say late {number}", requestId="late", clientTurnId=f"late{number}")
        done = chat.wait("command_result", requestId="late")
        if done["success"]:
            chat.wait("message_end", role="assistant", content=f"late {number}")
        else:
            assert "requires an active streaming turn" in done["error"]
        chat.ready()


QUEUED = [("prompt", "one"), ("follow_up", "two"), ("steer", "three"), ("prompt", "four")]


def queue_behind(chat: Chat, text: str, queued: list[tuple[str, str]]) -> None:
    """Begin a turn and let others wait behind it in pi."""
    chat.turn("!say warm")
    chat.ask(text)
    chat.wait("agent_start")
    for kind, word in queued:
        chat.phone.send(kind, sessionId=chat.sid, message=f"!say {word}", requestId=word, clientTurnId=word)
    for _, word in queued:
        assert chat.wait("command_result", requestId=word)["success"]


def played(chat: Chat, *words: str) -> None:
    """These turns, and no others, come after the first two."""
    answered(chat, *words)
    eventually(lambda: chat.session()["status"] == "ready", "rest")
    assert [event["text"] for event in chat.trace() if event["type"] == "user"][2:] == [f"!say {word}" for word in words]
    queue = chat.command("get_queue")["data"]
    assert (queue["steering"], queue["followUp"]) == ([], [])


def test_what_waits_behind_an_answer_that_fails_runs_then_in_its_order(chat: Chat) -> None:
    """pi 0.73 by itself would keep it until somebody sends another prompt."""
    queue_behind(chat, "!wait 1500\n!error 400 no", QUEUED)
    played(chat, "three", "one", "two", "four")
    frames = chat.phone.since()
    [error] = [frame["error"] for frame in frames if frame["type"] == "error"]
    assert "400" in error and "no" in error
    started = [f["clientTurnId"] for f in frames if f["type"] == "turn_ack" and f["stage"] == "started"]
    assert started[-4:] == ["three", "one", "two", "four"]


def test_what_waits_while_pi_tries_in_vain_runs_then(chat: Chat) -> None:
    queue_behind(chat, "!wait 1000\n!error 529 Overloaded", [("follow_up", "one"), ("prompt", "two")])
    played(chat, "one", "two")
    assert any("529" in frame["error"] for frame in chat.phone.since() if frame["type"] == "error")


def test_what_waits_is_not_played_in_another_conversation(chat: Chat) -> None:
    queue_behind(chat, "!slow 30\n!text 2000", QUEUED)
    chat.command("new_session")
    eventually(lambda: chat.session()["status"] == "ready", "rest")
    queue = chat.command("get_queue")["data"]
    assert (queue["steering"], queue["followUp"]) == ([], [])
    assert chat.turn("!say anew") == "anew"
    assert [event["text"] for event in chat.trace() if event["type"] == "user"][-1:] == ["!say anew"]
    assert "!say one" not in str(chat.place.sees())


def test_what_waits_does_not_come_back_after_a_stop(chat: Chat) -> None:
    queue_behind(chat, "!slow 30\n!text 2000", QUEUED)
    chat.phone.send("stop", sessionId=chat.sid)
    chat.phone.send("prompt", sessionId=chat.sid, message="!say after", requestId="a", clientTurnId="a")
    chat.wait("stop_confirmed")
    played(chat, "after")


def test_a_prompt_right_after_a_stop_runs(chat: Chat) -> None:
    for number in range(2):
        chat.ask("!slow 30\n!text 2000")
        chat.wait("text_delta")
        chat.phone.send("stop", sessionId=chat.sid)
        chat.phone.send("prompt", sessionId=chat.sid, message=f"!say after {number}", requestId="p", clientTurnId=f"p{number}")
        chat.wait("stop_confirmed")
        chat.wait("message_end", role="assistant", content=f"after {number}")
        chat.ready()


def test_the_conversation_switched_to_is_the_one_that_is_shown(chat: Chat) -> None:
    for word in ("alpha", "beta", "gamma"):
        chat.turn(f"!say {word}")
    first = chat.session()["piSessionFile"]
    entry = chat.command("get_fork_messages")["data"]["messages"][1]["entryId"]
    chat.command("fork", entryId=entry)
    chat.turn("!say delta")
    chat.command("switch_session", sessionPath=first)
    chat.turn("!say epsilon")
    wanted = [f"!say {word}" for word in ("alpha", "beta", "gamma", "epsilon")]
    assert [event["text"] for event in chat.trace() if event["type"] == "user"] == wanted
    chat.phone.stop(chat.wid, chat.sid)
    assert [event["text"] for event in chat.trace() if event["type"] == "user"] == wanted


def test_a_compaction_of_nothing_is_told_once_by_its_result(chat: Chat) -> None:
    chat.phone.mark()
    told = chat.phone.command("compact", chat.sid, timeout=LONG)
    assert told["success"] is not chat.place.new and "error" not in chat.phone.types()
