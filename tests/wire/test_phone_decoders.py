"""The test phone is only worth something if it is strict: real samples pass, damaged ones do not."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support import phone as p

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
INVITES = json.loads((FIXTURES / "invites.json").read_text("utf-8"))


def samples(generation: str) -> dict[str, Any]:
    path = FIXTURES / f"app-{generation}" / "server-messages.json"
    return dict(json.loads(path.read_text("utf-8"))["messages"])


CASES = [(generation, name) for generation in p.GENERATIONS for name in samples(generation)]


def known(generation: str, message: dict[str, Any]) -> bool:
    return message["type"] not in p.FOREIGN[generation]


@pytest.mark.parametrize(("generation", "name"), CASES)
def test_recorded_messages_decode(generation: str, name: str) -> None:
    message = samples(generation)[name]
    assert p.Decoder(generation).message(message) is known(generation, message)


def test_every_known_type_has_a_sample_or_a_reason() -> None:
    """A table row nobody sampled may be wrong; only the queue messages have none."""
    seen = {message["type"] for generation in p.GENERATIONS for message in samples(generation).values()}
    assert set(p.MESSAGES) - seen == {"queue_state", "queue_item_started"}
    assert seen <= set(p.MESSAGES)


def paths(spec: str, value: Any, generation: str, kind: str, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places in `value` where the table has a required field ('required') or a field of type `kind`."""
    found: list[tuple[Any, ...]] = []
    for item in p.fields_of(spec, generation):
        content = value.get(item.name)
        if content is None:
            continue
        here = (*prefix, item.name)
        if (kind == "required" and not item.optional) or item.type == kind:
            found.append(here)
        if kind == "enum" and item.type in p.ENUMS:
            found.append(here)
        inner = item.type.strip("[]").partition("#")[0]
        if inner in p.SHAPES:
            members = enumerate(content) if isinstance(content, list) else [(None, content)]
            for index, member in members:
                where = here if index is None else (*here, index)
                found += paths(p.SHAPES[inner], member, generation, kind, where)
    return found


