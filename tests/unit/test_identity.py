"""The identity, invites byte for byte, and who is let in for how long."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

import oppi

from .support import load

VECTORS = load("invites.json")
V2 = [pytest.param(vector, id=vector["name"]) for vector in VECTORS["v2"]]
V3 = [pytest.param(vector, id=vector["name"]) for vector in VECTORS["v3"]]
NOW = 1_000_000


def unpadded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def verify(envelope: dict[str, Any]) -> None:
    """What app 1.0 checks; raises InvalidSignature."""
    key = Ed25519PublicKey.from_public_bytes(unpadded(envelope["publicKey"]))
    key.verify(unpadded(envelope["sig"]), oppi.signing_input(envelope).encode())


def signed(vector: dict[str, Any]) -> dict[str, Any]:
    given, identity = vector["inputs"], vector["identity"]
    now = given.get("nowMs", vector["expected"]["iat"] * 1000 + 999)
    key = identity["privateKeyPem"]
    invite = oppi.Invite(**given["payload"])
    return oppi.signed_invite(invite, key, identity["keyId"], now, given["maxAgeSeconds"], given["nonce"])


@pytest.mark.parametrize("vector", V2)
def test_keys_and_fingerprint_of_the_vectors(vector: dict[str, Any]) -> None:
    identity = vector["identity"]
    raw = oppi.key_raw("PUBLIC", identity["publicKeyPem"])
    assert raw.hex() == identity["publicKeyRawHex"]
    assert oppi.fingerprint(raw) == identity["fingerprint"]
    assert oppi.public_pem(identity["privateKeyPem"]).strip() == identity["publicKeyPem"].strip()


@pytest.mark.parametrize("vector", V2)
def test_an_app_10_invite_is_byte_for_byte_the_reference(vector: dict[str, Any]) -> None:
    envelope, expected = signed(vector), vector["expected"]
    assert oppi.signing_input(envelope) == expected["signingInput"]
    digest = hashlib.sha256(oppi.signing_input(envelope).encode()).hexdigest()
    assert digest == expected["signingInputSha256Hex"]
    assert envelope["sig"] == expected["signatureBase64Url"]
    assert oppi.encode(envelope).decode() == expected["envelopeJson"] == expected["qrPayload"]
    assert oppi.invite_link(envelope) == expected["deepLink"]
    verify(envelope)


@pytest.mark.parametrize("vector", VECTORS["v2Negative"], ids=lambda vector: vector["name"])
def test_a_tampered_invite_does_not_verify(vector: dict[str, Any]) -> None:
    with pytest.raises(InvalidSignature):
        verify(json.loads(vector["envelopeJson"]))


@pytest.mark.parametrize("name", ["host", "token", "name", "fingerprint", "securityProfile"])
@pytest.mark.parametrize("evil", ["a\nport=1", "a\x00", "a\x7f", "\r"])
def test_no_value_can_forge_another_line_of_what_is_signed(name: str, evil: str) -> None:
    key, _ = oppi.generate_identity()
    fields = {"host": "h", "port": 1, "token": "t", "name": "n", "fingerprint": "f", name: evil}
    with pytest.raises(ValueError, match="control character"):
        oppi.signed_invite(oppi.Invite(**fields), key, "k", 0, 1, "n")


@pytest.mark.parametrize("vector", V3)
def test_an_app_11_invite_is_byte_for_byte_the_reference(vector: dict[str, Any]) -> None:
    shown, expected = vector["expected"]["pairJsonOutput"], vector["expected"]
    invite = oppi.Invite(shown["host"], shown["port"], shown["pairingToken"], shown["name"], shown["fingerprint"])
    payload = oppi.pairing_invite(invite, shown["scheme"], shown.get("tlsCertFingerprint", ""))
    assert oppi.encode(payload).decode() == expected["payloadJson"] == expected["qrPayload"]
    assert oppi.invite_link(payload) == expected["deepLink"] == shown["inviteURL"]


def test_a_fresh_identity_signs_what_its_public_half_verifies() -> None:
    private, public = oppi.generate_identity()
    assert private != oppi.generate_identity()[0]
    assert private.startswith("-----BEGIN PRIVATE KEY-----\n")
    assert (len(private), len(public)) == (119, 113)
    key = serialization.load_pem_private_key(private.encode(), None)
    assert key.public_key() == serialization.load_pem_public_key(public.encode())
    invite = oppi.Invite("h", 1, "t", "n", oppi.fingerprint(oppi.key_raw("PUBLIC", public)))
    envelope = oppi.signed_invite(invite, private, "k", 5_999, 60, "n")
    assert (envelope["iat"], envelope["exp"]) == (5, 65)
    verify(envelope)


@pytest.mark.parametrize("pem", ["", "junk", "-----BEGIN PUBLIC KEY-----\nMCow\n-----END PUBLIC KEY-----"])
def test_what_is_no_ed25519_public_key_is_refused(pem: str) -> None:
    with pytest.raises(ValueError):
        oppi.key_raw("PUBLIC", pem)


def test_another_kind_of_private_key_is_refused() -> None:
    key = rsa.generate_private_key(65537, 1024)
    options = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    with pytest.raises(ValueError, match="Ed25519"):
        oppi.public_pem(key.private_bytes(*options).decode())


def access(**state: Any) -> oppi.Access:
    return oppi.Access(state, owner="sk_owner")


def test_only_known_tokens_get_in() -> None:
    door = oppi.Access({}, owner="sk_owner", moved=["dt_moved"])
    phone = door.add("phone", "dt_phone", "v3", NOW)
    owner, changed = door.who("sk_owner", NOW)
    assert (owner, changed) == (door.owner_name(), False)
    assert door.who("dt_phone", NOW) == (phone["id"], False)
    assert door.who("dt_moved", NOW)[0].startswith("moved:")
    for wrong in ("", "dt_phone ", "DT_PHONE", "sk_owne", oppi.token_hash("dt_phone"), "\ud800"):
        assert door.who(wrong, NOW) == ("", False)


def test_everyone_let_in_is_listed_until_the_token_is_gone() -> None:
    door = oppi.Access({}, owner="sk_owner", moved=["dt_moved"])
    door.add("phone", "dt_phone", "v3", NOW)
    inside = {door.who(token, NOW)[0] for token in ("sk_owner", "dt_moved", "dt_phone")}
    assert door.principals() == inside
    door.revoke("phone")
    door.owner = "sk_rotated"  # the old owner's open sockets have to go too
    door.moved.clear()
    assert not door.principals() & inside


def test_without_an_owner_token_an_empty_one_opens_nothing() -> None:
    assert oppi.Access({}).who("", NOW) == ("", False)


def test_a_device_is_stored_without_its_token() -> None:
    door = access()
    door.add("phone", "dt_secret_phone_token", "v3", NOW)
    door.invite("v2", "sk_invite_secret", NOW + 1, "studio")
    assert "dt_secret_phone_token" not in json.dumps(door.state)
    assert "sk_invite_secret" not in json.dumps(door.state)


def test_an_app_10_invite_becomes_a_device_at_first_use() -> None:
    door = access()
    door.invite("v2", "sk_pending", NOW + 600_000, "studio")
    device, changed = door.who("sk_pending", NOW + 1)
    assert changed
    assert [d["id"] for d in door.devices] == [device]
    assert door.invites == []
    assert door.who("sk_pending", NOW + 10**12) == (device, False)  # a device does not expire


def test_an_app_10_invite_is_refused_after_its_time() -> None:
    door = access()
    door.invite("v2", "sk_pending", NOW + 600_000, "studio")
    assert door.who("sk_pending", NOW + 600_000) == ("", True)
    assert (door.invites, door.devices) == ([], [])


def test_an_app_10_invite_cannot_be_exchanged_at_pair_nor_a_pairing_token_used_as_bearer() -> None:
    door = access()
    door.invite("v2", "sk_pending", NOW + 9, "a")
    door.invite("v3", "pt_pending", NOW + 9, "b")
    assert door.redeem("sk_pending", NOW) == ""
    assert door.who("pt_pending", NOW) == ("", False)


def test_a_pairing_token_works_once_and_makes_a_device() -> None:
    door = access()
    door.invite("v3", "pt_good", NOW + 90_000, "studio")
    token = door.redeem("pt_good", NOW + 89_999)
    assert token.startswith("dt_")
    assert door.who(token, NOW)[0] == door.devices[0]["id"]
    assert door.devices[0]["name"] == "studio"
    assert door.redeem("pt_good", NOW) == ""
    assert len(door.devices) == 1


def test_a_pairing_token_is_refused_after_its_time() -> None:
    door = access()
    door.invite("v3", "pt_late", NOW + 90_000, "studio")
    assert door.redeem("pt_late", NOW + 90_000) == ""
    assert door.devices == []


def test_five_wrong_tries_kill_pairing_tokens_but_not_app_10_invites() -> None:
    door = access()
    door.invite("v3", "pt_good", NOW + 9, "a")
    door.invite("v2", "sk_good", NOW + 9, "b")
    for _ in range(4):
        assert door.redeem("pt_wrong", NOW) == ""
    assert len(door.invites) == 2
    assert door.redeem("pt_wrong", NOW) == ""
    assert door.redeem("pt_good", NOW) == ""
    assert door.who("sk_good", NOW)[0] != ""


def test_four_wrong_tries_leave_the_invite_alive() -> None:
    door = access()
    door.invite("v3", "pt_good", NOW + 9, "a")
    for _ in range(4):
        door.redeem("pt_wrong", NOW)
    assert door.redeem("pt_good", NOW).startswith("dt_")


@pytest.mark.parametrize("by", ["name", "id"])
def test_a_revoked_device_is_out_and_the_others_are_not(by: str) -> None:
    door = access()
    lost, kept = door.add("lost", "dt_lost", "v3", NOW), door.add("kept", "dt_kept", "v3", NOW)
    assert door.revoke(lost[by]) == [lost["id"]]
    assert door.who("dt_lost", NOW) == ("", False)
    assert door.who("dt_kept", NOW) == (kept["id"], False)
    assert door.revoke("nobody") == []


def test_invites_that_are_fresh_stay() -> None:
    door = access()
    door.invite("v3", "pt_a", NOW, "old")
    door.invite("v3", "pt_b", NOW + 1, "fresh")
    assert door.expire(NOW) is True
    assert [i["name"] for i in door.invites] == ["fresh"]
    assert door.expire(NOW) is False


def test_state_survives_a_restart() -> None:
    door = access()
    door.add("phone", "dt_phone", "v3", NOW)
    again = oppi.Access(json.loads(json.dumps(door.state)))
    assert again.who("dt_phone", NOW)[0] == door.devices[0]["id"]


def test_five_failures_of_one_address_block_it_for_two_minutes() -> None:
    limit = oppi.PairingLimit()
    for second in range(5):
        assert not limit.blocked("a", second)
        limit.failed("a", second)
    assert limit.blocked("a", 4)
    assert limit.blocked("a", 4 + 119)
    assert not limit.blocked("a", 4 + 120)
    assert not limit.blocked("b", 4)


def test_slow_failures_and_success_do_not_block() -> None:
    limit = oppi.PairingLimit()
    for second in range(0, 300, 20):
        limit.failed("slow", second)
        assert not limit.blocked("slow", second)
    for _ in range(4):
        limit.failed("good", 0)
    limit.cleared("good")
    limit.failed("good", 0)
    assert not limit.blocked("good", 0)
    limit.cleared("unheard of")


def test_a_flood_of_addresses_does_not_grow_memory() -> None:
    limit = oppi.PairingLimit()
    for number in range(5000):
        limit.failed(f"peer-{number}", 0)
    assert len(limit.failures) <= 1000
    assert "peer-4999" in limit.failures
