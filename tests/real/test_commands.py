"""Commands that are pi's own: what the phone is told is what the real pi did."""

from __future__ import annotations

import os
import signal

import pytest

from .conftest import LONG, Chat, CommandFailed, eventually


def answers(chat: Chat) -> list[str]:
    """The texts of the answers since the mark."""
    ends = [frame for frame in chat.phone.since() if frame["type"] == "message_end" and frame["role"] == "assistant"]
    return [frame["content"] for frame in ends if frame["content"]]


def state_after(chat: Chat, result: dict) -> dict:
    """The session of the first state after a result."""
    start = chat.phone.frames.index(result)
    return dict(chat.phone.wait("state", LONG, since=start, sessionId=chat.sid)["session"])


def test_models_are_those_of_the_real_list(chat: Chat) -> None:
    models = {model["id"]: model for model in chat.phone.models()}
    assert {"mock/mock-1", "mock/mock-2", "mock/mock-tiny"} <= set(models)
    assert models["mock/mock-1"]["provider"] == "mock" and models["mock/mock-1"]["contextWindow"] == 200_000


def test_the_model_is_changed_and_used(chat: Chat) -> None:
    result = chat.command("set_model", provider="mock", modelId="mock-2")
    assert (result["data"]["provider"], result["data"]["id"]) == ("mock", "mock-2")
    assert "baseUrl" not in result["data"], "private addresses are not for the phone"
    session = state_after(chat, result)
    assert session["model"] == "mock/mock-2" and session["contextWindow"] == 128_000
    chat.turn("!say hello")
    assert chat.llm.requests[-1]["model"] == "mock-2"
    with pytest.raises(CommandFailed, match="Model not found"):
        chat.command("set_model", provider="mock", modelId="nonsense")
    assert chat.session()["model"] == "mock/mock-2"


def test_the_model_survives_stop_and_resume(chat: Chat) -> None:
    chat.command("set_model", provider="mock", modelId="mock-2")
    chat.turn("!say hello")
    chat.phone.stop(chat.wid, chat.sid)
    assert chat.phone.resume(chat.wid, chat.sid)["model"] == "mock/mock-2"
    chat.phone.subscribe(chat.sid)
    chat.turn("!say again")
    assert chat.llm.requests[-1]["model"] == "mock-2"


def test_cycling_names_the_model_that_is_then_used(chat: Chat) -> None:
    result = chat.command("cycle_model")
    model = result["data"]["model"]
    assert model["id"] != "mock-1" and state_after(chat, result)["model"] == f"{model['provider']}/{model['id']}"
    chat.turn("!say hello")
    assert chat.llm.requests[-1]["model"] == model["id"]


def test_thinking_levels_are_reported_as_pi_took_them(chat: Chat) -> None:
    result = chat.command("set_thinking_level", level="low")
    assert result["data"] == {"level": "low"} and state_after(chat, result)["thinkingLevel"] == "low"
    cycled = chat.command("cycle_thinking_level")["data"]["level"]
    assert cycled != "low" and chat.session()["thinkingLevel"] == cycled
    chat.command("set_model", provider="mock", modelId="mock-2")  # cannot think at all
    result = chat.command("set_thinking_level", level="high")
    assert result["data"] == {"level": "off"} and state_after(chat, result)["thinkingLevel"] == "off"
    failed = chat.phone.command("set_thinking_level", chat.sid, level="bogus")
    assert failed["success"] is False


def test_the_name_is_kept(chat: Chat) -> None:
    result = chat.command("set_session_name", name="  Cheese  ")
    assert state_after(chat, result)["name"].strip() == "Cheese"
    chat.turn("!say hello")
    chat.phone.stop(chat.wid, chat.sid)
    chat.phone.resume(chat.wid, chat.sid)
    assert [s["name"].strip() for s in chat.phone.sessions(chat.wid)] == ["Cheese"]


def test_commands_say_where_they_come_from(chat: Chat) -> None:
    folder = chat.server.agent_dir / "prompts"
    folder.mkdir(exist_ok=True)
    (folder / "greet.md").write_text("---\ndescription: Say hello\n---\n!say hello from the template")
    chat.phone.stop(chat.wid, chat.sid)
    chat.phone.resume(chat.wid, chat.sid)
    chat.phone.subscribe(chat.sid)
    commands = {command["name"]: command for command in chat.command("get_commands")["data"]["commands"]}
    greet = commands["greet"]
    assert greet["source"] == "prompt" and greet["location"] == "user" and greet["path"].endswith("greet.md")
    assert chat.turn("/greet") == "hello from the template"


