"""Getting a token, keeping it, losing it: invites, devices, the owner token."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.phone import Phone, PhoneError, bootstrap_10, bootstrap_11, parse_invite_v2, parse_invite_v3
from tests.support.server import Server

from .rig import Rig, eventually, new_phone

WRONG = {"pairingToken": "pt_" + "x" * 24}
REFUSED = {"error": "Invalid or expired pairing token"}
BLOCKED = {"error": "Too many invalid pairing attempts. Try again later."}


@pytest.fixture
def server() -> Iterator[Server]:
    """A server of its own, for what changes who may talk to it."""
    with Server(config={"invite": {"maxAgeSeconds": 600}}) as server:
        yield server


def pair_from(server: Server, address: str, body: Any) -> tuple[int, Any]:
    """POST /pair from another loopback address, as another machine would."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10, source_address=(address, 0))
    connection.request("POST", "/pair", json.dumps(body))
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def status_of(server: Server, token: str, **headers: str) -> int:
    return Phone(server.base_url, token).raw("GET", "/me", headers=headers).status


def owner_token(server: Server) -> str:
    return str(json.loads((server.data / "config.json").read_text())["token"])


def rotate(server: Server, *options: str) -> None:
    done = server.cli("token", "rotate", *options)
    assert done.returncode == 0, done.stderr


class TestInvites:
    def test_each_app_pairs_with_its_own_invite(self, rig: Rig) -> None:
        invite = rig.server.invite()
        new, old = bootstrap_11(invite["inviteURL"]), bootstrap_10(invite["inviteURLv2"])
        assert new.token.startswith("dt_") and len(new.token) == 27
        assert old.token != new.token
        assert new.me()["user"] == old.me()["user"] == "owner"

    def test_a_v3_invite_works_once(self, rig: Rig) -> None:
        token = rig.server.invite()["pairingToken"]
        phone = Phone(rig.server.base_url)
        phone.pair(token)
        status, body = Phone(rig.server.base_url).request("POST", "/pair", {"pairingToken": token})
        assert (status, body) == (401, REFUSED)
        assert phone.me()

    def test_an_invite_may_have_spaces_around_it(self, rig: Rig) -> None:
        Phone(rig.server.base_url).pair(f"  {rig.server.invite()['pairingToken']}\n")

    @pytest.mark.parametrize("body", [{}, {"pairingToken": ""}, {"pairingToken": "  "}, {"pairingToken": 7}])
    def test_pairing_without_a_token_is_told_so(self, rig: Rig, body: Any) -> None:
        status, answer = Phone(rig.server.base_url).request("POST", "/pair", body)
        assert (status, answer) == (400, {"error": "pairingToken required"})

    def test_a_v2_invite_becomes_the_devices_token(self, rig: Rig) -> None:
        invite = parse_invite_v2(rig.server.invite()["inviteURLv2"])
        assert status_of(rig.server, invite.token) == 200
        assert status_of(rig.server, invite.token) == 200
        devices = json.loads(rig.server.cli("devices", "list", "--json").stdout)["devices"]
        assert any(device["kind"] == "v2" for device in devices)

    def test_a_v2_invite_is_no_pairing_token(self, rig: Rig) -> None:
        token = parse_invite_v2(rig.server.invite()["inviteURLv2"]).token
        assert pair_from(rig.server, "127.0.0.9", {"pairingToken": token}) == (401, REFUSED)

    def test_a_pairing_token_is_no_bearer_token(self, rig: Rig) -> None:
        assert status_of(rig.server, rig.server.invite()["pairingToken"]) == 401

    def test_no_invite_holds_the_owner_token(self, rig: Rig) -> None:
        invite, owner = rig.server.invite(), owner_token(rig.server)
        assert owner.startswith("sk_")
        assert owner not in json.dumps(parse_invite_v2(invite["inviteURLv2"]).envelope)
        assert parse_invite_v3(invite["inviteURL"]).token == ""
        assert owner not in json.dumps(invite) + json.dumps(parse_invite_v3(invite["inviteURL"]).envelope)

    def test_pair_counts_at_once_and_leaves_paired_phones_alone(self, rig: Rig) -> None:
        phone = rig.stream()
        new_phone(rig.server).me()
        assert phone.socket is not None and phone.closed is None


