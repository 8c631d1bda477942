"""`oppi doctor`: what it says of a machine, on which scripts stand in for the programs it asks."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from tests.support.server import MARK, ROOT, Server

from . import test_cli
from .test_cli import INSTALL, Shell, free_port, oppi_port, serving, terminal, tree

NAMES = "Python System pi Node Containers Settings Secrets Disk Server Tailscale Sleep Push Pairing".split()
MACOS = {
    "sw_vers": "echo 26.1",
    "sysctl": 'case "$2" in machdep.cpu.brand_string) echo Apple M4;; hw.optional.arm64) echo 1;; *) exit 1;; esac',
    "pmset": "printf 'Battery Power:\\n sleep 1\\n displaysleep 2\\nAC Power:\\n displaysleep 10\\n sleep 0\\n'",
    "scutil": "echo studio",
}
CONTAINER = """case "$*" in
"--version") echo "container CLI version 1.2.2 (build: release, commit: 0000000)";;
"system status") echo running;;
"system status --format json") echo '{"appRoot":"%s","status":"running"}';;
*) exit 64;;
esac"""
TAILSCALE = """case "$1" in
status) echo '{"BackendState":"Running","Self":{"DNSName":"studio.tail0.ts.net."}}';;
ip) echo 100.64.0.7;;
esac"""
HANGS = "sleep 300\n:"  # not the shell itself waits, but a child that has its output open
HOSTILE = r"printf 'v22.19.0 \033[2J\033]0;owned\007 \342\200\256 \377\n%s\n\n' sk_abcdefghijklmnop; yes 1 | head -c 3000000"


class Machine(Shell):
    """A shell on a machine with programs of ours."""

    def has(self, **scripts: str) -> Machine:
        folder = self.home / ".local" / "bin"
        folder.mkdir(parents=True, exist_ok=True)
        for name, body in scripts.items():
            path = folder / name
            path.write_text(f"#!/bin/sh\nexport {MARK}={self.server.mark}\n{body}\n")
            path.chmod(0o755)
        return self

    def doctor(self, **options: Any) -> dict[str, dict[str, str]]:
        """What it says, by name; all that holds whatever it says is checked."""
        done = self.run("doctor", "--json", **options)
        assert done.stderr == "", done.stderr
        said = json.loads(done.stdout)
        rows: list[dict[str, str]] = said["checks"]
        assert [row["name"] for row in rows] == NAMES
        assert all(sorted(row) == ["fix", "level", "name", "text"] and row["text"] for row in rows)
        assert all(bool(row["fix"]) == (row["level"] in ("warn", "fail")) for row in rows)
        assert said["ok"] == all(row["level"] != "fail" for row in rows) == (done.returncode == 0)
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", done.stdout.replace("\n", ""))
        for row in rows:  # what a person types here, in short
            row["fix"] = re.sub(r"python3 \S*oppi\.py(?= )", "oppi", row["fix"])
        return {row["name"]: row for row in rows}

    def says(self, name: str, level: str, text: str = "", fix: str = "", **options: Any) -> None:
        row = self.doctor(**options)[name]
        assert (row["level"], text in row["text"], fix in row["fix"]) == (level, True, True), row


@pytest.fixture
def machine() -> Iterator[Machine]:
    """Nothing is set up yet."""
    with Server(start=False) as server:
        yield Machine(server).has(systemctl="exit 1", loginctl="exit 1", node="echo v22.19.0")


@pytest.fixture
def mac(machine: Machine) -> Machine:
    """A Mac with everything."""
    root = machine.home / "containers"
    (root / "kernels").mkdir(parents=True)
    (root / "kernels" / "default.kernel-arm64").touch()
    return machine.has(**MACOS, container=CONTAINER % str(root).replace("/", "\\/"), tailscale=TAILSCALE)


def all_files(machine: Machine) -> dict[str, bytes]:
    return {**tree(machine.data), **tree(machine.home)}


class TestAll:
    def test_a_machine_on_which_nothing_is_set_up(self, machine: Machine) -> None:
        """Nothing is made, and every line that is not good has a command."""
        before = all_files(machine)
        levels = {name: row["level"] for name, row in machine.doctor().items() if row["level"] != "ok"}
        assert levels == {"pi": "fail", "Server": "warn", "Tailscale": "warn", "Push": "warn", "Pairing": "warn"}
        assert all_files(machine) == before
        missing = machine.home / "deep" / "nowhere"
        machine.says("Settings", "ok", "made by the first start", env={"OPPI_DATA_DIR": str(missing)})
        assert not missing.parent.exists()

    def test_a_machine_on_which_everything_is(self, mac: Machine) -> None:
        mac("init", "--yes")
        mac("devices", "add", "phone")
        mac("config", "set", "push.webhook", "https://ntfy.example/secret-topic")
        (mac.server.agent_dir / "auth.json").write_text('{"anthropic": {"type": "api_key", "key": "k-canary"}}')
        port = str(free_port())
        with serving(mac, "--host", "0.0.0.0", "--port", port) as server:
            server.shows("Ctrl+C")
            rows = mac.doctor()
            assert {row["level"] for row in rows.values()} == {"ok"}, rows
            assert rows["System"]["text"] == "macOS 26.1 on Apple M4"
            assert "1.2.2" in rows["Containers"]["text"] and rows["Pairing"]["text"] == "1 paired; an owner token"
            assert f"studio.local:{port}" in rows["Server"]["text"] and f"100.64.0.7:{port}" in rows["Server"]["text"]
            assert str(server.process.pid) in rows["Server"]["text"] and "studio.tail0.ts.net" in rows["Tailscale"]["text"]
            shown = mac("doctor")
            for secret in ("k-canary", "secret-topic", mac.token):
                assert secret not in shown + json.dumps(rows)

    def test_it_fits_a_terminal(self, machine: Machine) -> None:
        machine.write_config("{" * 200)
        done = machine.run("doctor")
        lines = done.stdout.splitlines()
        assert done.returncode == 1 and "\x1b" not in done.stdout
        assert all(len(line) <= 80 or line.startswith(" " * 13 + "→ ") for line in lines), done.stdout
        assert [line[2:13].strip() for line in lines if line[0] != " "] == NAMES
        assert {line[0] for line in lines} == {"✓", "!", "✗", " "}
        assert any(re.fullmatch(r" {13}→ python3 \S*oppi\.py config validate", line) for line in lines)

    def test_colours_are_for_terminals_and_can_be_switched_off(self, machine: Machine) -> None:
        for env, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
            with terminal(machine, "doctor", **env) as shown:
                code, text = shown.ends()
            assert code == 1 and "✓" in text and ("\x1b[32m✓\x1b[0m" in text) == coloured == ("\x1b" in text)

    def test_programs_that_hang_cost_one_time_limit(self, mac: Machine) -> None:
        """Also when what holds their output open is a child of theirs."""
        names = ("node", "sw_vers", "sysctl", "pmset", "container", "tailscale", "scutil", "systemctl", "loginctl")
        mac.has(**dict.fromkeys(names, HANGS), pi=HANGS)
        begun = time.monotonic()
        rows = mac.doctor(env={"OPPI_PI_BIN": str(mac.home / ".local/bin/pi"), "ANTHROPIC_API_KEY": "k"})
        assert time.monotonic() - begun < 12  # one by one they would take 50
        assert rows["pi"]["level"] == "fail"
        for name in ("pi", "Node", "System", "Tailscale"):
            assert "took longer than 4 s" in rows[name]["text"]
        assert not mac.server.wait_no_orphans(3)

    def test_what_programs_print_can_do_no_harm(self, mac: Machine) -> None:
        names = ("node", "sw_vers", "sysctl", "pmset", "container", "tailscale", "scutil", "systemctl", "loginctl")
        mac.has(**dict.fromkeys(names, HOSTILE), pi=HOSTILE + " >&2")
        env = {"OPPI_PI_BIN": str(mac.home / ".local/bin/pi"), "KEY\x1b[2J_API_KEY": "k"}
        rows = mac.doctor(env=env)
        assert "\\u{1b}[2J" in rows["Node"]["text"] and "\\u{202e}" in rows["Node"]["text"]
        assert "sk_[redacted]" in rows["Node"]["text"] and "sk_abc" not in json.dumps(rows)
        assert all(len(row["text"]) <= 400 for row in rows.values())
        shown = mac.run("doctor", env=env)
        assert shown.stderr == "" and not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown.stdout)

    @pytest.mark.parametrize("body", ["exit 3", "kill -9 $$", "echo", "echo '{'", "echo '[]'", "echo -1", "printf '\\377\\376'"])
    def test_programs_that_are_broken(self, mac: Machine, body: str) -> None:
        """Each has its own line, and the rest is as it is."""
        names = ("node", "sysctl", "pmset", "container", "tailscale", "scutil")
        rows = mac.has(**dict.fromkeys(names, body)).doctor()
        assert rows["Disk"]["level"] == rows["Settings"]["level"] == "ok" and rows["Sleep"]["level"] == "warn"

    def test_a_program_that_is_none(self, machine: Machine) -> None:
        path = machine.home / ".local/bin/pi"
        path.write_bytes(b"\0\1\2")
        path.chmod(0o755)
        machine.says("pi", "fail", "Exec format error", INSTALL, env={"OPPI_PI_BIN": str(path), "OPENAI_API_KEY": "k"})


class TestPi:
    def test_missing(self, machine: Machine) -> None:
        for place in ("/usr/local/bin", "/usr/bin", "/bin", "/opt/homebrew/bin"):
            assert not Path(place, "pi").exists(), "a pi is installed for everybody here"
        env = {"OPPI_PI_BIN": "", "PATH": "/usr/bin:/bin"}
        machine.says("pi", "fail", "missing: pi, the coding agent", INSTALL, env=env)

    def test_logins_are_named_without_what_they_hold(self, machine: Machine) -> None:
        machine.says("pi", "fail", "missing: a model provider", "/login")
        agent = machine.server.agent_dir
        (agent / "auth.json").write_text("{ broken")
        machine.says("pi", "warn", "not logged in", "/login")
        (agent / "auth.json").write_text('{"anthropic": {"type": "oauth", "access": "k-canary", "refresh": "k-canary"}}')
        (agent / "models.json").write_text('{"providers": {"local": {"apiKey": "k-canary"}}}')
        row = machine.doctor(env={"OPENAI_API_KEY": "k-canary", "EMPTY_API_KEY": ""})["pi"]
        assert row["level"] == "ok" and row["text"].endswith("set up for anthropic, local, OPENAI_API_KEY")

    @pytest.mark.parametrize(
        ("body", "text"), [("exit 3", "ended with 3"), ("echo hello", "nothing of use"), ("echo 1.2.3; exit 1", "ended with 1")]
    )
    def test_broken(self, machine: Machine, body: str, text: str) -> None:
        machine.has(pi=body)
        env = {"OPPI_PI_BIN": str(machine.home / ".local/bin/pi"), "OPENAI_API_KEY": "k"}
        machine.says("pi", "fail", text, INSTALL, env=env)


class TestContainers:
    def test_without_a_mac_nothing_is_wrong(self, machine: Machine) -> None:
        machine.has(container="echo 1.2.2")
        machine.says("Containers", "ok", "need a Mac")
        assert machine.doctor()["System"]["text"].startswith(os.uname().sysname)

    def test_with_an_intel_mac_neither(self, mac: Machine) -> None:
        mac.has(sysctl="case $2 in hw.optional.arm64) exit 1;; *) echo 'Intel(R) Core(TM) i7';; esac").says("Containers", "ok")
        assert mac.doctor()["System"]["text"] == "macOS 26.1 on Intel(R) Core(TM) i7"

    @pytest.mark.parametrize("version", ["15.7.1", "9", "2"])
    def test_an_old_system(self, mac: Machine, version: str) -> None:
        mac.has(sw_vers=f"echo {version}").says("Containers", "warn", f"need macOS 26, this is {version}", "softwareupdate")

    def test_not_installed(self, mac: Machine) -> None:
        (mac.home / ".local/bin/container").unlink()
        mac.says("Containers", "warn", "not installed", "github.com/apple/container")

    def test_services_down(self, mac: Machine) -> None:
        down = 'case "$1" in --version) echo 1.2.2;; *) echo "Error: XPC connection error" >&2; exit 1;; esac'
        fix = "container system start --enable-kernel-install"
        mac.has(container=down).says("Containers", "warn", "services do not run", fix)

    def test_no_kernel(self, mac: Machine) -> None:
        (mac.home / "containers/kernels/default.kernel-arm64").unlink()
        mac.says("Containers", "warn", "no Linux kernel", "container system kernel set --recommended")

    def test_the_shapes_of_other_releases(self, mac: Machine) -> None:
        """0.9 knows no --format, and 1.4 nests the paths."""
        kernels = mac.home / "Library/Application Support/com.apple.container/kernels"
        kernels.mkdir(parents=True)
        old = 'case "$*" in --version) echo 0.9.0;; "system status") echo running;; *) exit 64;; esac'
        mac.has(container=old).says("Containers", "warn", "no Linux kernel")
        (kernels / "default.kernel-arm64").touch()
        mac.says("Containers", "ok", "0.9.0")
        nested = json.dumps({"status": "running", "paths": {"appRoot": str(mac.home / "containers")}}, indent=1)
        new = f"case \"$*\" in --version) echo 1.4.1;; 'system status') ;; *) echo {shlex.quote(nested)};; esac"
        (kernels / "default.kernel-arm64").unlink()
        mac.has(container=new).says("Containers", "ok", "1.4.1")


class TestSettings:
    @pytest.mark.parametrize("text", test_cli.TestBrokenConfig.BROKEN, ids=lambda text: repr(text[:12]))
    def test_a_broken_file_is_told_and_kept(self, machine: Machine, text: bytes) -> None:
        machine.write_config(text)
        machine.data.joinpath("config.json").chmod(0o600)
        rows = machine.doctor()
        assert rows["Settings"]["level"] == "fail" and "config.json" in rows["Settings"]["text"]
        assert rows["Settings"]["fix"] == "oppi config validate" and rows["Disk"]["level"] == "ok"
        assert machine.config_bytes() == text

    def test_a_wrong_value(self, machine: Machine) -> None:
        machine.write_config({"port": 99999})
        machine.says("Settings", "warn", "config.port", "oppi config validate")

    def test_what_keeps_the_server_from_starting(self, machine: Machine) -> None:
        machine.write_config({"tls": {"mode": "self-signed"}})
        machine.says("Settings", "fail", "tls.mode", "oppi config set tls.mode disabled")


class TestSecrets:
    @pytest.mark.parametrize("name", ["config.json", "devices.json", "identity_ed25519", "audit.jsonl", "env", "apns.p8", "."])
    def test_what_others_may_read_is_named_and_mended(self, machine: Machine, name: str) -> None:
        machine("init", "--yes")
        path = machine.data / name
        if not path.exists():
            path.touch(0o600)
        machine.says("Secrets", "ok")
        path.chmod(0o704 if name == "." else 0o640)
        row = machine.doctor()["Secrets"]
        assert row["level"] == "fail" and path.name in row["text"]
        assert os.system(row["fix"]) == 0
        machine.says("Secrets", "ok")

    def test_keys_that_lie_elsewhere(self, machine: Machine) -> None:
        key, push = machine.home / "it's a key", machine.home / "push.p8"
        for path in (key, push):
            path.touch()
            path.chmod(0o644)
        machine.write_config({"identity": {"privateKeyPath": "~/it's a key"}})
        (machine.data / "apns.json").write_text('{"keyPath": "~/push.p8"}')
        row = machine.doctor()["Secrets"]
        assert row["level"] == "fail" and "it's a key" in row["text"] and "push.p8" in row["text"]
        assert os.system(row["fix"]) == 0 and not (key.stat().st_mode | push.stat().st_mode) & 0o77

    def test_the_public_key_is_none(self, machine: Machine) -> None:
        machine("init", "--yes")
        (machine.data / "identity_ed25519.pub").chmod(0o644)
        machine.says("Secrets", "ok")


@pytest.mark.parametrize(("free", "level"), [(3 << 30, "ok"), (1 << 30, "warn"), (100 << 20, "fail"), (0, "fail")])
def test_disk_space(free: int, level: str) -> None:
    code = (
        "import os, runpy, sys; found = os.statvfs('/');"
        f"os.statvfs = lambda path: os.statvfs_result([1, 1, 2, 2, {free}, *found[5:]]);"
        f"sys.argv[0] = {str(ROOT / 'oppi.py')!r}; sys.path.insert(0, {str(ROOT)!r});"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    with Server(program=[sys.executable, "-c", code], start=False) as server:
        Machine(server).says("Disk", level, f"{free / 2**30:.1f} GiB free at {server.data}", "du " if level != "ok" else "")


def test_packages_that_are_missing() -> None:
    with Server(program=[sys.executable, "-S", str(ROOT / "oppi.py")], start=False) as server:
        fix = f"{sys.executable} -m pip install websockets cryptography qrcode"
        Machine(server).says("Python", "fail", "missing: websockets, cryptography, qrcode", fix)


class TestServer:
    def test_one_that_no_phone_can_reach(self) -> None:
        with Server() as server:
            Machine(server).says("Server", "warn", f"127.0.0.1:{server.port}", "oppi config set host 0.0.0.0")

    def test_one_that_does_not_answer(self) -> None:
        with Server() as server:
            os.kill(server.pid, signal.SIGSTOP)
            try:
                Machine(server).says("Server", "fail", f"process {server.pid} does not answer", f"kill {server.pid}")
            finally:
                os.kill(server.pid, signal.SIGCONT)

    def test_a_port_that_somebody_else_has(self, machine: Machine) -> None:
        with socket.socket() as taken, Server() as server:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            for port, who in ((taken.getsockname()[1], "another program"), (server.port, "oppi")):
                machine.write_config({"port": port, "host": "127.0.0.1"})
                machine.says("Server", "fail", f"not running, and {who} has port {port}", f"lsof -nP -iTCP:{port}")

    def test_a_program_that_says_other_things_for_ever(self, machine: Machine) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            machine.write_config({"port": taken.getsockname()[1], "host": "127.0.0.1"})
            pid = os.fork()
            if not pid:
                peer, _ = taken.accept()
                try:
                    while True:
                        peer.sendall(b"x" * 65536)
                finally:
                    os._exit(0)
            try:
                machine.says("Server", "fail", "another program")
            finally:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def test_the_strict_profile_names_no_address_that_it_refuses(self, mac: Machine) -> None:
        mac.write_config({"security": {"profile": "strict"}})
        with serving(mac, "--port", "0", "--host", "0.0.0.0") as server:
            server.shows("Ctrl+C")
            text = mac.doctor()["Server"]["text"]
            assert f"100.64.0.7:{oppi_port(server.text)}" in text and "studio.local" not in text


class TestTailscale:
    def test_logged_out(self, machine: Machine) -> None:
        machine.has(tailscale='case $1 in status) echo \'{"BackendState":"NeedsLogin"}\';; *) exit 1;; esac')
        machine.says("Tailscale", "warn", "", "tailscale up")

    def test_not_installed(self, machine: Machine) -> None:
        machine.says("Tailscale", "warn", "not installed", "tailscale.com/download")


class TestSleep:
    def test_a_mac_that_sleeps_on_mains_power(self, mac: Machine) -> None:
        mac.has(pmset="printf 'AC Power:\\n disksleep 0\\n sleep                15\\n'")
        mac.says("Sleep", "warn", "after 15 minutes", "sudo pmset -c sleep 0")

    @pytest.mark.parametrize(
        ("targets", "idle", "level"),
        [("static", "suspend", "warn"), ("masked", "suspend", "ok"), ("static", "ignore", "ok"), ("masked", "hibernate", "ok")],
    )
    def test_systemd(self, machine: Machine, targets: str, idle: str, level: str) -> None:
        machine.has(systemctl=f"echo {targets}; echo {targets}; exit 1", loginctl=f"echo IdleAction={idle}")
        machine.says("Sleep", level, "", "sudo systemctl mask" if level == "warn" else "")


class TestPush:
    def key(self, machine: Machine, key: Any, password: Any = None) -> None:
        how = BestAvailableEncryption(password) if password else NoEncryption()
        (machine.data / "key.p8").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how))
        (machine.data / "key.p8").chmod(0o600)

    def configure(self, machine: Machine, **changes: str) -> None:
        given = {"keyPath": str(machine.data / "key.p8"), "keyId": "K", "teamId": "T", "bundleId": "b", **changes}
        (machine.data / "apns.json").write_text(json.dumps(given))

    def test_what_is_wrong_with_the_way_to_apple(self, machine: Machine) -> None:
        machine("config", "set", "push.webhook", "https://ntfy.example/secret-topic")
        machine.says("Push", "ok", "by webhook;")
        (machine.data / "apns.json").write_text("{")
        machine.says("Push", "fail", "apns.json", "apns.json")
        self.configure(machine, keyId="")
        machine.says("Push", "fail", "keyId is missing")
        self.configure(machine)
        machine.says("Push", "fail", "No such file")
        self.key(machine, ed25519.Ed25519PrivateKey.generate())
        machine.says("Push", "fail", "no P-256 key")
        self.key(machine, ec.generate_private_key(ec.SECP256R1()), b"secret")
        machine.says("Push", "fail", "key is encrypted")
        machine.write_config({**machine.config, "pushDeviceTokens": ["ab" * 32]})
        sent = machine.run("push", "test", "--route", "apns")
        assert sent.returncode == 1 and "✗ apns: no answer" in sent.stdout and "key is encrypted" in sent.stdout
        self.key(machine, ec.generate_private_key(ec.SECP256R1()))
        machine.says("Push", "ok", "by webhook and apns;")


class TestPairing:
    def test_devices_of_both_generations_count(self, machine: Machine) -> None:
        machine("devices", "add", "phone")
        machine.write_config({**machine.config, "authDeviceTokens": ["dt_abcdefgh12345678"]})
        machine.says("Pairing", "ok", "2 paired; no owner token")

    def test_a_broken_list_of_devices_stays_where_it_is(self, machine: Machine) -> None:
        machine("devices", "add", "phone")
        (machine.data / "devices.json").write_text("{")
        machine.says("Pairing", "fail", "devices.json cannot be read", "oppi pair")
        assert (machine.data / "devices.json").read_text() == "{"

    def test_a_lost_identity_key(self, machine: Machine) -> None:
        machine("init", "--yes")
        (machine.data / "identity_ed25519").unlink()
        machine.says("Pairing", "fail", "identity_ed25519", 'oppi config set identity.fingerprint ""')
        assert not (machine.data / "identity_ed25519").exists()


@pytest.mark.parametrize("home", ["", "/nonexistent"])
def test_a_home_that_is_none(machine: Machine, home: str) -> None:
    rows = machine.doctor(env={"HOME": home, "PI_CODING_AGENT_DIR": ""})
    assert rows["pi"]["level"] == "fail" and rows["Disk"]["level"] == "ok"
