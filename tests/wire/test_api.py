"""The REST API by its specification: shapes (checked by the phone's decoders), errors, headers, paths."""

from __future__ import annotations

import gzip
import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.phone import Phone
from tests.support.server import Server

from .rig import Rig, eventually, new_phone, rig_with

NOT_FOUND = (404, {"error": "Not found"})
WS404 = (404, {"error": "Workspace not found"})
SE404 = (404, {"error": "Session not found"})
CORS = {
    "access-control-allow-origin": "*",
    "access-control-allow-methods": "GET, POST, PUT, PATCH, DELETE, OPTIONS",
    "access-control-allow-headers": "Authorization, Content-Type",
    "x-oppi-protocol": "2",
}


@pytest.fixture(params=["1.0", "1.1"])
def phone(rig: Rig, request: pytest.FixtureRequest) -> Phone:
    return rig.phone(request.param)


def methods_of(answer: Any) -> set[str]:
    return set(answer.headers["access-control-allow-methods"].split(", "))


def check_cors(answer: Any) -> None:
    assert methods_of(answer) == {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
    for name in set(CORS) - {"access-control-allow-methods"}:
        assert answer.headers[name] == CORS[name]


class TestEveryRoute:
    def test_health_needs_no_token(self, rig: Rig) -> None:
        assert Phone(rig.server.base_url).health() == {"ok": True, "protocol": 2}
        assert rig.phone().raw("POST", "/health").status == 200

    @pytest.mark.parametrize("path", ["/health", "/me", "/nowhere", "/workspaces/x/sessions"])
    def test_options_is_empty_and_open(self, rig: Rig, path: str) -> None:
        answer = Phone(rig.server.base_url).raw("OPTIONS", path)
        assert (answer.status, answer.body) == (204, b"")
        check_cors(answer)

    @pytest.mark.parametrize("path", ["/health", "/me", "/workspaces", "/nowhere", "/workspaces/nope/sessions"])
    def test_every_answer_has_the_headers(self, rig: Rig, path: str) -> None:
        for phone in (rig.phone(), Phone(rig.server.base_url)):
            check_cors(phone.raw("GET", path))

    @pytest.mark.parametrize("path", ["/me", "/workspaces", "/nowhere", "/workspaces/a/sessions/b/events", "/pair/"])
    def test_without_a_token_everything_else_is_401(self, rig: Rig, path: str) -> None:
        assert Phone(rig.server.base_url).request("GET", path) == (401, {"error": "Unauthorized"})

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("POST", "/me"), ("GET", "/pair"), ("DELETE", "/workspaces"), ("PATCH", "/workspaces/x"), ("PUT", "/sessions"),
            ("GET", "/workspaces/x/sessions/y/stop"), ("PUT", "/permissions/pending"), ("DELETE", "/models"),
            ("GET", "/me/"), ("GET", "/workspaces/"), ("GET", "/sessions/"), ("GET", "/nowhere"), ("GET", "/"),
            ("GET", "/Workspaces"), ("GET", "/workspaces//sessions"), ("GET", "/health/"), ("GET", "/stream"),
        ],
    )  # fmt: skip
    def test_wrong_method_or_path_is_not_found(self, rig: Rig, method: str, path: str) -> None:
        answer = rig.phone().raw(method, path)
        assert (answer.status, answer.json()) == NOT_FOUND
        assert answer.headers["content-type"].startswith("application/json")

    @pytest.mark.parametrize("body", [b"{", b"nonsense", b'{"a":NaN}', b"\xff\xfe", b"[" * 50_000])
    def test_a_body_that_is_not_json(self, rig: Rig, body: bytes) -> None:
        answer = rig.phone().raw("POST", "/workspaces", body)
        assert (answer.status, answer.json()) == (400, {"error": "Invalid JSON"})

    @pytest.mark.parametrize("body", [b"[]", b'"x"', b"7", b"null"])
    def test_a_body_that_is_no_object(self, rig: Rig, body: bytes) -> None:
        status, answer = rig.phone().request("POST", "/workspaces", body)
        assert status == 400 and answer["error"]

    def test_the_content_type_is_not_looked_at(self, rig: Rig) -> None:
        body = b'{"deviceToken":"%s"}' % (b"ab" * 16)
        answer = rig.phone().raw("POST", "/me/device-token", body, headers={"Content-Type": "text/plain"})
        assert answer.status == 200

    def test_a_connection_serves_one_request_after_the_other(self, rig: Rig) -> None:
        phone = rig.phone()
        connection = http.client.HTTPConnection("127.0.0.1", rig.server.port, timeout=10)
        for path, status in (("/me", 200), ("/nowhere", 404), ("/sessions", 200), ("/workspaces/x", 404)):
            connection.request("GET", path, headers={"Authorization": "Bearer " + phone.token})
            answer = connection.getresponse()
            answer.read()
            assert answer.status == status
        connection.close()


