"""The credential proxy by itself: what goes inside, what an upstream is sent, and everything that is refused."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import resource
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Coroutine
from pathlib import Path
from typing import Any, Callable

import pytest

import oppi
from tests.container import jail
from tests.support.mock_llm import MockLLM
from tests.support.tools import install_pi

SUBNET, GATEWAY, INSIDE, OUTSIDE = "127.77.0.0/16", "127.77.0.1", "127.77.0.9", "127.78.0.9"
CANARY = "canary"
DAY = 86_400_000
WAIT = 10.0  # s; nothing here takes that long when all is well
SSE = b"data: {\"n\": %d}\n\n"
Json = dict[str, Any]


def jwt(account: str) -> str:
    claims = {"https://api.openai.com/auth": {"chatgpt_account_id": account}}
    return ".".join(base64.urlsafe_b64encode(json.dumps(p).encode()).decode().rstrip("=") for p in ({}, claims)) + ".x"


class Upstream:
    """A server on loopback that keeps what it is sent, and answers by `reply(self, writer)` or with 200 and `{}`."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.reply: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]] = self.fine
        self.gone = asyncio.Event()  # a request's connection has ended before its answer

    async def open(self) -> Upstream:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def fine(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            line, *fields = head[:-4].split("\r\n")
            headers = {name.lower(): value for name, _, value in (field.partition(": ") for field in fields)}
            assert len(headers) == len(fields)
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            self.requests.append((line, headers, body))
            try:
                await self.reply(reader, writer)
            finally:
                writer.close()


class World:
    """A host with an agent directory, an upstream and a proxy at one network."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.env, self.log = folder, {"PATH": os.environ["PATH"]}, list[str]()
        self.proxy = oppi.CredentialProxy(str(folder), lambda: dict(self.env), self.log.append)

    async def open(self) -> World:
        self.upstream = await Upstream().open()
        await self.proxy.open(0)
        await self.proxy.admit(SUBNET, GATEWAY)
        return self

    def login(self, **entries: Any) -> None:
        (self.folder / "auth.json").write_text(json.dumps({name.replace("_", "-"): it for name, it in entries.items()}))

    def logins(self) -> Json:
        found: Json = json.loads((self.folder / "auth.json").read_text())
        return found

    def models(self, **providers: Any) -> None:
        (self.folder / "models.json").write_text(json.dumps({"providers": providers}))

    def custom(self, **fields: Any) -> Json:
        return {"baseUrl": f"{self.upstream.url}/v1", "api": "openai-completions", "models": [{"id": "m"}], **fields}

    def keyed(self) -> Inside:
        """A session with one provider that has a plain key."""
        self.models(mine=self.custom(apiKey="canary-key"))
        return self.inside()

    def inside(self, session: str = "s1") -> Inside:
        return Inside(self.proxy.grant(session, GATEWAY))


class Inside:
    """What an agent in the container has, and how pi uses it."""

    def __init__(self, grant: oppi.Grant) -> None:
        self.grant = grant
        self.text = json.dumps([grant.auth, grant.models, grant.warnings])
        found = re.search(r"oppi-[A-Za-z0-9_-]{43}", self.text)
        self.secret = found.group() if found else ""

    def base(self, provider: str) -> str:
        return str(self.grant.models["providers"][provider]["baseUrl"])

    def key(self, provider: str) -> str:
        login = self.grant.auth[provider]
        return str(login.get("key") or login["access"])

    def request(self, provider: str = "mine", path: str = "/chat/completions", body: bytes = b"{}", **headers: str) -> bytes:
        """The bytes of a request as pi's client libraries send it; headers are added or changed, or left out when empty."""
        base = self.base(provider)
        at, _, prefix = base[len("http://"):].partition("/")
        given = {"host": at, "authorization": f"Bearer {self.key(provider)}", "content-length": str(len(body))}
        given.update({name.replace("_", "-").lower(): value for name, value in headers.items()})
        lines = [f"{name}: {value}" for name, value in given.items() if value != ""]
        return "\r\n".join([f"POST /{prefix}{path} HTTP/1.1", *lines, "", ""]).encode() + body

    @property
    def port(self) -> int:
        ports = re.findall(rf"{re.escape(GATEWAY)}:(\d+)", self.text)
        return int(ports[0])


async def connect(port: int, source: str = INSIDE) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.wait_for(asyncio.open_connection(GATEWAY, port, local_addr=(source, 0)), WAIT)


async def exchange(port: int, data: bytes, source: str = INSIDE) -> bytes:
    """All that comes back for these bytes, until the other side closes."""
    reader, writer = await connect(port, source)
    writer.write(data)
    try:
        return await asyncio.wait_for(reader.read(-1), WAIT)
    finally:
        writer.close()


async def answer(inside: Inside, *args: Any, **options: Any) -> tuple[int, str]:
    """Status and body of a request's answer."""
    raw = await exchange(inside.port, inside.request(*args, **options))
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Callable[[World], Coroutine[Any, Any, None]]], None]:
    """Runs a test in an event loop, in a world of its own; nothing may be left of it."""

    def runner(test: Callable[[World], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            world = await World(tmp_path).open()
            try:
                await asyncio.wait_for(test(world), 150)
            finally:
                await world.proxy.close()
                world.upstream.server.close()
            assert not [t for t in asyncio.all_tasks() if t is not asyncio.current_task() and "Upstream" not in repr(t)]

        asyncio.run(main())

    return runner


def with_world(test: Callable[..., Coroutine[Any, Any, None]]) -> Any:
    """Makes `async def test(world, …)` a test."""
    import functools
    import inspect

    @functools.wraps(test)
    def sync(run: Any, **given: Any) -> None:
        run(lambda world: test(world, **given))

    names = [p for name, p in inspect.signature(test).parameters.items() if name != "world"]
    own = inspect.Parameter("run", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    sync.__signature__ = inspect.Signature([own, *names])  # type: ignore[attr-defined]
    return sync


async def until(condition: Callable[[], Any], what: str) -> None:
    """For what no event announces."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        await asyncio.sleep(0.005)


# -- what the upstream gets ----------------------------------------------------------------------------------------------


@with_world
async def test_a_key_is_put_where_the_stub_was_and_the_rest_passes_unchanged(world: World) -> None:
    inside = world.keyed()
    headers = {"x-own": "yes", "cookie": "a=b", "accept": "text/event-stream", "connection": "keep-alive"}
    status, body = await answer(inside, body=b'{"x": 1}', **headers)
    assert (status, body) == (200, "{}")
    line, headers, sent = world.upstream.requests[0]
    assert line == "POST /v1/chat/completions HTTP/1.1" and sent == b'{"x": 1}'
    assert headers == {
        "authorization": "Bearer canary-key", "x-own": "yes", "accept": "text/event-stream", "content-length": "8",
        "connection": "close", "host": world.upstream.url[len("http://"):],
    }  # fmt: skip


@with_world
async def test_each_header_form_of_a_key_is_kept(world: World) -> None:
    inside = world.keyed()
    for name in ("x-api-key", "x-goog-api-key", "api-key"):
        assert (await answer(inside, authorization="", **{name: inside.key("mine")}))[0] == 200
        _, headers, _ = world.upstream.requests.pop()
        assert headers[name] == "canary-key" and "authorization" not in headers


@with_world
async def test_a_login_goes_as_bearer_and_its_stub_has_the_shape_of_one(world: World) -> None:
    login = {"type": "oauth", "access": "sk-ant-oat01-canary", "refresh": "canary-r", "expires": oppi.now_ms() + DAY}
    world.login(anthropic=login, kimi_coding={**login, "access": "canary-kimi"})
    world.models(anthropic={"baseUrl": world.upstream.url}, **{"kimi-coding": {"baseUrl": world.upstream.url}})
    inside = world.inside()
    assert inside.grant.auth["anthropic"]["type"] == "oauth" and inside.key("anthropic").startswith("sk-ant-oat01-oppi-")
    assert inside.grant.auth["anthropic"]["expires"] > oppi.now_ms() + 365 * DAY  # nothing inside tries to renew it
    assert inside.key("kimi-coding").startswith("oppi-")
    assert (await answer(inside, "anthropic", "/v1/messages?beta=true"))[0] == 200
    assert world.upstream.requests[0][0] == "POST /v1/messages?beta=true HTTP/1.1"
    assert world.upstream.requests[0][1]["authorization"] == "Bearer sk-ant-oat01-canary"
    assert (await answer(inside, "kimi-coding", "/v1/messages", authorization="", x_api_key=inside.key("kimi-coding")))[0] == 200
    headers = world.upstream.requests[1][1]
    assert headers["authorization"] == "Bearer canary-kimi" and "x-api-key" not in headers


@with_world
async def test_a_codex_login_has_a_made_up_account_inside_and_the_real_one_upstream(world: World) -> None:
    login = {"type": "oauth", "access": jwt("canary-account"), "refresh": "r", "expires": oppi.now_ms() + DAY}
    world.login(openai_codex={**login, "accountId": "canary-account"})
    world.models(**{"openai-codex": {"baseUrl": world.upstream.url + "/backend-api"}})
    inside = world.inside()
    _, payload, _ = inside.key("openai-codex").split(".")
    shown = json.loads(base64.b64decode(payload + "=="))["https://api.openai.com/auth"]["chatgpt_account_id"]
    assert shown and "canary" not in shown
    assert (await answer(inside, "openai-codex", "/codex/responses", chatgpt_account_id=shown))[0] == 200
    line, headers, _ = world.upstream.requests[0]
    assert line == "POST /backend-api/codex/responses HTTP/1.1"
    assert (headers["authorization"], headers["chatgpt-account-id"]) == (f"Bearer {jwt('canary-account')}", "canary-account")


@with_world
async def test_variables_of_the_host_are_keys_and_what_is_stored_comes_first(world: World) -> None:
    own = {"baseUrl": world.upstream.url}
    world.models(anthropic=own, openai=own, google=own)
    world.env.update(ANTHROPIC_AUTH_TOKEN="canary-token", OPENAI_API_KEY="canary-env", GEMINI_API_KEY="canary-gemini")
    world.login(openai={"type": "api_key", "key": "canary-stored"})
    inside = world.inside()
    assert sorted(inside.grant.auth) == ["anthropic", "google", "openai"]
    await answer(inside, "openai", "/responses")
    await answer(inside, "anthropic", "/v1/messages", authorization="", x_api_key=inside.key("anthropic"))
    path = "/models/gemini-2.5-pro:streamGenerateContent?alt=sse"
    await answer(inside, "google", path, authorization="", x_goog_api_key=inside.key("google"))
    sent = [headers.get("authorization") or headers["x-goog-api-key"] for _, headers, _ in world.upstream.requests]
    assert sent == ["Bearer canary-stored", "Bearer canary-token", "canary-gemini"]
    assert world.upstream.requests[2][0] == f"POST {path} HTTP/1.1"
    world.env["ANTHROPIC_OAUTH_TOKEN"] = "sk-ant-oat01-canary"
    del world.env["ANTHROPIC_AUTH_TOKEN"]
    assert world.inside().key("anthropic").startswith("sk-ant-oat01-")


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        ("literal", "literal"), ("THE_KEY", "canary-env"), ("$THE_KEY", "canary-env"), ("a-${THE_KEY}-b", "a-canary-env-b"),
        ("$$5 $!", "$5 !"), ("$MISSING", None), ("${MISSING}x", None), ("$THE-x", None), ("a$", "a$"),
        ("!echo canary-out", "canary-out"), ("!echo $THE_KEY", "canary-env"), ("!echo canary; false", None), ("!true", None),
        ("!printf 'a\\nb'", None), ("é", None),
    ],
)  # fmt: skip
@with_world
async def test_a_key_means_on_the_host_what_it_means_to_pi(world: World, raw: str, value: str | None) -> None:
    world.env["THE_KEY"] = "canary-env"
    world.models(mine=world.custom(apiKey=raw))
    inside = world.inside()
    if value is None:
        assert await answer(inside) == (502, "No credential for: mine")
        assert not world.upstream.requests
    else:
        assert (await answer(inside))[0] == 200
        assert world.upstream.requests[0][1]["authorization"] == f"Bearer {value}"


@pytest.mark.parametrize("token", ["!echo x", "$HOME", "PATH", "a$$b"])
@with_world
async def test_a_login_is_never_looked_into(world: World, token: str) -> None:
    world.env["HOME"] = str(world.folder)
    world.models(openrouter={"baseUrl": world.upstream.url})
    world.login(openrouter={"type": "oauth", "access": token, "refresh": "r", "expires": oppi.now_ms() + DAY})
    assert (await answer(world.inside(), "openrouter"))[0] == 200
    assert world.upstream.requests[0][1]["authorization"] == f"Bearer {token}"


@with_world
async def test_a_command_is_asked_once_for_many_requests_and_again_when_it_failed(world: World) -> None:
    asked = world.folder / "asked"
    world.models(mine=world.custom(apiKey=f"!echo x >> {asked}; echo canary-out"))
    inside = world.inside()
    assert [(await answer(inside))[0] for _ in range(5)] == [200] * 5
    assert asked.read_text() == "x\n"
    world.models(mine=world.custom(apiKey=f"!test -e {world.folder}/ready && echo canary-out"))
    inside = world.inside()
    assert (await answer(inside))[0] == 502
    (world.folder / "ready").touch()
    assert (await answer(inside))[0] == 200


@with_world
async def test_headers_of_models_json_keep_their_names_inside_and_their_values_outside(world: World) -> None:
    provider = world.custom(apiKey="k", authHeader=True, headers={"X-Team": "canary-team"}, secretNote="canary")
    provider["models"] = [{"id": "m", "headers": {"X-Model": "!echo canary-model"}, "note": "canary", "contextWindow": 5}]
    provider["modelOverrides"] = {"m": {"headers": {"X-Over": "$OVER"}, "maxTokens": 3}}
    world.env["OVER"] = "canary-over"
    world.models(mine=provider)
    inside = world.inside()
    assert "canary" not in inside.text
    shown = inside.grant.models["providers"]["mine"]
    (model,) = shown["models"]
    assert (model["id"], model["contextWindow"], shown["modelOverrides"]["m"]["maxTokens"]) == ("m", 5, 3)
    assert shown["authHeader"] is True and shown["api"] == "openai-completions"
    headers = {**shown["headers"], **model["headers"], **shown["modelOverrides"]["m"]["headers"]}
    assert (await answer(inside, **headers))[0] == 200
    sent = world.upstream.requests[0][1]
    assert (sent["x-team"], sent["x-model"], sent["x-over"]) == ("canary-team", "canary-model", "canary-over")
    assert (await answer(inside, X_Echo=headers["X-Team"], X_Key=inside.secret, X_None=inside.secret + ".99"))[0] == 200
    sent = world.upstream.requests[1][1]
    assert "canary" not in str({name: value for name, value in sent.items() if name != "authorization"})
    assert inside.secret not in str(world.upstream.requests)


@with_world
async def test_headers_alone_are_a_credential_too(world: World) -> None:
    world.models(mine=world.custom(headers={"Authorization": "Basic canary"}))
    inside = world.inside()
    stub = inside.grant.models["providers"]["mine"]["headers"]["Authorization"]
    inside.grant.auth["mine"] = {"key": "unused"}
    assert (await answer(inside, authorization=stub))[0] == 200
    assert world.upstream.requests[0][1]["authorization"] == "Basic canary"


@with_world
async def test_providers_of_names_that_look_alike_have_each_their_own_key(world: World) -> None:
    names = ("my own", "my-own", "my/own")
    world.models(**{name: world.custom(apiKey=f"canary {name}") for name in names})
    inside = world.inside()
    assert [(await answer(inside, name))[0] for name in names] == [200] * 3
    assert [headers["authorization"] for _, headers, _ in world.upstream.requests] == [f"Bearer canary {it}" for it in names]


@with_world
async def test_a_model_with_an_address_of_its_own_has_its_own_route(world: World) -> None:
    other = await Upstream().open()
    models = [{"id": "m"}, {"id": "n", "api": "anthropic-messages", "baseUrl": other.url + "/n/"}]
    world.models(**{"my own": world.custom(apiKey="canary-key", models=models)})
    inside = world.inside()
    shown = inside.grant.models["providers"]["my own"]
    assert (await answer(inside, "my own"))[0] == 200
    shown["baseUrl"] = shown["models"][1]["baseUrl"]
    assert (await answer(inside, "my own", "/v1/messages"))[0] == 200
    assert other.requests[0][0] == "POST /n/v1/messages HTTP/1.1"
    assert (await answer(inside, "my own"))[0] == 403  # the model's address has the model's API only
    other.server.close()


# -- what goes inside ----------------------------------------------------------------------------------------------------


@with_world
async def test_no_canary_is_in_anything_an_agent_can_read(world: World) -> None:
    login = {"type": "oauth", "access": jwt(CANARY), "refresh": "canary-r", "expires": oppi.now_ms() + DAY, "accountId": CANARY}
    world.login(
        anthropic={**login, "access": "sk-ant-oat01-canary"}, openai_codex=login, github_copilot=login, unheard=login,
        groq={"type": "api_key", "key": "canary-groq", "env": {"X": CANARY}}, xai={"type": "api_key", "key": "!echo canary"},
    )  # fmt: skip
    world.env.update(OPENROUTER_API_KEY="canary-or", AWS_BEARER_TOKEN_BEDROCK=CANARY, MISTRAL_API_KEY=CANARY, VAR=CANARY)
    world.models(
        mine=world.custom(apiKey="canary-key", headers={"a": CANARY}, oauthToken=CANARY), env=world.custom(apiKey="VAR"),
        command=world.custom(apiKey="!echo canary"), userinfo=world.custom(apiKey="k", baseUrl="http://canary:canary@h/v1"),
        query=world.custom(apiKey="k", baseUrl="http://h/v1?key=canary"), open=world.custom(baseUrl="http://canary@h/v1"),
        radius={"baseUrl": "https://h/v1", "oauth": "radius", "apiKey": CANARY}, groq={"compat": {}, "apiKey": CANARY},
    )  # fmt: skip
    inside = world.inside()
    assert CANARY not in inside.text
    assert set(inside.grant.auth) == {*"anthropic command env groq mine mistral openai-codex openrouter xai".split()}
    named = {text.split()[0] for text in inside.grant.warnings}
    assert named == {"github-copilot", "unheard", "amazon-bedrock", "userinfo", "query", "open", "radius"}
    assert all("cannot be used in a container: " in text and text.endswith(".") for text in inside.grant.warnings)
    assert not set(inside.grant.models["providers"]) & named
    answers = [await answer(inside, name) for name in ("mine", "env", "command")]
    answers += [await answer(inside, authorization="Bearer canary-key"), await answer(inside, path="/canary")]
    assert [status for status, _ in answers] == [200, 200, 200, 401, 403]
    assert CANARY not in str(answers) + str(world.log)
    assert CANARY in str(world.upstream.requests)


@with_world
async def test_providers_without_a_credential_stay_as_they_are(world: World) -> None:
    world.models(groq={"compat": {"x": 1}}, lan={**world.custom(), "baseUrl": "http://192.0.2.7:8080/v1"})
    providers = world.inside().grant.models["providers"]
    assert providers["groq"] == {"compat": {"x": 1}}
    assert providers["lan"]["baseUrl"] == "http://192.0.2.7:8080/v1" and providers["lan"]["apiKey"] == "none"


@with_world
async def test_a_login_that_only_pi_can_renew_works_until_it_expires(world: World) -> None:
    world.models(meta={"baseUrl": world.upstream.url})
    login = {"type": "oauth", "access": "canary", "refresh": "r", "expires": oppi.now_ms() + 2000}
    world.login(meta=login)
    inside = world.inside()
    assert (await answer(inside, "meta", "/responses"))[0] == 200
    world.login(meta={**login, "expires": oppi.now_ms() - 1})
    assert await answer(inside, "meta", "/responses") == (502, "No credential for: meta")
    assert world.inside().grant.warnings == [
        "meta cannot be used in a container: its login has expired, and only pi itself can renew it."
    ]


@with_world
async def test_a_file_that_cannot_be_read_is_a_warning_or_waits(world: World) -> None:
    world.login(openai={"type": "api_key", "key": "canary-1"})
    world.models(openai={"baseUrl": world.upstream.url})
    inside = world.inside()
    (world.folder / "auth.json").write_text('{"openai": {"type"')  # pi is writing it
    assert (await answer(inside, "openai", "/responses"))[0] == 200
    (world.folder / "models.json").write_text("{")
    assert "models.json cannot be read" in world.inside().grant.warnings[0]
    (world.folder / "auth.json").unlink()
    assert await answer(world.keyed()) == (200, "{}")
    text = '\ufeff{ // mine\n "providers": {"mine": %s,}, }' % json.dumps(world.custom(apiKey="http://no-comment"))
    (world.folder / "models.json").write_text(text)
    assert (await answer(world.inside()))[0] == 200
    assert world.upstream.requests[-1][1]["authorization"] == "Bearer http://no-comment"


@with_world
async def test_nonsense_in_the_files_costs_only_the_provider_that_has_it(world: World) -> None:
    nonsense = [1, "x", None, {}, []]
    for odd in nonsense:
        fields = "baseUrl api apiKey headers models modelOverrides compat".split()
        world.models(mine=world.custom(apiKey="canary-key"), whole=odd, **{name: world.custom(**{name: odd}) for name in fields})
        kinds = {"type": "oauth", "access": "x", "expires": odd}, {"type": "api_key", "key": odd}, {"type": odd}
        world.login(**{f"a{n}": it for n, it in enumerate(kinds)}, openai=kinds[0], groq=kinds[1], xai=kinds[2], google=odd)
        inside = world.inside()
        assert (await answer(inside))[0] == 200
        for name in ("openai", "xai"):
            if name in inside.grant.models["providers"]:
                assert (await answer(inside, name, "/responses"))[0] == 502
    for text in ("[]", '{"providers": 5}', "5"):
        (world.folder / "models.json").write_text(text)
        assert "mine" not in world.inside().grant.models["providers"]


LISTING = """
import {MODELS} from %s;
const found = {};
for (const [p, models] of Object.entries(MODELS))
  for (const m of Object.values(models)) (found[p] ??= {})[m.api] = m.baseUrl;
console.log(JSON.stringify(found));
"""


def node_and_modules(version: str) -> tuple[str, Path]:
    """The Node that runs pi, and the folder of all that is installed with it."""
    node, script = re.findall('"(/[^"]+)"', install_pi(version).read_text())
    return node, next(path for path in Path(script).parents if path.name == "node_modules")


@pytest.mark.parametrize("version", ["0.73.1", "0.87.1"])
def test_the_table_of_providers_is_what_pi_has(version: str) -> None:
    node, modules = node_and_modules(version)
    (catalogue,) = modules.glob("*/pi-ai/dist/models.generated.js")
    done = subprocess.run(
        [node, "--input-type=module", "-e", LISTING % json.dumps(str(catalogue))], capture_output=True, text=True, check=True
    )
    found: dict[str, dict[str, str]] = json.loads(done.stdout)
    table = oppi.built_in()
    assert len(found) > 20 and set(found) <= set(table)
    for provider, bases in found.items():
        if table[provider][1]:
            assert {api: url for api, url in bases.items() if table[provider][1].get(api) != url} == {}, provider
    names = {"amazon-bedrock", "azure-openai-responses", "cloudflare-ai-gateway", "cloudflare-workers-ai", "github-copilot"}
    assert {name for name in table if not table[name][1]} == names | {"google-vertex", "radius"}


# -- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "status", "text"),
    [
        ({"authorization": ""}, 401, "Missing or invalid session token"),
        ({"authorization": "Bearer sk-ant-oat01-proxy-abc"}, 401, "Missing or invalid session token"),
        ({"authorization": "", "x_api_key": "sk-real-looking"}, 401, "Missing or invalid session token"),
        ({"authorization": "Bearer oppi-" + "A" * 43}, 403, "Session not registered"),
        ({"path": "/chat/completions/"}, 403, "Path not allowed"),
        ({"path": "/models"}, 403, "Path not allowed"),
        ({"path": "/responses"}, 403, "Path not allowed"),
        ({"path": "/v1/chat/completions"}, 403, "Path not allowed"),
        ({"path": "chat/completions"}, 404, "Unknown provider route"),
        ({"path": "//chat/completions"}, 403, "Path not allowed"),
        ({"path": "/../chat/completions"}, 403, "Path not allowed"),
        ({"path": "/chat/../chat/completions"}, 403, "Path not allowed"),
        ({"path": "/chat%2fcompletions"}, 403, "Path not allowed"),
        ({"path": "/chat/completions%00"}, 403, "Path not allowed"),
        ({"path": "/chat/completions?u=http://h/"}, 403, "Path not allowed"),
        ({"path": "/chat/completions#x"}, 403, "Path not allowed"),
        ({"path": "/chat\\completions"}, 403, "Path not allowed"),
        ({"path": "/Chat/completions"}, 403, "Path not allowed"),
        ({"host": "api.openai.com"}, 400, "Malformed request"),
        ({"upgrade": "websocket", "connection": "upgrade"}, 400, "Malformed request"),
        ({"transfer_encoding": "chunked"}, 411, "Send Content-Length"),
        ({"transfer_encoding": "chunked", "content_length": ""}, 411, "Send Content-Length"),
        ({"content_length": ""}, 400, "Malformed Content-Length"),
        ({"content_length": "+2"}, 400, "Malformed Content-Length"),
        ({"content_length": "2, 2"}, 400, "Malformed Content-Length"),
        ({"content_length": "-1"}, 400, "Malformed Content-Length"),
        ({"content_length": "0x2"}, 400, "Malformed Content-Length"),
        ({"content_length": str(oppi.PROXY_BODY + 1)}, 413, "Request body too large"),
        ({"content_length": "9" * 12}, 413, "Request body too large"),
        ({"x_large": "x" * oppi.PROXY_HEAD}, 431, "Header too large"),
    ],
)
@with_world
async def test_a_request_out_of_line_is_refused(world: World, change: dict[str, str], status: int, text: str) -> None:
    inside = world.keyed()
    assert await answer(inside, **change) == (status, text)
    assert not world.upstream.requests


@pytest.mark.parametrize(
    ("old", "new", "status"),
    [
        ("POST ", "GET ", 405), ("POST ", "PUT ", 405), ("POST ", "OPTIONS ", 405), ("POST ", "post ", 400),
        ("POST /", "POST http://127.0.0.1/", 400), ("POST /", "POST //", 404), ("POST /mine/", "POST /mine/x/", 404),
        ("POST /mine/", "POST /groq/", 403), ("POST /mine/", "POST /other/", 404), ("POST /mine/", "POST /./mine/", 404),
        ("POST /mine/", "POST /x/../mine/", 404), ("POST /mine/", "POST /mine%2f", 404), ("POST /mine/", "CONNECT mine/", 400),
        ("POST /mine/", "POST /minefoo/", 404), ("POST /mine/", "POST /anthropicfoo/", 404),
        (" HTTP/1.1", " HTTP/1.0", 400), (" HTTP/1.1", " HTTP/2.0", 400), (" HTTP/1.1", "", 400), ("POST ", "POST  ", 400),
        ("POST ", " POST ", 400), ("POST ", "\r\nPOST ", 400), ("POST ", "\tPOST ", 400),
        ("content-length: 2", "content-length: 2\r\ncontent-length: 2", 400),
        ("content-length: 2", "content-length: 2\r\nContent-Length: 5", 400),
        ("content-length: 2", "content-length : 2", 400), ("content-length: 2", "content-length: 2\r\n x: folded", 400),
        ("content-length: 2", "content-length: 2\nx: bare", 400), ("content-length: 2", "content-length: 2\r\nx", 400),
        ("content-length: 2", "content-length: 2\r\nx: a\x00b", 400), ("content-length: 2", "content-length: 2\r\nx: a\rb", 400),
        ("content-length: 2", "content-length: 2\r\nTransfer-Encoding: identity", 411),
        ("content-length: 2", "content-length: 2\r\nTransfer-Encoding: xchunked\r\nTransfer-Encoding: chunked", 400),
        ("content-length: 2", "content-length: 2\r\n: empty", 400), ("content-length: 2", "content-length: 2\r\nhost: evil", 400),
    ],
)  # fmt: skip
@with_world
async def test_tricks_with_the_wire_are_refused(world: World, old: str, new: str, status: int) -> None:
    inside = world.keyed()
    data = inside.request().decode("latin-1")
    assert old in data
    raw = await exchange(inside.port, data.replace(old, new, 1).encode("latin-1"))
    assert int(raw.split()[1]) == status and b"content-type: text/plain" in raw.lower()
    assert not world.upstream.requests


@with_world
async def test_what_is_sent_behind_a_request_is_never_passed_on(world: World) -> None:
    inside = world.keyed()
    held = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.read() == b""
        held.set()

    world.upstream.reply = wait
    with contextlib.suppress(ConnectionError):
        await exchange(inside.port, inside.request() + inside.request())
    await asyncio.wait_for(held.wait(), WAIT)
    assert [body for _, _, body in world.upstream.requests] == [b"{}"]


@with_world
async def test_a_stub_does_not_leave_in_the_address(world: World) -> None:
    inside = world.keyed()
    assert (await answer(inside, path=f"/chat/completions?x={inside.secret}"))[0] == 403


@pytest.mark.parametrize("source", [OUTSIDE, "127.0.0.1", GATEWAY])
@with_world
async def test_only_the_networks_containers_are_listened_to(world: World, source: str) -> None:
    inside = world.keyed()
    with contextlib.suppress(ConnectionError):
        assert await exchange(inside.port, inside.request(), source) == b""
    assert not world.upstream.requests
    assert (await answer(inside))[0] == 200
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", inside.port)


@with_world
async def test_a_secret_is_good_in_its_own_network_and_for_its_own_providers(world: World) -> None:
    await world.proxy.admit("127.79.0.0/24", "127.79.0.1")
    inside = world.keyed()
    world.models(other=world.custom(apiKey="canary-other"))
    second = Inside(world.proxy.grant("s2", "127.79.0.1"))
    port = int(second.base("other").split(":")[2].split("/")[0])
    reader, writer = await asyncio.open_connection("127.79.0.1", port, local_addr=("127.79.0.5", 0))
    writer.write(second.request("other").replace(second.secret.encode(), inside.secret.encode()))
    assert (await reader.read()).startswith(b"HTTP/1.1 403 ")
    writer.close()
    prefix = second.base("other").split("/", 3)[3].encode()
    mine = inside.base("mine").split("/", 3)[3].encode()
    assert b"HTTP/1.1 404 " in await exchange(inside.port, inside.request().replace(mine, prefix, 1))
    with pytest.raises(oppi.NotFound):
        world.proxy.grant("s3", "127.80.0.1")


@with_world
async def test_a_session_and_a_container_have_only_so_many_requests_at_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oppi, "SESSION_REQUESTS", 3)
    monkeypatch.setattr(oppi, "PEER_CONNECTIONS", 6)
    inside = world.keyed()
    release = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        await world.upstream.fine(reader, writer)

    world.upstream.reply = wait
    waiting = [asyncio.ensure_future(answer(inside)) for _ in range(3)]
    await until(lambda: len(world.upstream.requests) == 3, "three requests")
    assert await answer(inside) == (429, "Too many requests at once")
    idle = [await connect(inside.port) for _ in range(3)]
    with contextlib.suppress(ConnectionError):
        assert await exchange(inside.port, inside.request()) == b""
    assert await exchange(inside.port, inside.request(), "127.77.0.10") != b""  # another container is not held up
    for _, writer in idle:
        writer.close()
    release.set()
    assert await asyncio.gather(*waiting) == [(200, "{}")] * 3
    assert (await answer(inside))[0] == 200


@with_world
async def test_a_caller_waits_while_no_descriptor_is_free(world: World) -> None:
    inside = world.keyed()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.create_connection((GATEWAY, inside.port), WAIT, (INSIDE, 0)) as caller:
        caller.sendall(inside.request())
        caller.setblocking(False)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        before = time.process_time()
        try:
            await asyncio.sleep(0.3)
            assert time.process_time() - before < 0.1  # it does not spin
            with pytest.raises(BlockingIOError):
                caller.recv(1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert (await asyncio.wait_for(asyncio.get_running_loop().sock_recv(caller, 99), WAIT)).startswith(b"HTTP/1.1 200 ")


@with_world
async def test_a_caller_who_says_nothing_is_cut_off(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oppi, "PROXY_HEAD_S", 0.05)
    inside = world.keyed()
    for data in (b"", b"POST /"):
        with contextlib.suppress(ConnectionError):
            assert await exchange(inside.port, data) == b""
    monkeypatch.setattr(oppi, "PROXY_HEAD_S", WAIT)
    monkeypatch.setattr(oppi, "PROXY_ANSWER_S", 0.2)
    with pytest.raises(ConnectionError):  # a body that never comes
        await exchange(inside.port, inside.request()[:-1])


# -- streams -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framing", ["chunked", "close", "length"])
@with_world
async def test_a_stream_passes_byte_for_byte(world: World, framing: str) -> None:
    inside = world.keyed()
    frames = [os.urandom(size) for size in (1, 7, 100_000, 3, 65_536, 1)]
    sent = {
        "chunked": b"".join(b"%x;ext=1\r\n%s\r\n" % (len(f), f) for f in frames) + b"0\r\nTrailer: x\r\n\r\n",
        "close": b"".join(frames), "length": b"".join(frames),
    }[framing]  # fmt: skip
    head = {"chunked": b"Transfer-Encoding: chunked", "close": b"X-Y: z", "length": b"Content-Length: %d" % len(sent)}[framing]

    async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 103 Early Hints\r\nX-Early: 1\r\n\r\n")
        writer.write(b"HTTP/1.1 201 Made\r\nSet-Cookie: a=b\r\nX-Two: 1\r\nX-Two: 2\r\nKeep-Alive: 5\r\n" + head + b"\r\n\r\n")
        for start in range(0, len(sent), 1000):
            writer.write(sent[start : start + 1000])
            await writer.drain()

    world.upstream.reply = stream
    raw_head, _, body = (await exchange(inside.port, inside.request())).partition(b"\r\n\r\n")
    assert body == sent
    assert raw_head.lower() == b"http/1.1 201 made\r\nx-two: 1\r\nx-two: 2\r\n" + head.lower() + b"\r\nconnection: close"


@with_world
async def test_a_large_body_passes_whole(world: World) -> None:
    inside = world.keyed()
    body = os.urandom(20 * 1024 * 1024)
    assert (await answer(inside, body=body))[0] == 200
    assert world.upstream.requests[0][2] == body


@with_world
async def test_an_event_of_a_stream_is_not_held_up(world: World) -> None:
    """The delay that the proxy adds to an event; of several rounds the best one counts, for others use this machine, too."""
    inside = world.keyed()
    go: asyncio.Queue[bytes] = asyncio.Queue()

    async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        while data := await go.get():
            writer.write(data)

    world.upstream.reply = stream
    reader, writer = await connect(inside.port)
    writer.write(inside.request())
    await reader.readuntil(b"\r\n\r\n")
    rounds: list[float] = []
    while len(rounds) < 20 and min(rounds, default=1) >= 0.005:
        delays = []
        for n in range(200):
            start = time.perf_counter()
            go.put_nowait(SSE % n)
            assert await reader.readexactly(len(SSE % n)) == SSE % n
            delays.append(time.perf_counter() - start)
        rounds.append(sorted(delays)[197])
    go.put_nowait(b"")
    writer.close()
    assert min(rounds) < 0.005, rounds


@with_world
async def test_a_caller_who_hangs_up_ends_the_request_upstream(world: World) -> None:
    inside = world.keyed()
    gone = asyncio.Event()

    async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        writer.write(SSE % 1)
        await reader.read()  # ends with the connection
        gone.set()

    world.upstream.reply = stream
    reader, writer = await connect(inside.port)
    writer.write(inside.request())
    await reader.readuntil(SSE % 1)
    writer.close()
    await asyncio.wait_for(gone.wait(), WAIT)


@pytest.mark.parametrize("head", [b"", b"Content-Length: 100\r\n", b"Transfer-Encoding: chunked\r\n"])
@with_world
async def test_a_stream_that_is_cut_upstream_is_cut_for_the_caller(world: World, head: bytes) -> None:
    inside = world.keyed()

    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n")
        await writer.drain()
        await go.wait()
        linger = b"\1" + bytes(7)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()

    go = asyncio.Event()
    world.upstream.reply = cut
    reader, writer = await connect(inside.port)
    writer.write(inside.request())
    await reader.readuntil(b"\r\n\r\n")
    go.set()
    with pytest.raises(ConnectionError):
        await asyncio.wait_for(reader.read(), WAIT)
    writer.close()


@pytest.mark.parametrize(
    "said",
    [
        b"", b"HTTP/1.1 200", b"SSH-2.0\r\n\r\n", b"HTTP/1.1 200 OK\nX: y\n\n", b"HTTP/1.1 999 No\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"x" * 99999,
    ],
)  # fmt: skip
@with_world
async def test_an_upstream_that_does_not_answer_properly_is_an_error(world: World, said: bytes) -> None:
    inside = world.keyed()

    async def odd(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)

    world.upstream.reply = odd
    assert await answer(inside) == (502, "Upstream error: no proper answer")


@with_world
async def test_an_upstream_that_is_not_there_is_an_error(world: World) -> None:
    inside = world.keyed()
    world.upstream.server.close()
    await world.upstream.server.wait_closed()
    assert await answer(inside) == (502, "Upstream error: ConnectionRefusedError")


@with_world
async def test_an_answer_that_comes_before_the_body_is_through_arrives(world: World) -> None:
    inside = world.keyed()

    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Large\r\nContent-Length: 2\r\n\r\nno")

    server = await asyncio.start_server(early, "127.0.0.1", 0)
    world.models(mine=world.custom(apiKey="k", baseUrl=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"))
    inside = world.inside()
    reader, writer = await connect(inside.port)
    writer.write(inside.request(body=bytes(100_000))[:-50_000])
    assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\nno"), WAIT)).startswith(b"HTTP/1.1 413 ")
    writer.close()
    server.close()


@with_world
async def test_certificates_are_checked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, context = self_signed(world.folder)
    server = await asyncio.start_server(world.upstream.serve, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    world.models(mine=world.custom(apiKey="canary-key", baseUrl=f"https://localhost:{port}/v1"))
    inside = world.inside()
    assert await answer(inside) == (502, "Upstream error: SSLCertVerificationError")
    assert not world.upstream.requests
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    world.proxy.tls = ssl.create_default_context()
    assert (await answer(inside))[0] == 200
    assert world.upstream.requests[0][1]["authorization"] == "Bearer canary-key"
    server.close()


def self_signed(folder: Path) -> tuple[Path, Any]:
    """A certificate for `localhost` that nobody knows, and a server's context with it."""
    import datetime
    import ssl

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    made = made.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
    signed = made.sign(key, hashes.SHA256())
    pem = signed.public_bytes(serialization.Encoding.PEM)
    path, secret = folder / "cert.pem", folder / "key.pem"
    path.write_bytes(pem)
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(path, secret)
    return path, context


# -- sessions ------------------------------------------------------------------------------------------------------------


@with_world
async def test_a_revoked_session_is_cut_off_at_once(world: World) -> None:
    inside = world.keyed()
    gone = asyncio.Event()

    async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nx")
        await reader.read()
        gone.set()

    world.upstream.reply = stream
    reader, writer = await connect(inside.port)
    writer.write(inside.request())
    await reader.readuntil(b"\r\n\r\nx")
    world.proxy.revoke("s1")
    with pytest.raises(ConnectionError):
        await asyncio.wait_for(reader.read(), WAIT)
    await asyncio.wait_for(gone.wait(), WAIT)
    assert await answer(inside) == (403, "Session not registered")
    world.proxy.revoke("s1")
    world.proxy.revoke("unknown")
    writer.close()


@with_world
async def test_a_second_grant_takes_the_place_of_the_first(world: World) -> None:
    first, second = world.keyed(), world.keyed()
    assert first.secret != second.secret
    assert [(await answer(inside))[0] for inside in (first, second)] == [403, 200]


@with_world
async def test_a_secret_is_random_and_kept_as_its_hash(world: World) -> None:
    secrets = {world.keyed().secret for _ in range(20)}
    assert len(secrets) == 20 and all(len(base64.urlsafe_b64decode(secret[5:] + "=")) == 32 for secret in secrets)
    assert not any(secret in repr(vars(world.proxy)) for secret in secrets)


@with_world
async def test_the_port_stays_when_a_network_comes_again_and_another_is_taken_when_it_is_not_free(world: World) -> None:
    inside = world.keyed()
    await world.proxy.admit(SUBNET, GATEWAY)
    assert (await answer(inside))[0] == 200
    world.proxy.revoke("s1")
    await world.proxy.admit(SUBNET, GATEWAY)
    again = world.keyed()
    assert again.port == inside.port and (await answer(again))[0] == 200
    with socket.create_server(("127.81.0.1", 0)) as taken:
        await world.proxy.open(taken.getsockname()[1])
        await world.proxy.admit("127.81.0.0/16", "127.81.0.1")
        assert world.proxy.grant("s2", "127.81.0.1").models["providers"]["mine"]["baseUrl"]
    with pytest.raises(OSError):
        await world.proxy.admit("192.0.2.0/24", "192.0.2.1")


# -- logins are renewed --------------------------------------------------------------------------------------------------


class Issuer(Upstream):
    """A token server: each refresh token is good once."""

    def __init__(self) -> None:
        super().__init__()
        self.reply = self.issue
        self.good, self.given = "canary-r0", 0
        self.extra: Json = {}

    async def issue(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line, headers, body = self.requests[-1]
        if headers["content-type"].endswith("json"):
            fields = json.loads(body)
        else:
            import urllib.parse

            fields = dict(urllib.parse.parse_qsl(body.decode()))
        if fields["refresh_token"] != self.good:
            writer.write(b"HTTP/1.1 400 Bad\r\nContent-Length: 15\r\n\r\ncanary-complain")
            return
        self.given += 1
        self.good = f"canary-r{self.given}"
        tokens = {"access_token": f"canary-a{self.given}", "refresh_token": self.good, "expires_in": 3600, **self.extra}
        data = json.dumps({name: value for name, value in tokens.items() if value is not None}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data))


class Login:
    """A world whose login of `provider` has just run out, and its token server."""

    def __init__(self, world: World, issuer: Issuer, provider: str) -> None:
        self.world, self.issuer, self.provider = world, issuer, provider
        world.models(**{provider: {"baseUrl": world.upstream.url}})
        self.expire("canary-r0")

    def expire(self, refresh: str, **more: Any) -> None:
        entry = {"type": "oauth", "access": "canary-old", "refresh": refresh, "expires": oppi.now_ms() - 1, "own": 7, **more}
        self.world.login(**{self.provider: entry, "other": {"type": "api_key", "key": "canary-other", "more": [1]}})

    def ask(self, inside: Inside) -> Awaitable[tuple[int, str]]:
        path = {"anthropic": "/v1/messages", "kimi-coding": "/v1/messages", "openai-codex": "/codex/responses"}
        return answer(inside, self.provider, path.get(self.provider, "/responses"))

    def used(self) -> list[str]:
        return [headers["authorization"][len("Bearer "):] for _, headers, _ in self.world.upstream.requests]


@contextlib.asynccontextmanager
async def expired(world: World, monkeypatch: pytest.MonkeyPatch, provider: str = "anthropic") -> AsyncIterator[Login]:
    issuer = Issuer()
    await issuer.open()
    row = oppi.REFRESHERS[provider]
    monkeypatch.setitem(oppi.REFRESHERS, provider, (issuer.url + "/token", *row[1:]))
    yield Login(world, issuer, provider)
    issuer.server.close()


@pytest.mark.parametrize("provider", list(oppi.REFRESHERS))
@with_world
async def test_a_login_is_renewed_once_for_all_and_stored(
    world: World, monkeypatch: pytest.MonkeyPatch, provider: str
) -> None:
    async with expired(world, monkeypatch, provider) as login:
        inside = world.inside()
        assert await asyncio.gather(*(login.ask(inside) for _ in range(8))) == [(200, "{}")] * 8
        assert login.issuer.given == 1 and set(login.used()) == {"canary-a1"}
        stored = world.logins()
        assert stored["other"] == {"type": "api_key", "key": "canary-other", "more": [1]}
        entry = stored[provider]
        assert (entry["type"], entry["access"], entry["refresh"], entry["own"]) == ("oauth", "canary-a1", "canary-r1", 7)
        reserve = 300_000 if provider in ("anthropic", "xai") else 0
        assert abs(entry["expires"] + reserve - 3_600_000 - oppi.now_ms()) < 60_000
        assert (world.folder / "auth.json").stat().st_mode & 0o777 == 0o600
        assert not (world.folder / "auth.json.lock").exists()
        assert (await login.ask(inside))[0] == 200 and login.issuer.given == 1
        line, headers, body = login.issuer.requests[0]
        assert line == "POST /token HTTP/1.1" and oppi.REFRESHERS[provider][1].encode() in body
        assert "canary" not in str(world.log)


@with_world
async def test_a_token_server_may_keep_the_refresh_token(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with expired(world, monkeypatch) as login:
        login.issuer.extra = {"refresh_token": None, "expires_in": None}
        assert (await login.ask(world.inside()))[0] == 200
        assert world.logins()["anthropic"]["refresh"] == "canary-r0"


@pytest.mark.parametrize("extra", [{}, {"access_token": None}, {"expires_in": "soon"}])
@with_world
async def test_a_login_that_cannot_be_renewed_is_no_credential(
    world: World, monkeypatch: pytest.MonkeyPatch, extra: Json
) -> None:
    async with expired(world, monkeypatch) as login:
        login.issuer.extra = extra
        login.issuer.good = "canary-r0" if extra else "canary-gone"
        assert await login.ask(world.inside()) == (502, "No credential for: anthropic")
        assert world.logins()["anthropic"]["refresh"] == "canary-r0"
        assert world.log and "anthropic" in world.log[0] and "canary" not in str(world.log)
        assert not (world.folder / "auth.json.lock").exists()


@with_world
async def test_a_file_that_is_not_whole_is_never_written_over(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with expired(world, monkeypatch) as login:
        inside = world.inside()
        (world.folder / "auth.json").write_text('{"anthropic": {')
        assert (await login.ask(inside))[0] == 502 and not login.issuer.requests
        assert (world.folder / "auth.json").read_text() == '{"anthropic": {'


@with_world
async def test_a_token_that_soon_expires_is_used_when_it_cannot_be_renewed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with expired(world, monkeypatch) as login:
        login.expire("canary-gone", expires=oppi.now_ms() + 30_000)
        assert (await login.ask(world.inside()))[0] == 200
        assert login.used() == ["canary-old"] and len(login.issuer.requests) == 1


def locking(modules: Path) -> str:
    """The package with which pi locks, as a word of JavaScript."""
    return json.dumps(f"{modules}/proper-lockfile/index.js")


HOLDER = """
import lockfile from %s;
import fs from 'fs';
const file = process.argv[1];
const release = await lockfile.lock(file, {realpath: false, stale: 30000});
console.log('locked');
process.stdin.once('data', async (data) => {
  const stored = JSON.parse(fs.readFileSync(file, 'utf-8'));
  Object.assign(stored.anthropic, {access: 'canary-pi', refresh: 'canary-r9', expires: Date.now() + 3600000});
  fs.writeFileSync(file, JSON.stringify(stored, null, 2));
  await release();
  process.exit();
});
"""


@with_world
async def test_pi_that_holds_its_lock_is_waited_for_and_what_it_got_is_used(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, modules = node_and_modules("0.87.1")
    async with expired(world, monkeypatch) as login:
        holder = await asyncio.create_subprocess_exec(
            node, "--input-type=module", "-e", HOLDER % locking(modules), str(world.folder / "auth.json"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert holder.stdout and holder.stdin
        assert await asyncio.wait_for(holder.stdout.readline(), WAIT) == b"locked\n"
        asking = asyncio.ensure_future(login.ask(world.inside()))
        await until(lambda: world.proxy.refreshing, "a request that waits")
        await asyncio.sleep(0.1)
        assert not asking.done() and not login.issuer.requests
        holder.stdin.write(b"go\n")
        assert await asyncio.wait_for(asking, WAIT) == (200, "{}")
        assert login.used() == ["canary-pi"] and not login.issuer.requests
        assert world.logins()["anthropic"]["refresh"] == "canary-r9"
        await holder.wait()


TRIER = """
import lockfile from %s;
try { lockfile.lockSync(process.argv[1], {realpath: false}); console.log('got it'); } catch (e) { console.log(e.code); }
"""


@with_world
async def test_pi_finds_the_lock_held_while_a_login_is_renewed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    node, modules = node_and_modules("0.87.1")
    monkeypatch.setattr(oppi, "LOCK_BEAT_S", 0.02)
    async with expired(world, monkeypatch) as login:
        go, issue = asyncio.Event(), login.issuer.reply

        async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await go.wait()
            await issue(reader, writer)

        login.issuer.reply = slow
        asking = asyncio.ensure_future(login.ask(world.inside()))
        await until(lambda: login.issuer.requests, "a refresh")
        lock = world.folder / "auth.json.lock"
        os.utime(lock, (1, 1))  # as if much time had gone
        await until(lambda: lock.stat().st_mtime > time.time() - 5, "a sign of life")
        command = [node, "--input-type=module", "-e", TRIER % locking(modules), str(world.folder / "auth.json")]
        done = await asyncio.get_running_loop().run_in_executor(None, lambda: subprocess.run(command, capture_output=True))
        assert done.stdout == b"ELOCKED\n"
        closing = asyncio.ensure_future(world.proxy.close())  # a login that was renewed must not be lost
        await asyncio.sleep(0)
        go.set()
        await asyncio.wait_for(closing, WAIT)
        with contextlib.suppress(ConnectionError, IndexError):
            await asking
        assert world.logins()["anthropic"]["refresh"] == "canary-r1" and not lock.exists()


@with_world
async def test_a_lock_whose_holder_died_is_taken_over(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with expired(world, monkeypatch) as login:
        lock = world.folder / "auth.json.lock"
        lock.mkdir()
        os.utime(lock, (time.time() - 31, time.time() - 31))
        assert (await login.ask(world.inside()))[0] == 200 and not lock.exists()


@with_world
async def test_a_lock_that_is_never_given_back_is_not_waited_for_without_end(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with expired(world, monkeypatch) as login:
        monkeypatch.setattr(oppi, "LOCK_STALE_S", -4.9)
        lock = world.folder / "auth.json.lock"
        lock.mkdir()
        os.utime(lock, (time.time() + 60, time.time() + 60))
        assert (await login.ask(world.inside()))[0] == 502 and lock.exists()
        assert "could not be renewed: Unavailable" in world.log[0]


@with_world
async def test_new_tokens_are_kept_when_the_lock_was_lost(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oppi, "LOCK_BEAT_S", 0.01)
    async with expired(world, monkeypatch) as login:
        issue = login.issuer.reply

        async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            (world.folder / "auth.json.lock").rmdir()
            await asyncio.sleep(0.1)  # several signs of life
            await issue(reader, writer)

        login.issuer.reply = slow
        assert (await login.ask(world.inside()))[0] == 200
        assert world.logins()["anthropic"]["refresh"] == "canary-r1" and not world.log


@with_world
async def test_a_login_that_changed_meanwhile_is_not_written_over(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with expired(world, monkeypatch) as login:
        issue = login.issuer.reply

        async def meanwhile(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            login.expire("canary-new", access="canary-login", expires=oppi.now_ms() + DAY)
            await issue(reader, writer)

        login.issuer.reply = meanwhile
        assert (await login.ask(world.inside()))[0] == 200
        assert login.used() == ["canary-login"] and world.logins()["anthropic"]["refresh"] == "canary-new"


@with_world
async def test_a_link_to_the_real_file_stays_a_link(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with expired(world, monkeypatch) as login:
        (world.folder / "auth.json").rename(world.folder / "real.json")
        (world.folder / "auth.json").symlink_to("real.json")
        assert (await login.ask(world.inside()))[0] == 200
        assert (world.folder / "auth.json").is_symlink()
        assert json.loads((world.folder / "real.json").read_text())["anthropic"]["refresh"] == "canary-r1"


# -- bridges -------------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def echo() -> AsyncIterator[int]:
    """A model server on loopback that speaks no HTTP at all."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data[::-1])
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


@with_world
async def test_a_model_server_on_loopback_is_bridged_for_its_network_while_a_session_needs_it(world: World) -> None:
    async with echo() as port:
        local = world.custom(baseUrl=f"http://localhost:{port}/v1")
        world.models(local=local, twice={**local, "baseUrl": f"http://localhost:{port}/x"})
        first, second = world.inside(), world.inside("s2")
        address = first.base("local")
        assert address == f"http://{GATEWAY}:{port}/v1" and first.base("twice") == f"http://{GATEWAY}:{port}/x"
        assert first.grant.models["providers"]["local"]["apiKey"] == "none" and not first.grant.auth
        reader, writer = await connect(port)
        for size in (1, 1000, 300_000):
            data = os.urandom(size)
            writer.write(data)
            got = await asyncio.wait_for(reader.readexactly(size), WAIT)
            assert sorted(got) == sorted(data)
        for source in (OUTSIDE, "127.0.0.1"):
            with contextlib.suppress(ConnectionError):
                assert await exchange(port, b"hello", source) == b""
        world.proxy.revoke("s1")
        assert await reader_gets(reader, writer, b"still") == b"llits"
        world.proxy.revoke("s2")
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), WAIT) == b""
        writer.close()
        with pytest.raises(ConnectionRefusedError):
            await connect(port)
        assert second.base("local") == address


async def reader_gets(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> bytes:
    writer.write(data)
    return await asyncio.wait_for(reader.readexactly(len(data)), WAIT)


@with_world
async def test_a_bridge_to_nobody_closes_and_one_whose_port_is_taken_has_another(world: World) -> None:
    with socket.create_server((GATEWAY, 0)) as taken:
        port = taken.getsockname()[1]
        world.models(local=world.custom(baseUrl=f"http://127.0.0.1:{port}/v1"))
        inside = world.inside()
        bridge = int(inside.base("local").split(":")[2].split("/")[0])
        assert bridge != port
        with contextlib.suppress(ConnectionError):
            assert await exchange(bridge, b"hello") == b""


@with_world
async def test_only_plain_http_is_bridged(world: World) -> None:
    world.models(local=world.custom(baseUrl="https://localhost:9999/v1"))
    assert world.inside().grant.warnings == [
        "local cannot be used in a container: a server on this host is reached by plain http only."
    ]


# -- the real pi ---------------------------------------------------------------------------------------------------------

REAL = {  # one provider of each kind, and a model of it
    "anthropic": "claude-sonnet-4-5", "openai": "gpt-5", "openai-codex": "gpt-5.4", "google": "gemini-2.5-pro",
    "groq": "openai/gpt-oss-120b", "mistral": "devstral-medium-latest", "openrouter": "openai/gpt-5",
    "opencode": "claude-sonnet-4-5",
}  # fmt: skip


async def ask_pi(world: World, version: str, inside: Inside, provider: str, model: str) -> tuple[str, str]:
    """Output and errors of one prompt to the real pi, which has nothing but a grant."""
    agent = world.folder / f"agent-{version}-{provider}"
    agent.mkdir()
    for name, content in (("auth.json", inside.grant.auth), ("models.json", inside.grant.models)):
        (agent / name).write_text(json.dumps(content))
    (agent / "settings.json").write_text('{"retry": {"enabled": false}}')
    env = {
        "PATH": os.environ["PATH"], "HOME": str(agent), "PI_CODING_AGENT_DIR": str(agent), "PI_OFFLINE": "1",
    }  # fmt: skip
    flags = ["-p", "--no-session", "--no-extensions", "--no-skills", "--provider", provider, "--model", model]
    pi = await asyncio.create_subprocess_exec(
        install_pi(version), *flags, "!say hello from afar", env=env, cwd=agent,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, err = await asyncio.wait_for(pi.communicate(), 120)
    return out.decode(), err.decode()


def route_from_inside() -> None:
    """What connects to the gateway comes from the container's address, as a container's pi does."""
    jail.ip(f"route replace local {GATEWAY}/32 dev lo src {INSIDE} table local")


@pytest.mark.parametrize("version", ["0.73.1", "0.87.1"])
@with_world
async def test_the_real_pi_has_a_turn_with_nothing_but_a_grant(world: World, version: str) -> None:
    route_from_inside()
    with MockLLM() as llm:
        mine = json.loads(llm.models_json())["providers"]["mock"]
        mine.update(apiKey="!echo canary-key", headers={"X-Team": "canary-team"})
        world.models(mine=mine, groq={"baseUrl": mine["baseUrl"]})
        world.env["GROQ_API_KEY"] = "canary-groq"
        inside = world.inside()
        for provider, model in (("mine", "mock-1"), ("groq", REAL["groq"])):
            out, err = await ask_pi(world, version, inside, provider, model)
            assert "hello from afar" in out, err
        assert [request["model"] for request in llm.requests] == ["mock-1", REAL["groq"]]


ANTHROPIC = [
    {"type": "message_start", "message": {"id": "m", "type": "message", "role": "assistant", "model": "x", "content": [],
                                          "stop_reason": None, "usage": {"input_tokens": 1, "output_tokens": 1}}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hello from afar"}},
    {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 3}},
    {"type": "message_stop"},
]  # fmt: skip


@pytest.mark.parametrize("version", ["0.73.1", "0.87.1"])
@pytest.mark.parametrize("login", [False, True])
@with_world
async def test_the_real_pi_sends_a_stub_of_claude_as_it_would_the_key_or_login(world: World, version: str, login: bool) -> None:
    route_from_inside()

    async def claude(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for event in ANTHROPIC:
            writer.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())

    world.upstream.reply = claude
    world.models(anthropic={"baseUrl": world.upstream.url})
    oauth = {"type": "oauth", "access": "sk-ant-oat01-canary", "refresh": "canary-r", "expires": oppi.now_ms() + DAY}
    world.login(anthropic=oauth if login else {"type": "api_key", "key": "sk-ant-api03-canary"})
    out, err = await ask_pi(world, version, world.inside(), "anthropic", REAL["anthropic"])
    assert "hello from afar" in out, err
    line, headers, body = world.upstream.requests[0]
    assert line.startswith("POST /v1/messages") and b"hello from afar" in body
    assert headers.get("authorization") == ("Bearer sk-ant-oat01-canary" if login else None)
    assert headers.get("x-api-key") == (None if login else "sk-ant-api03-canary")
    assert ("oauth-2025-04-20" in headers.get("anthropic-beta", "")) is login
    assert "oppi-" not in str(headers)


@pytest.mark.parametrize("version", ["0.73.1", "0.87.1"])
@pytest.mark.parametrize("provider", ["google", "mistral", "openrouter", "opencode"])
@with_world
async def test_the_real_pi_reaches_a_provider_of_each_kind(world: World, version: str, provider: str) -> None:
    """It gets an error for an answer; what counts is that it asked in the right place and with the real key."""
    route_from_inside()

    async def sorry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = b'{"error": {"message": "not today", "type": "invalid_request_error"}}'
        writer.write(b"HTTP/1.1 400 Bad\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data))

    world.upstream.reply = sorry
    world.login(**{provider: {"type": "api_key", "key": "canary-key"}})
    world.models(**{provider: {"baseUrl": f"{world.upstream.url}/base"}})
    out, err = await ask_pi(world, version, world.inside(), provider, REAL[provider])
    assert world.upstream.requests, out + err
    line, headers, _ = world.upstream.requests[0]
    assert line.startswith("POST /base/") and "oppi-" not in str(headers) and "canary-key" in str(headers)


PART = {"type": "output_text", "text": "hello from afar", "annotations": []}
MESSAGE = {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [PART]}
RESPONSES: list[Json] = [
    {"type": "response.created", "response": {"id": "r", "status": "in_progress"}},
    {"type": "response.output_item.added", "output_index": 0, "item": {**MESSAGE, "status": "in_progress", "content": []}},
    {"type": "response.content_part.added", "item_id": "m", "output_index": 0, "content_index": 0, "part": {**PART, "text": ""}},
    {"type": "response.output_text.delta", "item_id": "m", "output_index": 0, "content_index": 0, "delta": "hello from afar"},
    {"type": "response.output_item.done", "output_index": 0, "item": MESSAGE},
    {"type": "response.completed", "response": {"id": "r", "status": "completed", "output": [MESSAGE], "usage": {
        "input_tokens": 1, "output_tokens": 1, "total_tokens": 2, "input_tokens_details": {"cached_tokens": 0}}}},
]  # fmt: skip


@pytest.mark.parametrize("version", ["0.73.1", "0.87.1"])
@pytest.mark.parametrize("provider", ["openai", "openai-codex"])
@with_world
async def test_the_real_pi_has_a_turn_with_a_key_or_a_login_of_openai(world: World, version: str, provider: str) -> None:
    route_from_inside()

    async def responses(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for n, event in enumerate(RESPONSES):
            writer.write(f"event: {event['type']}\ndata: {json.dumps({**event, 'sequence_number': n})}\n\n".encode())

    world.upstream.reply = responses
    login = {"type": "oauth", "access": jwt(CANARY), "refresh": "canary-r", "expires": oppi.now_ms() + DAY, "accountId": CANARY}
    world.login(**{provider: login if provider == "openai-codex" else {"type": "api_key", "key": "canary-key"}})
    world.models(**{provider: {"baseUrl": f"{world.upstream.url}/base"}})
    out, err = await ask_pi(world, version, world.inside(), provider, REAL[provider])
    assert "hello from afar" in out, err
    line, headers, _ = world.upstream.requests[0]
    assert line == f"POST /base/{'codex/' if provider == 'openai-codex' else ''}responses HTTP/1.1"
    assert headers["authorization"] == f"Bearer {jwt(CANARY) if provider == 'openai-codex' else 'canary-key'}"
    assert headers.get("chatgpt-account-id") == (CANARY if provider == "openai-codex" else None)
    assert "oppi-" not in str(headers)