class TestExpiry:
    def test_a_v3_invite_dies_in_time(self, rig: Rig) -> None:
        token = rig.server.invite("--ttl", "1")["pairingToken"]
        made = time.monotonic()
        eventually(lambda: time.monotonic() - made > 1.05, what="the life of the invite")
        assert pair_from(rig.server, "127.0.0.8", {"pairingToken": token}) == (401, REFUSED)

    def test_a_v2_invite_dies_in_time(self) -> None:
        with Server(config={"invite": {"maxAgeSeconds": 1}}) as server:
            made = time.time()  # when the app scans it: a busy machine may need longer than it lives to get here
            invite = parse_invite_v2(server.invite()["inviteURLv2"], made)
            eventually(lambda: time.time() > invite.envelope["exp"] + 1, what="the life of the invite")
            assert status_of(server, invite.token) == 401
            stored = json.loads((server.data / "devices.json").read_text())
            assert stored["devices"] == []


class TestWrongTries:
    def test_five_wrong_tries_block_the_address_and_kill_the_invite(self, server: Server) -> None:
        token = server.invite()["pairingToken"]
        for _ in range(5):
            assert pair_from(server, "127.0.0.2", WRONG) == (401, REFUSED)
        assert pair_from(server, "127.0.0.2", {"pairingToken": token}) == (429, BLOCKED)
        assert pair_from(server, "127.0.0.3", {"pairingToken": token}) == (401, REFUSED)
        fresh = server.invite()["pairingToken"]
        assert pair_from(server, "127.0.0.2", {"pairingToken": fresh}) == (429, BLOCKED)
        assert pair_from(server, "127.0.0.3", {"pairingToken": fresh})[0] == 200

    def test_wrong_tries_spread_over_addresses_kill_the_invite_too(self, server: Server) -> None:
        token = server.invite()["pairingToken"]
        for number in range(5):
            assert pair_from(server, f"127.0.0.{20 + number}", WRONG)[0] == 401
        assert pair_from(server, "127.0.0.30", {"pairingToken": token}) == (401, REFUSED)

    def test_four_wrong_tries_do_not(self, server: Server) -> None:
        token = server.invite()["pairingToken"]
        for _ in range(4):
            pair_from(server, "127.0.0.2", WRONG)
        assert pair_from(server, "127.0.0.2", {})[0] == 400  # not counted
        assert pair_from(server, "127.0.0.2", {"pairingToken": token})[0] == 200

    def test_a_blocked_address_keeps_the_token_it_has(self, server: Server) -> None:
        phone = new_phone(server)
        for _ in range(6):
            Phone(server.base_url).raw("POST", "/pair", WRONG)
        assert phone.me()


