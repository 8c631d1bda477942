"""The surroundings of a test with containers: the stand-in on PATH, and proof that nothing of it stays.

How a test of oppi uses it (every test below tests/container runs in the network namespace that conftest.py enters):

    with MockLLM() as llm, Apple() as apple, Server(env=apple.env, start=False) as server:
        (server.agent_dir / "models.json").write_text(llm.models_json())
        server.start()

- A server that is started in a test is in the same network namespace, because processes and threads inherit it: its
  127.0.0.1 is that of the test.  So `MockLLM` (and whatever else listens on loopback) can be reached by the server and
  by the test, never from a container; what listens on the gateway's address or on all of them can be.  `forwarder`
  leads from a gateway to such a port without oppi; `internet` makes an address that only routed networks reach.  There
  is no other way out, so `contents()` fetches before.
- A container's own address is in its network's subnet and changes with each start; bridge and gateway address exist only
  while a container of the network runs.  Two stand-ins at a time in one namespace need networks without overlap.
- `Apple(version="0.9.0", macos=15, kernel=False, online=False, hold=False)` is another Mac (`container_cli.CONFIG`).
  `Apple(fake={"DIALECT": "0.87"})` has the scripted pi in every image, which starts much faster than the real one.
- An image has the real pi if its Dockerfile or a RUN line says `<package>@<version>` of tools.PI_PACKAGES, literally or by
  ARG.  RUN lines are not run: `mkdir` and `adduser` or `useradd` in them are understood, all else is taken as done.
- State to look at: `running`, `record`, `processes`, `execs` (pids of this side: os.kill reaches them), `calls`, `log`,
  `spoken` (all that was ever in argv, environment or records: for canaries), and the CLI itself by `ok`, `json`, `call`.
- What goes wrong: `services(False)`, `fault("build", exit=1)`, `fault("network", "create", hang=True, times=1)`,
  `fault("stop", act=True, exit=1)`, `fault("exec", has=["pi"], bytes=900)`, `die`, `lose`, `end_exec`; `healthy` ends faults,
  `faulted` counts the calls that met one (a call that hangs has when it says so, not when it was started).
- At its end an Apple fails the test if a call of somebody else than the rig was bad: refused for its usage (exit 64),
  not carried out (70), or risky on a real Mac (`warnings`: an -e without value, a single file as a mount, one folder
  mounted in two modes, a mount on a folder that a read-only image lacks).  `complaints()` takes them away.
- To kill the server or a CLI is safe: everything ends with the test's process at the latest.

Needs Linux with network namespaces, root, and the program ip; `CannotContain` says which of them is missing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.container import container_cli, jail
from tests.support.server import FAKE_PI
from tests.support.tools import NODE, PI_PACKAGES, apt_install, cache_folder, install_pi, node_package, npm_install

ROOT = Path(__file__).resolve().parents[2]
PI = "0.87.1"
CLONE_NEWNET = 0x40000000
TOOL_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
WRAPPER = """#!{python} -IS
import sys
sys.pycache_prefix = {cache!r}
sys.path.insert(0, {root!r})
from tests.container.container_cli import main
main(sys.argv[1:], {state!r})
"""
DOCKERFILE = """FROM node:22-alpine
RUN apk add --no-cache bash git
RUN npm install -g {package}@{version}
RUN adduser -D -u 1001 pi
USER pi
WORKDIR /work
ENTRYPOINT ["pi"]
"""


class CannotContain(AssertionError):
    """This machine cannot run the stand-in's containers: a failure, never a skip."""