class TestServer:
    def test_who_i_am(self, phone: Phone) -> None:
        assert phone.me() == {"user": "owner", "name": socket.gethostname().split(".")[0]}

    def test_info(self, phone: Phone, rig: Rig) -> None:
        rig.session()
        info = phone.server_info()
        assert info["piVersion"] == "0.87.1"
        assert info["stats"]["workspaceCount"] >= 1 and info["stats"]["totalSessionCount"] >= 1
        assert info["identity"]["fingerprint"].startswith("sha256:")

    def test_models_are_those_of_pi(self, phone: Phone) -> None:
        models = {model["id"]: model for model in phone.models()}
        assert models["mock/mock-1"]["contextWindow"] == 200_000
        assert models["mock/mock-tiny"]["provider"] == "mock"

    def test_skills(self, phone: Phone, rig: Rig) -> None:
        add_skill(rig.server, "tidy")
        skills = {skill["name"]: skill for skill in phone.call("GET", "/skills")["skills"]}
        assert skills["tidy"]["description"] == "Tidies up"

    def test_push_tokens(self, phone: Phone) -> None:
        assert phone.request("POST", "/me/device-token", {}) == (400, {"error": "deviceToken required"})
        assert phone.call("POST", "/me/device-token", {"deviceToken": "ab12" * 8}) == {"ok": True}
        assert phone.call("DELETE", "/me/device-token") == {"ok": True}


class TestSecurityProfile:
    @pytest.mark.parametrize(
        ("body", "problem"),
        [
            ({"profile": "legacy"}, "profile must be one of: tailscale-permissive, strict"),
            ({"requireTlsOutsideTailnet": 1}, "requireTlsOutsideTailnet must be boolean"),
            ({"allowInsecureHttpInTailnet": "no"}, "allowInsecureHttpInTailnet must be boolean"),
            ({"requirePinnedServerIdentity": None}, "requirePinnedServerIdentity must be boolean"),
            ({"invite": []}, "invite must be an object"),
            ({"invite": {"maxAgeSeconds": 0}}, "invite.maxAgeSeconds must be an integer between 1 and 86400"),
            ({"invite": {"maxAgeSeconds": 86401}}, "invite.maxAgeSeconds must be an integer between 1 and 86400"),
            ({"invite": {"maxAgeSeconds": 1.5}}, "invite.maxAgeSeconds must be an integer between 1 and 86400"),
        ],
    )
    def test_refusals(self, rig: Rig, body: Any, problem: str) -> None:
        phone = rig.phone("1.0")
        before = phone.security_profile()
        assert phone.request("PUT", "/security/profile", body) == (400, {"error": problem})
        assert phone.security_profile() == before

    def test_a_change_is_kept(self, rig: Rig) -> None:
        phone = rig.phone("1.0")
        body = {"requireTlsOutsideTailnet": False, "invite": {"maxAgeSeconds": 700, "singleUse": True}, "unknown": 1}
        changed = phone.call("PUT", "/security/profile", body)
        assert changed["requireTlsOutsideTailnet"] is False and changed["invite"]["maxAgeSeconds"] == 700
        assert phone.security_profile() == phone.call("PUT", "/security/profile") == changed
        assert json.loads((rig.server.data / "config.json").read_text())["invite"]["maxAgeSeconds"] == 700


def add_skill(server: Server, name: str) -> None:
    folder = server.agent_dir / "skills" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "SKILL.md").write_text(f"---\nname: {name}\ndescription: Tidies up\n---\n# {name}\n")