def damaged(message: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with the value at `path` replaced; the marker `...` removes it."""
    result = copy.deepcopy(message)
    target = result
    for step in path[:-1]:
        target = target[step]
    if value is ...:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return result


MUTATIONS: dict[str, tuple[str, Any]] = {
    "missing": ("required", ...),
    "null": ("required", None),
    "wrong type": ("required", [[]]),
    "wrong enum": ("enum", "no such value"),
    "fraction": ("int", 1.5),
    "bool as int": ("int", True),
    "text as int": ("int", "1"),
    "number as text": ("str", 7),
    "number as bool": ("bool", 1),
    "list as object": ("obj", []),
    "text as number": ("num", "1"),
}


@pytest.mark.parametrize(("generation", "name"), [case for case in CASES if known(case[0], samples(case[0])[case[1]])])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_damaged_messages_are_refused(generation: str, name: str, mutation: str) -> None:
    message = samples(generation)[name]
    kind, value = MUTATIONS[mutation]
    for path in paths(p.MESSAGES[message["type"]], message, generation, kind):
        with pytest.raises(p.DecodeError) as caught:
            p.Decoder(generation).message(damaged(message, path, value))
        assert caught.value.path.endswith(str(path[-1])) or isinstance(value, list)


@pytest.mark.parametrize("generation", p.GENERATIONS)
def test_leniency_is_that_of_the_apps(generation: str) -> None:
    decoder = p.Decoder(generation)
    state = samples(generation)["state"]
    assert decoder.message({**state, "surprise": {"deep": [1]}})
    assert decoder.message(damaged(state, ("session", "name"), None))
    assert decoder.message(damaged(state, ("session", "messageCount"), 5.0))
    assert not decoder.message({"type": "brand_new", "session": 3})


def test_generations_differ() -> None:
    workspace: dict[str, Any] = {"id": "w", "name": "W", "skills": [], "createdAt": 1, "updatedAt": 2}
    container = {**workspace, "runtime": "container"}
    p.Decoder("1.0").check("WorkspaceList", {"workspaces": [container]})
    with pytest.raises(p.DecodeError, match="runtime"):
        p.Decoder("1.1").check("WorkspaceList", {"workspaces": [container]})
    request = samples("1.1")["permission_request"]
    assert p.Decoder("1.1").message(request)
    with pytest.raises(p.DecodeError, match="risk"):
        p.Decoder("1.0").message(request)


def test_segment_style_makes_the_frame_undecodable_only_for_app_11() -> None:
    frame = {"type": "tool_start", "tool": "x", "callSegments": [{"text": "x", "style": "blink"}]}
    assert p.Decoder("1.0").message(frame)
    with pytest.raises(p.DecodeError, match=r"callSegments\[0\].style"):
        p.Decoder("1.1").message(frame)


def test_duplicate_session_ids_crash_the_app() -> None:
    session = samples("1.1")["state"]["session"]
    p.Decoder("1.1").check("SessionList", {"sessions": [session, {**session, "id": "other"}]})
    with pytest.raises(p.DecodeError, match="duplicate"):
        p.Decoder("1.1").check("SessionList", {"sessions": [session, session]})


def test_catch_up_events_need_a_sequence_number() -> None:
    session = samples("1.1")["state"]["session"]
    reply = {"events": [{"type": "agent_start", "seq": 4}], "currentSeq": 4, "catchUpComplete": True}
    p.Decoder("1.1").response("GET", "/workspaces/w/sessions/s/events?since=3", 200, {**reply, "session": session})
    reply["events"] = [{"type": "agent_start"}]
    with pytest.raises(p.DecodeError, match="seq"):
        p.Decoder("1.1").response("GET", "/workspaces/w/sessions/s/events?since=3", 200, {**reply, "session": session})


def test_error_bodies_are_checked_too() -> None:
    p.Decoder("1.1").response("GET", "/me", 401, {"error": "Unauthorized"})
    with pytest.raises(p.DecodeError):
        p.Decoder("1.1").response("GET", "/me", 401, {"message": "Unauthorized"})


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": "\\ud83d"}', b'{"a": "\xff"}', "{"])
def test_json_that_swift_refuses(text: str | bytes) -> None:
    with pytest.raises(p.DecodeError):
        p.load_json(text)


def test_the_table_language_is_used_correctly() -> None:
    """Every type named in a table exists; without this a typo shows only when the field first occurs."""
    scalars = set(p._SCALARS) | {"Event"}
    for generation in p.GENERATIONS:
        for spec in [*p.SHAPES.values(), *p.MESSAGES.values(), p.ENVELOPE, p.ENVELOPE_FIELDS, p.INVITE_V3_FIELDS]:
            for item in p.fields_of(spec, generation):
                assert item.type.strip("[]{}").partition("#")[0] in scalars | set(p.SHAPES) | set(p.ENUMS)
    assert {shape for _, _, shape in p.ROUTES} | set(p.RESULT_DATA.values()) <= set(p.SHAPES)
    assert p.shape_of("GET", "/sessions/search?q=x") == "SearchReply"
    assert p.shape_of("GET", "/workspaces/w/sessions/s/files") is None


@pytest.mark.parametrize("vector", INVITES["v2"], ids=lambda v: v["name"])
def test_invites_v2(vector: dict[str, Any]) -> None:
    expected, payload = vector["expected"], vector["inputs"]["payload"]
    for text in (expected["qrPayload"], expected["deepLink"]):
        invite = p.parse_invite_v2(text, now=expected["iat"] + 1)
        assert (invite.host, invite.port, invite.token) == (payload["host"], payload["port"], payload["token"])
    assert p.signing_input(invite.envelope).decode() == expected["signingInput"]
    with pytest.raises(p.InviteError, match="expired"):
        p.parse_invite_v2(expected["deepLink"], now=expected["exp"] + 1)
    with pytest.raises(p.InviteError, match="not yet"):
        p.parse_invite_v2(expected["deepLink"], now=expected["iat"] - 301)
    with pytest.raises(p.InviteError):
        p.parse_invite_v3(expected["deepLink"])


@pytest.mark.parametrize("vector", INVITES["v2Negative"], ids=lambda v: v["name"])
def test_tampered_invites_v2(vector: dict[str, Any]) -> None:
    with pytest.raises(p.InviteError, match="signature"):
        p.parse_invite_v2(vector["envelopeJson"], now=1760000000)


@pytest.mark.parametrize("vector", INVITES["v3"], ids=lambda v: v["name"])
def test_invites_v3(vector: dict[str, Any]) -> None:
    expected, inputs = vector["expected"], vector["inputs"]
    for text in (expected["qrPayload"], expected["deepLink"], expected["pairJsonOutput"]["inviteURL"]):
        invite = p.parse_invite_v3(text)
        assert (invite.port, invite.pairing_token) == (inputs["port"], inputs["pairingToken"])
        assert invite.base_url.startswith(expected["pairJsonOutput"]["scheme"] + "://")
    broken = json.loads(expected["qrPayload"])
    del broken["token"]
    with pytest.raises(p.InviteError, match="token"):
        p.parse_invite_v3(json.dumps(broken))


@pytest.mark.parametrize(
    ("host", "kind"),
    [
        ("mac.tail1.ts.net", "tailnet"),
        ("100.100.1.2", "tailnet"),
        ("fd7a:115c:a1e0::1", "tailnet"),
        ("127.0.0.1", "local"),
        ("my-mac", "local"),
        ("my-mac.local", "local"),
        ("192.168.1.9", "local"),
        ("::1", "local"),
        ("fdfoo.example.com", "local"),
        ("example.com", "public"),
        ("8.8.8.8", "public"),
    ],
)
def test_host_classes(host: str, kind: str) -> None:
    assert p.host_class(host) == kind