# -- namespaces --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def namespaces() -> Iterator[None]:
    """Moves this thread, and what it starts, into an empty network namespace with a loopback device."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise CannotContain("the stand-in for Apple's containers needs Linux and root")
    if not shutil.which("ip", path=TOOL_PATH):
        apt_install("iproute2")
    outside = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        jail.checked("unshare", CLONE_NEWNET)
        jail.ip(
            "link set lo up", *(f"link {verb} probe{kind}" for kind in (" type bridge", " type veth") for verb in ("add", "del"))
        )
        Path("/proc/sys/net/ipv4/ip_forward").write_text("0")
        jail.probe(tempfile.gettempdir())
    except (OSError, jail.JailError) as error:
        jail.LIBC.setns(outside, CLONE_NEWNET)
        os.close(outside)
        raise CannotContain(f"this machine cannot run the stand-in's containers: {error}") from None
    try:
        yield
    finally:
        jail.checked("setns", outside, CLONE_NEWNET)
        os.close(outside)


NODE_PATH = "/usr/local/bin/node"


def contents() -> list[dict[str, Any]]:
    """Node and the real pi of both kinds, at the places where npm would have put them."""
    node = str(npm_install(node_package(), NODE) / "bin" / "node")
    found: list[dict[str, Any]] = [{"when": r"FROM \S*\bnode\b", "paths": {NODE_PATH: node}}]
    for version, (package, script) in PI_PACKAGES.items():
        install_pi(version)
        modules = npm_install(package, version)
        for _ in package.split("/"):
            modules = modules.parent
        found.append(
            {
                "when": f"{package}@{version}".replace(".", r"\."),
                "paths": {"/usr/local/lib/node_modules": str(modules)},
                "links": {"/usr/local/bin/pi": f"../lib/node_modules/{package}/{script}"},
            }
        )
    return found


# -- the stand-in ------------------------------------------------------------------------------------------------------


def fake_contents(folder: Path, settings: Mapping[str, str]) -> list[dict[str, Any]]:
    """The scripted pi of the other suites instead of the real one; settings as `Server(fake=...)` takes them."""
    lines = [f"export FAKE_PI_{name}={shlex.quote(value)}" for name, value in settings.items()]
    launcher = folder / "fake-pi"
    launcher.write_text("\n".join(["#!/bin/sh", *lines, 'exec /usr/bin/python3 /opt/fake_pi.py "$@"', ""]))
    launcher.chmod(0o755)
    return [{"paths": {"/usr/local/bin/pi": str(launcher), "/opt/fake_pi.py": str(FAKE_PI)}}]


class Apple:
    """One "Mac": a folder of state and a `container` on PATH.

    `config` overrides `container_cli.CONFIG`; with `fake` every image has the scripted pi (at least its DIALECT has to
    be said), else the real one that its Dockerfile installs.
    """

    def __init__(self, fake: Mapping[str, str] | None = None, **config: Any) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="oppi-apple-")).resolve()
        self.state, self.bin, self.home = (self.folder / name for name in ("state", "bin", "home"))
        for folder in (self.state, self.bin, self.home):
            folder.mkdir(mode=0o700)
        (self.state / "containers").mkdir()
        self.tag = uuid.uuid4().hex[:6]
        inside = contents() if fake is None else fake_contents(self.folder, fake)
        given = {"contents": inside, "netns": jail.network_namespace(), "tag": self.tag, "owner": os.getpid(), **config}
        container_cli.save(str(self.state / "config.json"), given)
        self.program = self.bin / "container"
        cache = str(cache_folder() / "pycache")  # shared, or each stand-in would compile all anew
        self.program.write_text(WRAPPER.format(python=sys.executable, cache=cache, root=str(ROOT), state=str(self.state)))
        self.program.chmod(0o755)
        self.store = container_cli.Store(str(self.state))
        self.own: set[int] = set()  # pids of the rig's own calls
        self.seen = 0  # calls whose complaints were taken

    def __enter__(self) -> Apple:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        complaints = self.complaints()
        self.clean()
        assert kind or not complaints, "\n".join(complaints)

    @property
    def env(self) -> dict[str, str]:
        """What a server needs so as to find the stand-in first."""
        return {"PATH": f"{self.bin}:{os.environ.get('PATH', TOOL_PATH)}"}

    # ---- calls -------------------------------------------------------------------------------------------------------

    def minimal(self) -> dict[str, str]:
        return {"HOME": str(self.home), "PATH": TOOL_PATH}

    def call(
        self, *arguments: str, input: str | None = None, timeout: float = 30.0, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs one command to its end, with a minimal environment."""
        with self.open(*arguments, env=env) as process:
            try:
                out, errors = process.communicate((input or "").encode(), timeout)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, out.decode(), errors.decode("utf-8", "replace"))

    def ok(self, *arguments: str, **options: Any) -> str:
        """The output of a command that has to succeed, without the last newline."""
        done = self.call(*arguments, **options)
        assert done.returncode == 0, f"container {shlex.join(arguments)}: exit {done.returncode}\n{done.stderr}"
        return done.stdout.rstrip("\n")

    def json(self, *arguments: str) -> Any:
        return json.loads(self.ok(*arguments))

    def open(self, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Starts one command with pipes; the caller ends it, `clean` at the latest."""
        pipe, command = subprocess.PIPE, [str(self.program), *arguments]
        given = {**self.minimal(), **(env or {})}
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=given, cwd=self.folder)
        self.own.add(process.pid)
        return process

    def build(self, version: str = PI, name: str = "oppi-test:local") -> str:
        """An image with the real pi; returns its name."""
        context = self.folder / "context"
        context.mkdir(exist_ok=True)
        package = PI_PACKAGES[version][0]
        (context / "Dockerfile").write_text(DOCKERFILE.format(package=package, version=version))
        return self.ok("build", "-t", name, str(context))

    # ---- what is there -----------------------------------------------------------------------------------------------

    def record(self, name: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.store.read()["containers"].get(name)
        return found

    def running(self) -> list[str]:
        containers = self.store.read()["containers"]
        return sorted(name for name, record in containers.items() if record["status"] == "running" and record["pid"])

    def processes(self, name: str) -> dict[int, str]:
        """pid here and command line of every process in a container."""
        record = self.record(name)
        pids = jail.processes(record["pid"]) if record and record["pid"] else []
        return {pid: line for pid in pids for line in [command_line(pid)] if line}

    def execs(self, name: str) -> dict[int, list[str]]:
        """pid here and argv of what `exec` has running in a container."""
        records = [container_cli.load(str(path), None) for path in self._exec_files(name)]
        return {record["pid"]: record["argv"] for record in records if record and Path(f"/proc/{record['pid']}").exists()}

    def _exec_files(self, name: str) -> list[Path]:
        return list((self.state / "containers" / name / "execs").glob("*.json"))

    def log(self) -> list[dict[str, Any]]:
        """Every call so far: argv, env, cwd, pid, at; exit, end and warnings if it has ended by itself."""
        calls: dict[str, dict[str, Any]] = {}
        path = self.state / "log.jsonl"
        for line in path.read_text("utf-8").splitlines() if path.exists() else []:
            entry = json.loads(line)
            if "argv" in entry:
                calls[entry["call"]] = entry
            else:
                calls[entry["call"]].update(exit=entry["exit"], end=entry["at"], warnings=entry["warnings"])
        return list(calls.values())

    def calls(self, *first: str) -> list[list[str]]:
        """The argument lists that begin with these words."""
        return [entry["argv"] for entry in self.log() if tuple(entry["argv"][: len(first)]) == first]

    def complaints(self) -> list[str]:
        """What was bad about calls since the last time; of the rig's own ones only what could not be carried out."""
        calls = [entry for entry in self.log()[self.seen :] if "exit" in entry]
        self.seen = len(self.log())
        bad = {64: "refused", container_cli.FAULT: "not carried out"}
        found = [(entry, bad[entry["exit"]]) for entry in calls if entry["exit"] in bad]
        found += [(entry, text) for entry in calls for text in entry["warnings"]]
        return [
            f"container {shlex.join(entry['argv'])}: {text}"
            for entry, text in found
            if entry["pid"] not in self.own or entry["exit"] == container_cli.FAULT
        ]

    def spoken(self) -> str:
        """Everything that ever was in an argument or the environment of a call, and in a container's record."""
        said = [json.dumps([entry["argv"], entry["env"]]) for entry in self.log()]
        return "\n".join([*said, json.dumps(self.store.read()["containers"])])

    # ---- what goes wrong ---------------------------------------------------------------------------------------------

    def fault(self, *argv: str, **rule: Any) -> None:
        """Adds a rule of `container_cli.Faults` for the calls that begin with these words."""
        with self.store.locked("faults"):
            path = str(self.state / "faults.json")
            faults = container_cli.load(path, {"rules": []})
            faults["rules"].append({"argv": list(argv), "number": time.monotonic_ns(), **rule})
            container_cli.save(path, faults)

    def faulted(self) -> int:
        """How many calls have met a fault so far."""
        return sum(container_cli.load(str(self.state / "faults.used"), {}).values())

    def healthy(self) -> None:
        """No faults any more."""
        with self.store.locked("faults"):
            container_cli.save(str(self.state / "faults.json"), {"rules": []})

    def services(self, up: bool) -> None:
        with self.store.change() as db:
            db["services"] = up

    def lose(self, name: str) -> None:
        """The services have crashed: a running container shows as stopped, and only `delete -f` ends it."""
        with self.store.change() as db:
            db["containers"][name]["lost"] = True

    def die(self, name: str) -> None:
        """A container's first process is killed from outside; returns when all is cleared up."""
        record = self.record(name)
        assert record and record["pid"], f"{name} does not run"
        os.kill(record["pid"], signal.SIGKILL)
        jail.wait_gone(record["keeper"], 10)

    def end_exec(self, name: str, word: str, number: int = signal.SIGKILL) -> None:
        """Signals the execs of a container whose command has this word."""
        found = [pid for pid, argv in self.execs(name).items() if word in argv]
        assert found, f"no exec of {name} has {word!r}"
        for pid in found:
            os.kill(pid, number)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def leftovers(self) -> list[tuple[int, str]]:
        """Live processes that belong to this stand-in: those in a container, then its helpers and calls."""
        mine, inside = f"{self.bin}/container", self._inside()
        lines = {int(entry.name): command_line(int(entry.name)) for entry in Path("/proc").glob("[0-9]*")}
        helpers = [pid for pid, line in lines.items() if mine in line and pid not in inside and pid != os.getpid()]
        return [(pid, lines[pid]) for pid in [*filter(lines.get, inside), *helpers]]

    def _inside(self) -> set[int]:
        """What has a root folder of this stand-in in its mounts."""
        found, outside = set(), os.readlink("/proc/self/ns/mnt")
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                other = os.readlink(entry / "ns/mnt") != outside
                if other and f"{self.state}/containers/" in (entry / "mountinfo").read_text():
                    found.add(int(entry.name))
        return found

    def clean(self) -> None:
        """Ends every process of this stand-in, with which its mounts and namespaces go; removes bridges and files.

        Containers and calls end first, so that the helpers find out and reap what they started.
        """
        calls = {entry["pid"] for entry in self.log() if "exit" not in entry}
        deadline = time.monotonic() + 10
        patience = time.monotonic() + 2
        while True:
            left = self.leftovers()
            if not left:
                break
            assert time.monotonic() < deadline, f"cannot be ended: {left}"
            inside = self._inside()
            for pid, _ in left:
                if pid in inside or pid in calls or time.monotonic() > patience:
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        for device in re.findall(rf" (ct{self.tag}\d+):", jail.ip("link show type bridge")):
            jail.ip(f"link delete {device}", strict=False)
        shutil.rmtree(self.folder, ignore_errors=True)


def command_line(pid: int) -> str:
    """The command line of a live process, empty for one that is gone or a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
    except OSError:
        return ""


def alive(pid: int) -> bool:
    """Tells whether a process is there and not just waiting to be reaped."""
    return bool(command_line(pid))


def internet(address: str) -> None:
    """Makes an address of the namespace's own stand for a host outside: only routed networks reach it."""
    jail.ip(f"addr add {address}/32 dev lo")


@contextlib.contextmanager
def forwarder(address: str, target: int) -> Iterator[int]:
    """What stands between a container and a server on the host's loopback; yields its port."""
    with socket.create_server((address, 0)) as server:

        def pump(source: socket.socket, other: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(65536):
                    other.sendall(data)
                other.shutdown(socket.SHUT_WR)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    peer, _ = server.accept()
                    upstream = socket.create_connection(("127.0.0.1", target))
                    for pair in ((peer, upstream), (upstream, peer)):
                        threading.Thread(target=pump, args=pair, daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