REFUSED_WORKSPACES = [
    ({"skills": []}, "name required"),
    ({"name": " ", "skills": []}, "name required"),
    ({"name": 7, "skills": []}, "name required"),
    ({"name": "a"}, "skills array required"),
    ({"name": "a", "skills": "tidy"}, "skills array required"),
    ({"name": "a", "skills": None}, "skills array required"),
    ({"name": "a", "skills": ["no-such", "nor-this"]}, "Unknown skills: no-such, nor-this"),
    ({"name": "a", "skills": [], "extensions": "x"}, "extensions must be an array"),
    ({"name": "a", "skills": [], "extensions": ["ok", "../x"]}, "Invalid extension names: ../x"),
    ({"name": "a", "skills": [], "runtime": "vm"}, 'runtime must be "host" or "container"'),
    (
        {"name": "a", "skills": [], "policyPreset": "open"},
        "policyPreset must be one of: container, host, host_standard, host_locked",
    ),
    ({"name": "a", "skills": [], "memoryNamespace": "../x"}, "memoryNamespace must match [a-zA-Z0-9][a-zA-Z0-9._-]{0,63}"),
    ({"name": "a", "skills": [], "allowedPaths": {}}, "allowedPaths must be an array"),
    ({"name": "a", "skills": [], "allowedPaths": ["/x"]}, "allowedPaths entries must be objects"),
    ({"name": "a", "skills": [], "allowedPaths": [{"access": "read"}]}, "allowedPaths entries require a non-empty path"),
    ({"name": "a", "skills": [], "allowedPaths": [{"path": "/x"}]}, "allowedPaths access must be read or readwrite"),
    ({"name": "a", "skills": [], "systemPromptMode": "x"}, "systemPromptMode must be append or replace"),
]


class TestWorkspaces:
    @pytest.mark.parametrize(("body", "problem"), REFUSED_WORKSPACES)
    def test_refusals(self, rig: Rig, body: Any, problem: str) -> None:
        assert rig.phone().request("POST", "/workspaces", body) == (400, {"error": problem})

    @pytest.mark.parametrize(("body", "problem"), [(b, p) for b, p in REFUSED_WORKSPACES if {"name", "skills"} <= set(b)])
    def test_a_change_is_refused_like_a_creation(self, rig: Rig, body: Any, problem: str) -> None:
        path = f"/workspaces/{rig.workspace()}"
        assert rig.phone().request("PUT", path, body) == (400, {"error": problem})

    def test_fields_come_back_to_the_app_that_sent_them(self, rig: Rig) -> None:
        add_skill(rig.server, "tidy")
        old, new = rig.phone("1.0"), rig.phone()
        made = old.create_workspace("one", skills=["tidy"], policyPreset="host_locked", memoryEnabled=True, memoryNamespace="n1")
        assert (made["policyPreset"], made["memoryNamespace"], made["skills"]) == ("host_locked", "n1", ["tidy"])
        made = new.create_workspace("two", icon="x", description="d", systemPrompt="be kind", systemPromptMode="replace")
        assert (made["icon"], made["description"], made["systemPromptMode"]) == ("x", "d", "replace")
        made = new.create_workspace("three", extensions=[" a ", "b", "a"], gitStatusEnabled=True, lastUsedModel="mock/mock-2")
        assert (made["extensions"], made["gitStatusEnabled"]) == (["a", "b"], True)

    def test_a_container_is_named_as_each_app_knows_it(self, rig: Rig) -> None:
        made = rig.phone("1.0").create_workspace("box", runtime="container")
        assert made["runtime"] == "container"
        assert rig.phone().call("GET", f"/workspaces/{made['id']}")["workspace"]["runtime"] == "sandbox"

    def test_a_partial_change_keeps_the_rest_and_null_clears(self, rig: Rig) -> None:
        phone = rig.phone()
        texts = {"description": "d", "icon": "i", "systemPrompt": "p", "hostMount": "/tmp", "defaultModel": "mock/mock-2"}
        made = phone.create_workspace("clear me", **texts)
        path = f"/workspaces/{made['id']}"
        changed = phone.call("PUT", path, {"name": "renamed"})["workspace"]
        assert {name: changed[name] for name in texts} == texts and changed["name"] == "renamed"
        assert changed["updatedAt"] >= made["updatedAt"] and changed["createdAt"] == made["createdAt"]
        changed = phone.call("PUT", path, dict.fromkeys(texts))["workspace"]
        assert not set(texts) & {name for name, value in changed.items() if value is not None}
        assert changed["name"] == "renamed"
        assert phone.call("GET", path)["workspace"] == changed

    def test_the_list_is_in_order_of_creation(self, rig: Rig, phone: Phone) -> None:
        created = [workspace["createdAt"] for workspace in phone.workspaces()]
        assert created == sorted(created)

    def test_the_first_list_brings_two_to_start_with(self) -> None:
        with Server() as server:
            phone = server.pair("1.0")
            assert [workspace["name"] for workspace in phone.workspaces()] == ["general", "research"]
            first = phone.workspaces()[0]
            assert phone.call("PUT", f"/workspaces/{first['id']}", {"skills": first["skills"]})

    def test_deleting_leaves_the_sessions(self, rig: Rig) -> None:
        phone = rig.phone()
        wid = phone.create_workspace("short")["id"]
        sid = phone.create_session(wid)["id"]
        for _ in range(2):
            assert phone.call("DELETE", f"/workspaces/{wid}") == {"ok": True}
        assert phone.request("GET", f"/workspaces/{wid}") == WS404
        assert sid in [session["id"] for session in phone.sessions()]
        phone.delete(wid, sid)

    @pytest.mark.parametrize(
        ("method", "tail"), [("GET", ""), ("PUT", ""), ("GET", "/sessions"), ("POST", "/sessions"), ("POST", "/sessions/abcdefgh/resume")]  # noqa: E501
    )
    def test_an_unknown_one_is_not_found(self, rig: Rig, method: str, tail: str) -> None:
        body = {} if method != "GET" else None
        assert rig.phone().request(method, "/workspaces/nope1234" + tail, body) == WS404