class TestCredentials:
    def test_tokens_are_neither_stored_nor_logged(self, server: Server) -> None:
        phone = new_phone(server)
        old = bootstrap_10(server.invite()["inviteURLv2"])
        pending = server.invite()["pairingToken"]
        phone.raw("GET", f"/me?token={phone.token}", headers={"Authorization": f"bearer {phone.token}"})
        phone.open()
        phone.close()
        server.stop()
        said = "\n".join(server.stdout + server.stderr)
        kept = "\n".join(p.read_text("utf-8", "replace") for p in server.data.rglob("*") if p.is_file())
        for token in (phone.token, old.token, pending):
            assert token not in said and token not in kept
        assert owner_token(server) not in said

    def test_a_token_in_the_url_does_not_count(self, rig: Rig) -> None:
        token = rig.phone().token
        anonymous = Phone(rig.server.base_url)
        assert anonymous.raw("GET", f"/me?token={token}").status == 401
        with pytest.raises(Exception, match="401"):
            anonymous.connect_raw(f"/stream?token={token}")

    @pytest.mark.parametrize("form", ["bearer {}", "Bearer  {}", "BEARER {}", "Token {}", "{}", "Bearer", "Bearer {} x"])
    def test_only_the_exact_form_is_accepted(self, rig: Rig, form: str) -> None:
        answer = Phone(rig.server.base_url).raw("GET", "/me", headers={"Authorization": form.format(rig.phone().token)})
        assert (answer.status, answer.json()) == (401, {"error": "Unauthorized"})

    @pytest.mark.parametrize("kind", ["apns", "liveactivity"])
    def test_a_push_token_is_no_credential(self, rig: Rig, kind: str) -> None:
        push = "a1b2c3d4" * (8 if kind == "apns" else 9)
        assert rig.phone().call("POST", "/me/device-token", {"deviceToken": push, "tokenType": kind}) == {"ok": True}
        assert status_of(rig.server, push) == 401
        assert rig.phone().call("DELETE", "/me/device-token", {"deviceToken": push, "tokenType": kind}) == {"ok": True}

    def test_an_upgrade_without_a_token_names_the_scheme(self, rig: Rig) -> None:
        headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "x" * 24}
        answer = Phone(rig.server.base_url).raw("GET", "/stream", headers=headers)
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == 'Bearer realm="oppi"'


class TestDevices:
    def test_a_script_gets_a_token_once(self, server: Server) -> None:
        added = json.loads(server.cli("devices", "add", "backup", "--json").stdout)
        assert status_of(server, added["token"]) == 200
        listed = server.cli("devices", "list", "--json").stdout
        assert [d["name"] for d in json.loads(listed)["devices"]] == ["backup"]
        assert added["token"] not in listed

    def test_revoking_ends_that_devices_sockets_and_no_other(self, server: Server) -> None:
        token = json.loads(server.cli("devices", "add", "lost", "--json").stdout)["token"]
        lost, kept = Phone(server.base_url, token), new_phone(server)
        lost.open()
        kept.open()
        assert server.cli("devices", "revoke", "lost").returncode == 0
        lost.wait_closed(10)
        assert lost.raw("GET", "/me").status == 401
        assert kept.closed is None and kept.me()
        kept.close()

    def test_revoking_an_unknown_device_is_an_error(self, server: Server) -> None:
        done = server.cli("devices", "revoke", "nobody")
        assert done.returncode == 1
        assert "nobody" in done.stderr

    def test_a_paired_phone_is_revoked_by_its_id(self, server: Server) -> None:
        phone = new_phone(server)
        device = json.loads(server.cli("devices", "list", "--json").stdout)["devices"][0]
        assert server.cli("devices", "revoke", device["id"]).returncode == 0
        assert phone.raw("GET", "/me").status == 401


class TestOwner:
    def test_rotating_ends_every_client(self, server: Server) -> None:
        phone, owner = new_phone(server), Phone(server.base_url, owner_token(server))
        pending = server.invite()["pairingToken"]
        phone.open()
        owner.open()
        rotate(server)
        phone.wait_closed(10)
        owner.wait_closed(10)
        assert phone.raw("GET", "/me").status == owner.raw("GET", "/me").status == 401
        assert status_of(server, owner_token(server)) == 200
        with pytest.raises(PhoneError):
            Phone(server.base_url).pair(pending)

    def test_rotating_may_keep_the_devices(self, server: Server) -> None:
        phone, owner = new_phone(server), Phone(server.base_url, owner_token(server))
        owner.open()
        rotate(server, "--keep-devices")
        owner.wait_closed(10)
        assert phone.me()

    def test_tokens_of_the_original_go_on_working(self) -> None:
        old = {"token": "sk_" + "o" * 24, "authDeviceTokens": ["dt_" + "p" * 24], "deviceTokens": ["ab" * 32]}
        with Server(config=old) as server:
            assert status_of(server, old["token"]) == 200  # type: ignore[arg-type]
            assert status_of(server, "dt_" + "p" * 24) == 200
            assert status_of(server, "ab" * 32) == 401
            rotate(server)
            assert status_of(server, "dt_" + "p" * 24) == 401
