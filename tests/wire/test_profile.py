"""What the two security profiles mean: one test for each thing that `strict` does and the default does not."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.phone import Phone, bootstrap_11, parse_invite_v2
from tests.support.server import Server

from .rig import eventually

PERMISSIVE, STRICT = "tailscale-permissive", "strict"
DAY = 86_400_000
TAILNETS = ("100.64.0.0/10", "fd7a:115c:a1e0::/48")


def near_address() -> str:
    """An address of this machine that is neither loopback nor in a tailnet, as a peer of the local network has."""
    found = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), 0)}
    for family, target in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET, "198.51.100.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))  # sends nothing: the system only says from where it would
            found.add(probe.getsockname()[0])
    addresses = [ipaddress.ip_address(str(text).partition("%")[0]) for text in sorted(map(str, found))]
    near = [a for a in addresses if not a.is_loopback and not a.is_link_local and a.version == 4]
    near = [a for a in near if a not in ipaddress.ip_network(TAILNETS[0])]
    assert near, f"this machine has only {addresses}: the tests of the profiles need an address on some network"
    return str(near[0])


@contextlib.contextmanager
def listening(profile: str = "", **config: Any) -> Iterator[Server]:
    """A server that can be reached by every address of this machine."""
    security = {"security": {"profile": profile}} if profile else {}
    with Server(start=False, config={**security, **config}) as server:
        server.start("--host", "0.0.0.0")
        yield server


@pytest.fixture(scope="module")
def module_server() -> Iterator[Server]:
    with listening() as server:
        yield server


@pytest.fixture(scope="module")
def here(module_server: Server) -> Phone:
    """A phone on this machine."""
    return module_server.pair("1.0")


@pytest.fixture
def server(module_server: Server, here: Phone) -> Iterator[Server]:
    """The module's server, with the default profile."""
    yield module_server
    use(here, PERMISSIVE)


def use(phone: Phone, profile: str) -> None:
    assert phone.call("PUT", "/security/profile", {"profile": profile})["profile"] == profile


def near(server: Server, phone: Phone) -> Phone:
    """The same device on the local network."""
    return Phone(f"http://{near_address()}:{server.port}", phone.token, "1.1")


def age(server: Server, days: float) -> None:
    """Let every paired phone have been used last so many days ago."""
    path = server.data / "devices.json"
    state = json.loads(path.read_text("utf-8"))
    for device in state["devices"]:
        device["createdAt"] = device["lastUsedAt"] = int(time.time() * 1000 - days * DAY)
    path.write_text(json.dumps(state))


class TestPlainHttp:
    def test_the_default_lets_the_local_network_in(self, server: Server, here: Phone) -> None:
        assert here.security_profile()["profile"] == PERMISSIVE
        other = near(server, here)
        assert other.me() and other.health()
        other.open()
        other.drop()
        assert bootstrap_11(server.invite("--host", near_address())["inviteURL"]).me()

    def test_strict_refuses_it_whatever_it_asks(self, server: Server, here: Phone) -> None:
        use(here, STRICT)
        other = near(server, here)
        for method, path in (
            ("GET", "/health"),
            ("GET", "/me"),
            ("POST", "/pair"),
            ("GET", "/nowhere"),
            ("PUT", "/security/profile"),
        ):
            body = {"profile": PERMISSIVE, "pairingToken": "x"} if method != "GET" else None
            answer = other.raw(method, path, body)
            assert answer.status == 403 and list(answer.json()) == ["error"], path
            assert answer.headers["content-type"] == "application/json" and answer.headers["x-oppi-protocol"] == "2"
        assert here.security_profile()["profile"] == STRICT
        token = server.invite()["pairingToken"]
        assert other.raw("POST", "/pair", {"pairingToken": token}).status == 403
        assert Phone(server.base_url).pair(token)  # which is not used up
        use(here, PERMISSIVE)
        assert other.me()

    def test_strict_refuses_its_sockets(self, server: Server, here: Phone) -> None:
        use(here, STRICT)
        other = near(server, here)
        for path in ("/stream", "/workspaces/x/sessions/y/stream", "/nowhere"):
            with pytest.raises(Exception, match="403"):
                other.connect_raw(path)

    def test_strict_closes_the_sockets_of_those_it_refuses(self, server: Server, here: Phone) -> None:
        local, other = Phone(server.base_url, here.token, "1.1"), near(server, here)
        for phone in (local, other):
            phone.open()
        use(here, STRICT)
        other.wait_closed(10)
        assert local.closed is None
        local.send("permission_response", id="unknown", action="deny", requestId="r1")
        local.wait("command_result", since=0)  # it still answers
        local.drop()

    def test_what_the_command_line_sets_counts_without_a_request(self, server: Server, here: Phone) -> None:
        other = near(server, here)
        other.open()
        done = server.cli("config", "set", "security.profile", STRICT)
        assert done.returncode == 0, done.stderr
        other.wait_closed(10)
        assert other.raw("GET", "/me").status == 403

    def test_a_connection_that_was_let_in_before_is_refused_too(self, server: Server, here: Phone) -> None:
        other = near(server, here)
        connection = other._connection(10)
        headers = {"Authorization": "Bearer " + here.token}
        for profile, status in ((PERMISSIVE, 200), (STRICT, 403)):
            use(here, profile)
            connection.request("GET", "/me", headers=headers)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == status
        connection.close()

    def test_loopback_is_let_in_by_both(self, server: Server, here: Phone) -> None:
        for profile in (STRICT, PERMISSIVE):
            use(here, profile)
            assert here.me()
            assert Phone(server.base_url, here.token, "1.1").open()["type"] == "stream_connected"