class TestSessions:
    def test_a_new_one_is_not_started(self, rig: Rig, phone: Phone) -> None:
        session = phone.create_session(rig.workspace(), name="my name", model="mock/mock-2")
        rig.made.append((rig.workspace(), session["id"]))
        assert (session["status"], session["name"], session["model"]) == ("starting", "my name", "mock/mock-2")
        assert session["contextWindow"] == 128_000 and session["messageCount"] == 0
        assert phone.session_detail(rig.workspace(), session["id"])["trace"] == []

    def test_the_model_is_the_workspaces_default(self, rig: Rig) -> None:
        phone = rig.phone()
        wid = phone.create_workspace("d", defaultModel="mock/mock-tiny")["id"]
        session = phone.create_session(wid)
        assert (session["model"], session["contextWindow"]) == ("mock/mock-tiny", 8000)
        phone.delete(wid, session["id"])

    @pytest.mark.parametrize("field", ["name", "model", "prompt"])
    def test_wrong_types_are_refused(self, rig: Rig, field: str) -> None:
        status, _ = rig.phone().request("POST", f"/workspaces/{rig.workspace()}/sessions", {field: ["x"]})
        assert status == 400

    def test_a_first_prompt_is_sent(self, rig: Rig) -> None:
        phone, wid = rig.phone(), rig.workspace()
        reply = phone.call("POST", f"/workspaces/{wid}/sessions", {"prompt": " hello there "}, expect=201)
        rig.made.append((wid, reply["session"]["id"]))
        assert reply["prompted"] is True and reply["session"]["firstMessage"] == "hello there"
        assert "hello there" in rig.prompts_of_pi()

    def test_lists_show_the_last_active_first(self, rig: Rig, phone: Phone) -> None:
        chats = [rig.session() for _ in range(3)]
        rig.phone().resume(*chats[0])
        for sessions in (rig.phone().sessions(), phone.sessions(rig.workspace())):
            times = [session["lastActivity"] for session in sessions]
            assert times == sorted(times, reverse=True)
            assert sessions[0]["id"] == chats[0][1]
        reply = phone.call("GET", f"/workspaces/{rig.workspace()}/sessions")
        assert reply["workspace"]["id"] == rig.workspace()

    def test_stop_resume_and_delete(self, rig: Rig, phone: Phone) -> None:
        wid, sid = rig.session()
        assert phone.resume(wid, sid)["status"] == "ready"
        assert phone.resume(wid, sid)["status"] == "ready"
        assert phone.stop(wid, sid)["session"]["status"] == "stopped"
        assert phone.stop(wid, sid)["session"]["status"] == "stopped"
        assert phone.delete(wid, sid) == {"ok": True}
        assert phone.request("GET", f"/workspaces/{wid}/sessions/{sid}") == SE404

    @pytest.mark.parametrize(
        ("method", "tail"),
        [("GET", ""), ("DELETE", ""), ("GET", "/events"), ("POST", "/stop"), ("POST", "/resume"), ("GET", "/tool-output/c1")],
    )
    def test_an_unknown_one_is_not_found(self, rig: Rig, method: str, tail: str) -> None:
        path = f"/workspaces/{rig.workspace()}/sessions/nope1234{tail}"
        assert rig.phone().request(method, path, {} if method == "POST" else None) == SE404

    def test_it_is_not_found_under_another_workspace(self, rig: Rig) -> None:
        phone, (_, sid), other = rig.phone(), rig.session(), rig.workspace("host_locked")
        path = f"/workspaces/{other}/sessions/{sid}"
        for method, tail in (("GET", ""), ("DELETE", ""), ("GET", "/events"), ("POST", "/stop"), ("GET", "/tool-output/c")):
            assert phone.request(method, path + tail, {} if method == "POST" else None) == SE404
        wrong = (400, {"error": "Session does not belong to this workspace"})
        assert phone.request("POST", path + "/resume", {}) == wrong
        assert phone.session_detail(rig.workspace(), sid)

    @pytest.mark.parametrize("since", ["-1", "x", "1.5", "", "1e3", "%2B1", "0x1"])
    def test_since_must_be_a_number(self, rig: Rig, since: str) -> None:
        chat = rig.chat()
        refused = (400, {"error": "since must be a non-negative integer"})
        assert rig.phone().request("GET", f"{chat.path}/events?since={since}") == refused

    def test_events_of_a_stopped_session(self, rig: Rig) -> None:
        wid, sid = rig.session()
        answer = rig.phone().request("GET", f"/workspaces/{wid}/sessions/{sid}/events?since=0")
        assert answer == (404, {"error": "Session not active"})

    def test_a_deleted_session_is_gone_for_good(self, rig: Rig) -> None:
        chat = rig.chat()
        chat.play("hello")
        rig.phone().delete(chat.wid, chat.sid)
        assert chat.sid not in [session["id"] for session in rig.phone().sessions()]
        eventually(lambda: not (rig.server.data / "sessions" / f"{chat.sid}.json").exists())


