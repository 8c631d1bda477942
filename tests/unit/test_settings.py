"""config.json of both generations: defaults, problems in words, and what `config set` makes of a text."""

from __future__ import annotations

from typing import Any

import pytest

import oppi

DEFAULTS = {
    "configVersion": 2, "port": 7749, "host": "0.0.0.0", "defaultModel": "openai-codex/gpt-5.3-codex", "dataDir": None,
    "sessionIdleTimeoutMs": 600000, "workspaceIdleTimeoutMs": 1800000, "maxSessionsPerWorkspace": 20,
    "maxSessionsGlobal": 40, "approvalTimeoutMs": 120000, "security.profile": "tailscale-permissive",
    "security.requireTlsOutsideTailnet": True, "security.allowInsecureHttpInTailnet": True,
    "security.requirePinnedServerIdentity": True, "identity.enabled": True, "identity.algorithm": "ed25519",
    "identity.keyId": "srv-default", "identity.fingerprint": "", "invite.format": "v2-signed",
    "invite.maxAgeSeconds": 600, "invite.singleUse": False, "permissionGate": True, "runtimeEnv": {},
    "tls.mode": "disabled", "tls.certPath": None, "subagents.maxDepth": 1, "subagents.autoStopWhenDone": True,
    "subagents.startupGraceMs": 60000, "subagents.defaultWaitTimeoutMs": 1800000, "token": None, "autoTitle": None,
}  # fmt: skip
FILE_10 = {
    "configVersion": 2, "port": 7749, "host": "0.0.0.0", "dataDir": "/d", "defaultModel": "anthropic/claude-sonnet-4-0",
    "sessionIdleTimeoutMs": 600000, "workspaceIdleTimeoutMs": 1800000, "maxSessionsPerWorkspace": 3,
    "maxSessionsGlobal": 5, "approvalTimeoutMs": 120000, "token": "sk_x", "deviceTokens": ["aa"],
    "security": {"profile": "strict", "requireTlsOutsideTailnet": True, "allowInsecureHttpInTailnet": True,
                 "requirePinnedServerIdentity": True},
    "identity": {"enabled": True, "algorithm": "ed25519", "keyId": "srv-default",
                 "privateKeyPath": "/d/identity_ed25519", "publicKeyPath": "/d/identity_ed25519.pub",
                 "fingerprint": ""},
    "invite": {"format": "v2-signed", "maxAgeSeconds": 600, "singleUse": False},
}  # fmt: skip
FILE_11 = {
    "configVersion": 2, "port": 0, "permissionGate": True, "runtimePathEntries": ["/usr/bin"], "runtimeEnv": {"A": "b"},
    "tls": {"mode": "self-signed"}, "subagents": {"maxDepth": 0, "autoStopWhenDone": False},
    "policy": {"fallback": "ask"},
    "autoTitle": {"enabled": True}, "authDeviceTokens": ["dt_x"], "pushDeviceTokens": [], "pairingToken": "pt_x",
    "pairingTokenExpiresAt": 1.0, "thinkingLevelByModel": {"m": "low"},
}  # fmt: skip
PROBLEMS: list[tuple[Any, list[str]]] = [
    ({}, []),
    (FILE_10, []),
    (FILE_11, []),
    ([], ["config: expected object"]),
    (None, ["config: expected object"]),
    ({"port": "7749"}, ["config.port: expected number"]),
    ({"port": True}, ["config.port: expected number"]),
    ({"port": 77.5}, ["config.port: expected integer"]),
    ({"port": 65536}, ["config.port: expected <= 65535"]),
    ({"port": -1}, ["config.port: expected >= 0"]),
    ({"approvalTimeoutMs": 0}, []),
    ({"sessionIdleTimeoutMs": 0}, ["config.sessionIdleTimeoutMs: expected >= 1"]),
    ({"host": "  "}, ["config.host: expected non-empty string"]),
    ({"identity": {"fingerprint": 5}}, ["config.identity.fingerprint: expected string"]),
    ({"identity": {"fingerprint": ""}}, []),
    ({"identity": {"algorithm": "rsa"}}, ["config.identity.algorithm: expected one of ed25519"]),
    ({"security": {"profile": "x"}}, ["config.security.profile: expected one of tailscale-permissive, strict"]),
    ({"invite": {"maxAgeSeconds": 86401}}, ["config.invite.maxAgeSeconds: expected <= 86400"]),
    ({"invite": {"singleUse": "no"}}, ["config.invite.singleUse: expected boolean"]),
    ({"runtimePathEntries": ["/a", " "]}, ["config.runtimePathEntries: expected array of non-empty strings"]),
    ({"runtimeEnv": {"A": 1}}, ["config.runtimeEnv: expected object of strings"]),
    ({"policy": []}, ["config.policy: expected object"]),
    ({"security": 5}, ["config.security: expected object"]),
    ({"tls": {"mode": "manual", "certPath": "/c"}}, ["config.tls.keyPath: required when mode=manual"]),
    ({"tls": {"mode": "manual", "certPath": "/c", "keyPath": "/k"}}, []),
    ({"token": 5, "deviceTokens": "x", "thinkingLevelByModel": [], "pairingTokenExpiresAt": "x"}, []),
    (
        {"host": 5, "nope": 1, "tls": {"extra": 1}, "port": 0},
        ["config.nope: unknown key", "config.tls.extra: unknown key", "config.host: expected non-empty string"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), DEFAULTS.items())
def test_an_empty_file_means_the_documented_defaults(path: str, value: Any) -> None:
    assert oppi.Settings({})[path] == value


def test_pi_finds_programs_without_any_configuration() -> None:
    assert {"/usr/bin", "/bin", "/opt/homebrew/bin", "/usr/local/bin"} <= set(oppi.Settings({})["runtimePathEntries"])


@pytest.mark.parametrize(("raw", "problems"), PROBLEMS)
def test_validation_names_every_problem(raw: Any, problems: list[str]) -> None:
    assert oppi.config_errors(raw) == problems


def test_an_invalid_value_is_warned_about_and_replaced_by_its_default_but_not_lost() -> None:
    raw = {"port": 70000, "security": {"profile": "strict"}, "later": {"x": 1}}
    settings = oppi.Settings(raw)
    assert settings.warnings == ["config.port: expected <= 65535"]
    assert (settings["port"], settings["security.profile"]) == (7749, "strict")
    assert settings.raw == {"port": 70000, "security": {"profile": "strict"}, "later": {"x": 1}}


def test_a_value_that_is_not_a_section_hides_nothing() -> None:
    assert oppi.Settings({"tls": "x"})["tls.mode"] == "disabled"


def test_an_unknown_path_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        oppi.Settings({})["no.such"]


@pytest.mark.parametrize(
    ("raw", "timeout"),
    [
        ({"sessionTimeout": 5000}, 5000),
        ({"sessionTimeout": 5000, "sessionIdleTimeoutMs": 7000}, 7000),
        ({"sessionTimeout": "x"}, 600000),
    ],
)
def test_the_old_name_of_the_idle_timeout_is_understood(raw: dict[str, Any], timeout: int) -> None:
    assert oppi.Settings(raw)["sessionIdleTimeoutMs"] == timeout


def test_the_old_security_profile_is_understood() -> None:
    assert oppi.Settings({"security": {"profile": "legacy"}})["security.profile"] == "tailscale-permissive"
    assert oppi.Settings({"host": "legacy"})["host"] == "legacy"


def test_effective_settings_have_the_form_of_the_file() -> None:
    shown = oppi.Settings({"port": 1, "token": "sk_x", "tls": {"mode": "auto"}}).effective()
    assert (shown["port"], shown["token"], shown["tls"], shown["invite"]["maxAgeSeconds"]) == (
        1, "sk_x", {"mode": "auto"}, 600,
    )  # fmt: skip
    assert "deviceTokens" not in shown
    assert "policy" not in shown
    assert oppi.config_errors(shown) == []


def test_setting_a_path_makes_its_sections() -> None:
    raw: dict[str, Any] = {"tls": "junk", "kept": 1, "invite": {"format": "v2-signed"}}
    oppi.put_path(raw, "tls.mode", "auto")
    oppi.put_path(raw, "invite.maxAgeSeconds", 60)
    oppi.put_path(raw, "port", 1)
    invite = {"format": "v2-signed", "maxAgeSeconds": 60}
    assert raw == {"tls": {"mode": "auto"}, "kept": 1, "invite": invite, "port": 1}


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("port", "8080", 8080), ("port", "8e3", 8000), ("host", "127.0.0.1", "127.0.0.1"), ("host", "5", "5"),
        ("approvalTimeoutMs", "0", 0), ("security.profile", "strict", "strict"), ("permissionGate", "false", False),
        ("identity.fingerprint", "", ""), ("runtimePathEntries", '["/a"]', ["/a"]),
        ("runtimeEnv", '{"A":"b"}', {"A": "b"}),
        ("policy", '{"fallback":"ask"}', {"fallback": "ask"}), ("invite.maxAgeSeconds", "60", 60),
        ("tls", '{"mode":"auto"}', {"mode": "auto"}), ("subagents", "{}", {}),
        ("push.webhook", "https://ntfy.example/a-topic", "https://ntfy.example/a-topic"),
    ],
)  # fmt: skip
def test_config_set_reads_a_text_as_its_key_means_it(path: str, text: str, value: Any) -> None:
    parsed = oppi.parse_setting(path, text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("path", "text", "problem"),
    [
        ("port", "99999", "expected <= 65535"), ("port", "x", "not valid JSON"), ("port", "1.5", "expected integer"),
        ("port", "1e999", "expected integer"), ("host", " ", "non-empty"), ("tls.mode", "nope", "expected one of"),
        ("runtimeEnv", "[]", "object of strings"), ("permissionGate", "1", "expected boolean"),
        ("policy", "{", "not valid"), ("nope", "1", "Unknown key: nope. Available: "),
        ("token", "sk_x", "Unknown key: token"), ("tls", "5", "expected object"),
        ("tls", '{"mode":"nope"}', "expected one of"),
        ("tls", '{"nope":1}', "unknown key"), ("tls", '{"mode":"manual"}', "required when mode=manual"),
        ("push.webhook", "ntfy.example/topic", "expected http or https URL"),
    ],
)  # fmt: skip
def test_config_set_refuses_instead_of_storing_something_else(path: str, text: str, problem: str) -> None:
    with pytest.raises(oppi.UsageError, match=problem):
        oppi.parse_setting(path, text)


def test_the_list_of_keys_names_no_secret() -> None:
    with pytest.raises(oppi.UsageError) as error:
        oppi.parse_setting("nope", "1")
    names = str(error.value).partition("Available: ")[2].split(", ")
    assert {"port", "tls.mode", "security.profile"} <= set(names)
    assert not {"token", "pairingToken", "authDeviceTokens"} & set(names)


def test_every_setting_says_what_it_is_for() -> None:
    assert [key.path for key in oppi.KEYS if not key.state and not key.help] == []
    assert [key.path for key in oppi.KEYS if key.default is not None and oppi.CHECKS[key.kind](key, key.default)] == []