def test_statistics_count_tokens(chat: Chat) -> None:
    chat.turn("!usage 1000 50\n!say hello")
    data = chat.command("get_session_stats")["data"]
    assert data["tokens"]["input"] == 1000 and data["tokens"]["output"] == 50 and data["cost"] > 0
    session = chat.session()
    assert session["tokens"]["input"] == 1000 and session["tokens"]["output"] == 50
    assert session["cost"] == pytest.approx(data["cost"])


def test_fork_goes_back_to_a_question(chat: Chat) -> None:
    for word in ("one", "two", "three"):
        chat.turn(f"!say {word}")
    messages = chat.command("get_fork_messages")["data"]["messages"]
    assert [message["text"] for message in messages] == ["!say one", "!say two", "!say three"]
    users = [event["id"] for event in chat.trace() if event["type"] == "user"]
    assert [message["entryId"] for message in messages] == users, "the app matches these ids with those of the trace"
    result = chat.command("fork", entryId=messages[2]["entryId"])
    assert result["data"]["text"] == "!say three"
    chat.turn("!say four")
    seen = str(chat.place.sees())
    assert "!say two" in seen and "!say three" not in seen
    kept = [event["text"] for event in chat.trace() if event["type"] == "user"]
    assert kept == ["!say one", "!say two", "!say four"]


def test_a_new_conversation_in_the_same_session(chat: Chat) -> None:
    chat.turn("!say the old story")
    chat.command("new_session")
    chat.turn("!say a new one")
    assert "the old story" not in str(chat.place.sees())
    chat.ask('!tool bash {"command": "touch marker"}\n!say ok')  # the gate is there after the switch too
    chat.approve("deny")
    chat.ready()
    assert not (chat.folder / "marker").exists()


def test_compaction_is_announced_and_the_summary_kept(chat: Chat) -> None:
    for number in range(2):
        chat.turn("!usage 5000 100\n!say " + f"word{number} " * 6000)
    chat.phone.mark()
    result = chat.command("compact")
    assert result["data"]["summary"]
    chat.wait("compaction_start", reason="manual")
    end = chat.wait("compaction_end")
    assert end["summary"] == result["data"]["summary"] and not end.get("aborted")
    assert chat.turn("!say after it") == "after it"
    full, context = chat.trace(), chat.trace("context")
    assert [event["text"] for event in full if event["type"] == "compaction"] and len(context) <= len(full)


def test_compaction_of_nothing_is_refused_in_words(chat: Chat) -> None:
    failed = chat.phone.command("compact", chat.sid, timeout=LONG)
    if not failed["success"]:
        assert failed["error"]
    assert chat.turn("!say go on") == "go on"


def test_a_prompt_during_compaction_is_not_lost(chat: Chat) -> None:
    for number in range(2):
        chat.turn("!usage 5000 100\n!say " + f"word{number} " * 6000)
    chat.phone.mark()
    chat.phone.send("compact", sessionId=chat.sid)
    chat.wait("compaction_start")
    chat.ask("!say not lost")
    chat.wait("message_end", role="assistant", content="not lost")


def test_messages_are_those_of_the_conversation(chat: Chat) -> None:
    chat.turn("!say hello")
    messages = chat.command("get_messages")["data"]["messages"]
    assert [m["role"] for m in messages if m["role"] != "system"] == ["user", "assistant"]


@pytest.mark.parametrize("name", ["set_auto_retry", "set_auto_compaction"])
def test_switches_are_acknowledged(chat: Chat, name: str) -> None:
    for enabled in (False, True):
        assert chat.command(name, enabled=enabled)["success"]
    assert chat.phone.command(name, chat.sid, enabled="yes")["success"] is False


def test_app_10_runs_a_command_of_its_own(chat10: Chat) -> None:
    data = chat10.command("bash", command="echo from the phone; pwd")["data"]
    assert data["output"].splitlines()[0] == "from the phone" and data["exitCode"] == 0
    assert data["output"].splitlines()[1].endswith("project")
    assert chat10.turn("!say go on") == "go on"