class TestWorkspaces:
    PRESETS = ("container", "host", "host_standard", "host_locked", None)

    def made(self, phone: Phone) -> dict[Any, str]:
        found = {}
        for preset in self.PRESETS:
            body = {"name": "W", "skills": [], "runtime": "host", **({"policyPreset": preset} if preset else {})}
            key = phone.call("POST", "/workspaces", body, expect=201)["workspace"]["id"]
            found[preset] = phone.call("GET", f"/workspaces/{key}")["workspace"].get("policyPreset")
        return found

    def test_the_default_takes_the_preset_as_it_is_given(self, here: Phone, server: Server) -> None:
        made = self.made(here)
        assert made == {**{preset: preset for preset in self.PRESETS}, None: made[None]} and made[None] in ("container", None)

    def test_strict_asks_before_what_is_not_read_only(self, here: Phone, server: Server) -> None:
        before = here.create_workspace("Old", policyPreset="host")["id"]
        use(here, STRICT)
        assert self.made(here) == {**dict.fromkeys(self.PRESETS, "host_standard"), "host_locked": "host_locked"}
        assert here.call("GET", f"/workspaces/{before}")["workspace"]["policyPreset"] == "host"  # only new ones

    def test_so_do_the_first_two(self) -> None:
        with Server(config={"security": {"profile": STRICT}}) as server:
            presets = [workspace["policyPreset"] for workspace in server.pair("1.0").workspaces()]
            assert presets == ["host_standard"] * 2


class TestInvites:
    def lives(self, server: Server, *options: str) -> dict[str, float]:
        """Seconds that fresh invites live, by kind."""
        asked = time.time()
        invite = server.invite(*options)
        envelope = parse_invite_v2(invite["inviteURLv2"]).envelope
        stored = json.loads((server.data / "devices.json").read_text())["invites"]
        newest = {item["kind"]: item["expiresAt"] / 1000 - asked for item in stored}
        assert abs(envelope["exp"] - envelope["iat"] - newest["v2"]) < 10
        return newest

    def test_the_default_lets_them_live_as_long_as_they_are_told(self, server: Server, here: Phone) -> None:
        changed = here.call("PUT", "/security/profile", {"invite": {"maxAgeSeconds": 1800}})
        assert changed["invite"]["maxAgeSeconds"] == 1800
        lives = self.lives(server, "--ttl", "1200")
        assert lives["v2"] == pytest.approx(1800, abs=10) and lives["v3"] == pytest.approx(1200, abs=10)

    def test_strict_lets_none_live_longer_than_ten_minutes(self, server: Server, here: Phone) -> None:
        here.call("PUT", "/security/profile", {"invite": {"maxAgeSeconds": 1800}, "profile": STRICT})
        assert here.security_profile()["invite"]["maxAgeSeconds"] == 600
        lives = self.lives(server, "--ttl", "1200")
        assert lives["v2"] == pytest.approx(600, abs=10) and lives["v3"] == pytest.approx(600, abs=10)
        here.call("PUT", "/security/profile", {"invite": {"maxAgeSeconds": 300}})
        lives = self.lives(server, "--ttl", "60")
        assert lives["v2"] == pytest.approx(300, abs=10) and lives["v3"] == pytest.approx(60, abs=10)

    def test_both_apps_pair_under_strict(self, server: Server, here: Phone) -> None:
        use(here, STRICT)
        assert server.pair("1.0").me() and server.pair("1.1").me()


class TestUnusedDevices:
    @pytest.mark.parametrize(("profile", "days", "status"), [(PERMISSIVE, 9999, 200), (STRICT, 89.9, 200), (STRICT, 90.1, 401)])
    def test_how_long_a_token_lives_without_use(self, profile: str, days: float, status: int) -> None:
        with Server(config={"security": {"profile": profile}}) as server:
            phone = server.pair("1.1")
            owner = json.loads((server.data / "config.json").read_text())["token"]
            server.stop()
            age(server, days)
            server.start()
            assert phone.raw("GET", "/me").status == status
            assert Phone(server.base_url, owner).raw("GET", "/me").status == 200
            devices = json.loads((server.data / "devices.json").read_text())["devices"]
            assert len(devices) == (1 if status == 200 else 0)

    def test_use_counts(self) -> None:
        with Server(config={"security": {"profile": STRICT}}) as server:
            phone = server.pair("1.1")
            server.stop()
            age(server, 60)
            server.start()
            assert phone.me()
            [device] = json.loads((server.data / "devices.json").read_text())["devices"]
            assert device["lastUsedAt"] > time.time() * 1000 - DAY

    def test_a_server_that_runs_forgets_them_too(self, server: Server, here: Phone) -> None:
        lost = Phone(server.base_url, server.pair("1.1").token, "1.1")
        use(here, STRICT)
        owner = Phone(server.base_url, json.loads((server.data / "config.json").read_text())["token"], "1.0")
        lost.open()
        age(server, 100)
        assert eventually(lambda: lost.raw("GET", "/me").status == 401)
        lost.wait_closed(10)
        here.token = owner.token  # which stays
        assert here.me()