class TestTrace:
    def test_both_views_tell_the_conversation(self, rig: Rig, phone: Phone) -> None:
        chat = rig.chat()
        chat.play("!think 3\n!say first\n!tool read {\"path\":\"a.txt\"}\n!say second")
        for view in ("full", "context", "nonsense"):
            trace = phone.session_detail(chat.wid, chat.sid, view)["trace"]
            shown = [event["type"] for event in trace if event["type"] != "system"]
            assert shown == ["user", "thinking", "assistant", "toolCall", "toolResult", "assistant"]
        call = next(event for event in trace if event["type"] == "toolCall")
        output = phone.call("GET", f"{chat.path}/tool-output/{call['id']}")
        assert output == {"toolCallId": call["id"], "output": "did: read a.txt\n", "isError": False}

    def test_an_unknown_call_has_no_output(self, rig: Rig) -> None:
        chat = rig.chat()
        assert rig.phone().request("GET", f"{chat.path}/tool-output/call_1") == (404, {"error": "Tool output not found"})

    def test_a_running_first_turn_is_already_told(self, rig: Rig) -> None:
        chat = rig.chat()
        chat.say("!toolwait 60000\n" + '!tool read {"path":"a"}')
        chat.phone.wait("tool_start")
        trace = rig.phone().session_detail(chat.wid, chat.sid)["trace"]
        assert "user" in [event["type"] for event in trace]


    def test_a_call_that_has_ended_is_told_to_whoever_comes_before_the_others_have(self, both: Rig) -> None:
        """pi writes the results of parallel calls down when the last has ended."""
        chat = both.chat()
        calls = ['!tool read {"path":"a"}', '!tool read {"path":"b"}']
        chat.say("\n".join(["!toolwait 1500", *calls, "!say done"]))
        chat.phone.wait("tool_end")

        def results(phone: Phone) -> list[str]:
            return [e["output"] for e in phone.session_detail(chat.wid, chat.sid)["trace"] if e["type"] == "toolResult"]

        assert results(chat.phone) == [], "it has got this one live"
        late = new_phone(both.server)
        late.open()
        late.subscribe(chat.sid)
        assert results(late) == ["did: read a\n"]
        chat.settled()
        assert results(late) == results(chat.phone) == ["did: read a\n", "did: read b\n"]
        assert [f["output"] for f in late.frames if f["type"] == "tool_output"] == ["did: read b\n"]
        late.close()