def test_steering_changes_a_turn_that_runs(chat: Chat) -> None:
    chat.ask('!say one\n!tool bash {"command": "sleep 0.2; touch here"}\n!slow 20\n!say two')
    asked = chat.wait("permission_request")
    turn = chat.phone.prompt(chat.sid, "!say steered", kind="steer", wait=None)
    queued = chat.wait(lambda f: f["type"] == "queue_state" and f["queue"]["steering"])
    assert queued["queue"]["steering"][0]["message"] == "!say steered"
    chat.phone.answer(asked["id"], "allow")
    chat.wait("turn_ack", clientTurnId=turn.client_turn_id, stage="started")
    assert chat.wait("queue_item_started", kind="steer")["item"]["id"] == turn.client_turn_id
    chat.wait("message_end", role="assistant", content="steered")
    chat.ready()
    empty = [f["queue"] for f in chat.phone.since() if f["type"] == "queue_state"][-1]
    assert empty["steering"] == [] and empty["version"] > queued["queue"]["version"]


def test_a_follow_up_runs_after_the_turn(chat: Chat) -> None:
    chat.ask("!slow 40\n!text 60")
    chat.wait("text_delta")
    turn = chat.phone.prompt(chat.sid, "!say followed", kind="follow_up", wait=None)
    chat.wait("turn_ack", clientTurnId=turn.client_turn_id, stage="started")
    chat.wait("message_end", role="assistant", content="followed")
    chat.ready()
    assert answers(chat)[0].endswith("w59 ") and answers(chat)[1] == "followed"


def test_a_prompt_to_a_busy_session_is_answered_in_its_turn(chat: Chat) -> None:
    chat.ask("!slow 40\n!text 60")
    chat.wait("text_delta")
    chat.phone.prompt(chat.sid, "!say second", wait=None)
    chat.wait("message_end", role="assistant", content="second")
    chat.ready()
    assert "error" not in chat.phone.types()


def test_the_same_prompt_sent_twice_runs_once(chat: Chat) -> None:
    turn = chat.phone.prompt(chat.sid, "!say once", timeout=LONG)
    again = {"requestId": turn.request_id, "clientTurnId": turn.client_turn_id}
    chat.phone.send("prompt", sessionId=chat.sid, message="!say once", **again)
    chat.wait("turn_ack", clientTurnId=turn.client_turn_id, duplicate=True)
    chat.ready()
    chat.turn("!say done with it")
    assert [event["text"] for event in chat.trace() if event["type"] == "user"] == ["!say once", "!say done with it"]


def test_a_retry_is_announced_and_a_prompt_meanwhile_is_not_lost(chat: Chat) -> None:
    text = f"!fail 1 503\n!say recovered {chat.sid}"
    if not chat.place.new:
        text = text.replace("!fail 1", "!fail 3")  # this pi's client retries twice by itself before it says so
    chat.ask(text)
    start = chat.wait("retry_start")
    assert start["attempt"] == 1 and start["delayMs"] > 0
    chat.phone.prompt(chat.sid, "!say not lost", timeout=LONG)
    chat.wait("retry_end", success=True)
    chat.wait("message_end", role="assistant", content="not lost")
    assert answers(chat) == [f"recovered {chat.sid}", "not lost"]
    assert "error" not in chat.phone.types(), "an attempt that is repeated is not an error"


def test_a_retry_can_be_stopped(chat: Chat) -> None:
    chat.ask(f"!fail 99 503 {chat.sid}")
    chat.wait("retry_start")
    chat.phone.send("stop", sessionId=chat.sid)
    chat.wait("stop_confirmed")
    chat.wait(lambda f: f["type"] == "state" and f["session"]["status"] == "ready")
    assert chat.turn("!say go on") == "go on"


def test_the_first_prompt_of_a_session_that_still_starts_is_not_lost(chat: Chat) -> None:
    other = chat.phone.create_session(chat.wid, model="mock/mock-1")["id"]
    chat.phone.mark()
    chat.phone.send("subscribe", sessionId=other, level="full", requestId="s1")
    chat.phone.send("prompt", sessionId=other, message="!say early", requestId="p1", clientTurnId=f"early-{other}")
    chat.wait("message_end", role="assistant", content="early", sessionId=other)
    chat.phone.stop(chat.wid, other)


def test_pi_ending_by_itself_is_told(chat: Chat) -> None:
    chat.phone.stop(chat.wid, chat.sid)
    others = set(chat.server.orphans())
    chat.phone.resume(chat.wid, chat.sid)
    chat.phone.subscribe(chat.sid)
    chat.phone.mark()
    for pid, _ in set(chat.server.orphans()) - others:
        os.kill(pid, signal.SIGKILL)
    chat.wait("session_ended", sessionId=chat.sid)
    eventually(lambda: chat.session()["status"] == "stopped", "the session to be stopped")
    chat.phone.resume(chat.wid, chat.sid)
    chat.phone.subscribe(chat.sid)
    assert chat.turn("!say go on") == "go on"