class TestTransfer:
    def test_long_answers_are_packed_for_who_can_unpack(self, rig: Rig) -> None:
        chat = rig.chat()
        chat.play("!text 600")
        chat.phone.create_session(chat.wid, name="a" * 1000)
        for path in (chat.path, "/sessions", f"/workspaces/{chat.wid}/sessions"):
            packed, plain = raw_get(rig, path, "gzip, deflate"), raw_get(rig, path, "identity")
            assert len(plain[1]) >= 1024, "too short to tell"
            assert packed[0].get("Content-Encoding") == "gzip" and "Content-Encoding" not in plain[0]
            assert json.loads(gzip.decompress(packed[1])).keys() == json.loads(plain[1]).keys()

    def test_short_answers_are_not(self, rig: Rig) -> None:
        assert "Content-Encoding" not in raw_get(rig, "/me", "gzip")[0]

    def test_segments_are_decoded_once(self, rig: Rig) -> None:
        chat, phone = rig.chat(), rig.phone()
        coded = "".join(f"%{ord(char):02X}" for char in chat.sid)
        assert phone.raw("GET", f"/workspaces/{chat.wid}/sessions/{coded}").status == 200
        assert phone.raw("GET", f"/workspaces/{chat.wid}/sessions/{coded.replace('%', '%25')}").status == 404
        assert phone.raw("GET", f"/workspaces/{chat.wid}%2Fsessions").status == 404
        assert phone.raw("GET", "/workspaces/%ff").status in (400, 404)

    def test_a_tool_call_id_may_hold_a_bar(self, rig: Rig) -> None:
        chat = rig.chat()
        status, body = rig.phone().request("GET", f"{chat.path}/tool-output/call%7Cfc_1%2F2")
        assert (status, body) == (404, {"error": "Tool output not found"})


def raw_get(rig: Rig, path: str, encoding: str) -> tuple[dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", rig.server.port, timeout=10)
    connection.request("GET", path, headers={"Authorization": "Bearer " + rig.phone().token, "Accept-Encoding": encoding})
    answer = connection.getresponse()
    found = dict(answer.getheaders()), answer.read()
    connection.close()
    return found


class TestPermissionRoutes:
    def test_nothing_is_pending(self, rig: Rig, phone: Phone) -> None:
        assert phone.pending() == []

    def test_filters_must_exist(self, rig: Rig) -> None:
        phone = rig.phone()
        assert phone.request("GET", "/permissions/pending?sessionId=nope") == SE404
        assert phone.request("GET", "/permissions/pending?workspaceId=nope") == WS404

    def test_answers_are_checked(self, rig: Rig) -> None:
        phone, path = rig.phone(), "/permissions/abcdefghijkl/respond"
        unknown = (404, {"error": "Permission request not found"})
        assert phone.request("POST", path, {"action": "allow"}) == unknown
        for body, word in (({}, "action"), ({"action": "maybe"}, "action"), ({"action": "allow", "scope": "all"}, "scope")):
            status, answer = phone.request("POST", path, body)
            assert status == 400 and answer["error"].startswith(f"{word} must be ")
        status, answer = phone.request("POST", path, {"action": "allow", "scope": "global", "expiresInMs": -1})
        assert status == 400 and "expiresInMs" in answer["error"]


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rig, Path]]:
    """A server whose pi writes down how it is called, and lists models slowly."""
    folder = tmp_path_factory.mktemp("counting")
    calls = folder / "calls"
    with rig_with(folder, start=False) as rig:
        lines = rig.server.pi.read_text().splitlines()
        wait = f"while [ ! -e {folder}/go ]; do sleep 0.05; done"
        slow = f'echo "$*" >> {calls}; case "$*" in *--list-models*) {wait};; esac'
        rig.server.pi.write_text("\n".join([lines[0], slow, *lines[1:]]) + "\n")
        rig.server.start()
        yield rig, calls
        (folder / "go").touch()


class TestModels:
    def test_they_are_listed_once_and_nobody_else_waits(self, counting: tuple[Rig, Path]) -> None:
        rig, calls = counting
        phone = rig.phone()
        eventually(lambda: calls.exists() and "--list-models" in calls.read_text())
        assert phone.raw("GET", "/workspaces").status == 200
        (calls.parent / "go").touch()
        assert [m["id"] for m in phone.models()] == [m["id"] for m in phone.models()] != []
        assert calls.read_text().count("--list-models") == 1
