"""The stand-in for `container`, held against what is known of the real one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from tests.container import grammar, images, jail
from tests.container.rig import ROOT, Apple, alive, internet
from tests.support.server import Server

IMAGE = "oppi-test:local"
IDLE = ("-c", "while :; do sleep 1000 & wait; done")  # with a shell: runs until killed
SUBNET = "10.201.7.0/24"


def until(condition: Callable[[], Any], what: str, timeout: float = 10.0) -> Any:
    """The first true value of something that nothing announces."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {timeout} s for {what}"
        time.sleep(0.01)


def start(apple: Apple, name: str, *options: str, command: tuple[str, ...] = IDLE) -> str:
    """A container of a shell that waits."""
    apple.ok("run", "-d", "--name", name, *options, "--entrypoint", "sh", IMAGE, *command)
    return name


def shell(apple: Apple, name: str, script: str, *options: str, input: str | None = None) -> str:
    return apple.ok("exec", *options, name, "sh", "-c", script, input=input)


def state(apple: Apple, name: str) -> str:
    return str(apple.json("inspect", name)[0]["status"]["state"])


@pytest.fixture(scope="module")
def box() -> Iterator[Apple]:
    """A stand-in with the image built, a network and one running container `box`; its /work is `apple.home`/work."""
    with Apple() as apple:
        apple.build()
        apple.ok("network", "create", "--subnet", SUBNET, "oppi")
        (apple.home / "work").mkdir(mode=0o700)
        given = ("--init", "--network", "oppi", "-v", f"{apple.home}/work:/work", "-e", "FIRST=run", "-e", "TWICE=run")
        start(apple, "box", *given)
        yield apple


# -- the command line --------------------------------------------------------------------------------------------------

WRONG = {
    "no command": "",
    "unknown command": "launch",
    "group without command": "image",
    "unknown verb": "image show x",
    "unknown option": "list --everything",
    "misspelt option": "run --detached IMAGE",
    "option of another command": "exec --name x box true",
    "unknown short": "run -x IMAGE",
    "value joined to a short option": "run -eFOO=1 IMAGE",
    "short option with = ": "run -e=FOO=1 IMAGE",
    "value option in a group": "run -die FOO=1 IMAGE",
    "what is not for untrusted code": "run --ssh IMAGE",
    "a terminal": "exec -it box sh",
    "a volume with a name": "run -v cache:/cache IMAGE",
    "an anonymous volume": "run -v /cache IMAGE",
    "tmpfs with options": "run --tmpfs /tmp:size=1M IMAGE",
    "flag with a value": "run --detach=yes IMAGE",
    "missing value": "run --name",
    "value that looks like an option": "run --name -x IMAGE",
    "missing image": "run -d",
    "exec without command": "exec box",
    "exec without anything": "exec",
    "too many": "network create a b",
    "missing name": "network create",
    "inspect nothing": "inspect",
    "option where a verb belongs": "network --debug list",
    "bad name: too short": "run --name x IMAGE",
    "bad name: leading dash": "run --name=-abc IMAGE",
    "bad name: too long": "run --name " + "a" * 64 + " IMAGE",
    "bad cpus": "run -c 1.5 IMAGE",
    "no cpus": "run -c 0 IMAGE",
    "bad memory unit": "run -m 2X IMAGE",
    "memory below 200 MiB": "run -m 128M IMAGE",
    "memory not whole MiB": "run -m 300000001 IMAGE",
    "bad env": "run -e =x IMAGE",
    "volume target not absolute": "run -v /tmp:work IMAGE",
    "volume with four parts": "run -v /tmp:/a:ro:x IMAGE",
    "volume mode rw": "run -v /tmp:/a:rw IMAGE",
    "mount without type": "run --mount source=/tmp,target=/a IMAGE",
    "mount with unknown key": "run --mount type=bind,source=/tmp,target=/a,z IMAGE",
    "mount size of a bind": "run --mount type=bind,source=/tmp,target=/a,size=1M IMAGE",
    "tmpfs with a source": "run --mount type=tmpfs,source=/tmp,target=/a IMAGE",
    "bad network option": "run --network oppi,ip=10.0.0.9 IMAGE",
    "mtu too small": "run --network oppi,mtu=1000 IMAGE",
    "none and another": "run --network none --network oppi IMAGE",
    "no-dns and dns": "run --no-dns --dns 10.0.0.1 IMAGE",
    "bad ulimit": "run --ulimit files=5 IMAGE",
    "soft above hard": "run --ulimit nproc=9:5 IMAGE",
    "bad capability": "run --cap-drop FLY IMAGE",
    "bad user": "run -u a:b:c IMAGE",
    "bad label": "run -l novalue IMAGE",
    "bad platform": "run --platform darwin/arm64 IMAGE",
    "bad progress": "run --progress tty IMAGE",
    "bad signal": "stop -s NONSENSE box",
    "bad time": "stop -t soon box",
    "bad format": "list --format xml",
    "bad network name": "network create Oppi",
    "bad subnet": "network create --subnet 10.0.0.0 oppi",
    "bad subnet prefix": "network create --subnet 10.0.0.0/31 oppi",
    "bad label key": "network create --label Upper=1 oppi",
    "both kernel answers": "system start --enable-kernel-install --disable-kernel-install",
    "bad tag": "build -t UPPER/case:1 .",
    "build progress": "build --progress ansi .",
    "two contexts": "build . .",
    "entrypoint of two words": ["run", "--entrypoint", "sh -c", "IMAGE"],
    "entrypoint empty": ["run", "--entrypoint", "", "IMAGE"],
    "lone terminator": "run -- ",
}
RIGHT = {
    "equals": ("run --name=abc --cpus=2 image", {"name": "abc", "cpus": 2}),
    "value with a dash": ("run --workdir=/-x image", {"workdir": "/-x"}),
    "group of flags": ("exec -id box sh", {"interactive": True, "detach": True}),
    "memory": ("run -m 2G image", {"memory": 2 << 30}),
    "memory in lower case": ("run -m 2048m image", {"memory": 2 << 30}),
    "aliases": ("rm -f box", {"force": True}),
    "alias of a group": ("n ls -q", {"quiet": True}),
    "remove": ("run --remove image", {"rm": True}),
    "cwd": ("run --cwd /work image", {"workdir": "/work"}),
    "debug first": ("--debug list --all", {"all": True}),
    "options after ids": ("stop box -t 1", {"time": 1}),
    "repeated": ("run -e A=1 -e A=2 -e B image", {"env": [("A", "1"), ("A", "2"), ("B", None)]}),
    "last one wins": ("run -c 1 -c 3 image", {"cpus": 3}),
    "everything of the process": ("run image -c x --rm", {}),
    "signal": ("kill -s SIGTERM box", {"signal": "TERM"}),
    "signal number": ("kill -s 15 box", {"signal": "15"}),
    "ulimit": ("run --ulimit nofile=10:20 image", {"ulimit": [("nofile", 10, 20)]}),
    "capability": ("run --cap-drop ALL --cap-add cap_chown image", {"cap-drop": ["ALL"], "cap-add": ["CHOWN"]}),
    "file from stdin": ("build -f - -t a:b .", {"file": "-", "tag": ["a:b"]}),
    "network with options": ("run --network a,mtu=1400 image", {"network": [{"name": "a", "mtu": "1400"}]}),
}
SINCE = {
    "--init": ("run --init image", "0.10.0"),
    "--cap-drop": ("run --cap-drop ALL image", "0.12.0"),
    "--cap-add": ("create --cap-add ALL image", "0.12.0"),
    "status --format": ("system status --format json", "0.10.0"),
    "start --timeout": ("system start --timeout 5", "0.10.0"),
    "network --option": ("network create --option a=b oppi", "1.0.0"),
    "network --plugin": ("network create --plugin p oppi", "0.10.0"),
    "yaml": ("list --format yaml", "1.0.0"),
}


@pytest.mark.parametrize("argv", WRONG.values(), ids=WRONG)
def test_what_is_not_the_tools_grammar_is_refused(argv: str | list[str]) -> None:
    words = argv if isinstance(argv, list) else argv.replace("IMAGE", "image").split()
    with pytest.raises(grammar.Usage):
        grammar.parse(words, "1.2.2")


@pytest.mark.parametrize(("argv", "options"), RIGHT.values(), ids=RIGHT)
def test_what_is_the_tools_grammar_is_understood(argv: str, options: dict[str, Any]) -> None:
    assert grammar.parse(argv.split(), "1.2.2").options == options


@pytest.mark.parametrize(("argv", "version"), SINCE.values(), ids=SINCE)
def test_an_option_is_unknown_before_the_release_that_brought_it(argv: str, version: str) -> None:
    grammar.parse(argv.split(), version)
    with pytest.raises(grammar.Usage):
        grammar.parse(argv.split(), "0.9.0")


def test_everything_after_the_first_word_is_the_processes() -> None:
    call = grammar.parse(["exec", "-i", "box", "pi", "--mode", "rpc", "-e", "x", "--", "-i"], "1.2.2")
    assert (call.positionals, call.process) == (["box"], ["pi", "--mode", "rpc", "-e", "x", "--", "-i"])
    assert call.options == {"interactive": True}


ANSWERS = [  # argv, exit code, the first line of stderr, what else it contains
    (["run", "--nope", "image"], 64, "Error: Unknown option '--nope'\n", "Usage: container run [<options>] <image>"),
    (["run", "--name"], 64, "Error: Missing value for '--name <name>'\n", "See 'container run --help'"),
    (["exec"], 64, "Error: Missing expected argument '<container-id>'\n", "Usage: container exec"),
    (["run", "-c", "x", "i"], 64, "Error: The value 'x' is invalid for '-c <cpus>'\n", "container run --help"),
    (["frobnicate"], 64, "Error: Plugin 'container-frobnicate' not found.", "Usage: container"),
    (["network", "create", "a", "b"], 64, "Error: Unexpected argument 'b'\n", "Usage: container network create"),
    (["inspect", "nobody"], 1, "Error: container not found: nobody\n", ""),
    (["image", "inspect", "oppi:none"], 1, "Error: image not found: oppi:none\n", ""),
    (["exec", "nobody", "true"], 1, "Error: container with ID nobody not found\n", ""),
    (["start", "nobody"], 1, "Error: container with ID nobody not found\n", ""),
    (["stop", "nobody"], 1, 'Error: internalError: "failed to stop container" (cause: "notFound: ', "nobody"),
    (["delete", "nobody"], 1, 'Error: internalError: "failed to delete container" (cause: "notFound: ', "nobody"),
    (["kill", "nobody"], 1, 'Error: internalError: "failed to kill container" (cause: "notFound: ', "nobody"),
    (["stop"], 1, "Error: no ids specified and --all not supplied\n", ""),
    (["stop", "-a", "box"], 1, "Error: explicitly supplied ids conflict with the --all flag\n", ""),
    (["delete", "box"], 1, "Error: internalError", "is running"),
    (["run", "--name", "box", IMAGE], 1, "Error: container with id box already exists\n", ""),
    (["run", "oppi-server:local"], 1, "Error: HTTP request to https://registry-1.docker.io/v2/library/oppi-server", "401"),
    (["run", "--network", "nowhere", IMAGE], 1, "Error: network nowhere not found\n", ""),
    (["run", "-u", "stranger", IMAGE], 1, "Error: unable to find user stranger", ""),
    (["run", "-v", "/not/there:/a", IMAGE], 1, "Error: path '/not/there' does not exist\n", ""),
    (["run", "--mount", "type=bind,source=/etc/passwd,target=/a", IMAGE], 1, "Error: path '/etc/passwd' is not a dir", ""),
    (["exec", "box", "no-such-program"], 1, "Error: failed to start container", "no-such-program"),
    (["run", "--rm", "--entrypoint", "nothing", IMAGE], 1, "Error: failed to start container", "nothing"),
    (["network", "create", "oppi"], 1, "Error: network oppi already exists\n", ""),
    (
        ["network", "create", "--subnet", "10.201.0.0/16", "wide"],
        1,
        f"Error: IPv4 subnet 10.201.0.0/16 overlaps an existing network with subnet {SUBNET}\n",
        "",
    ),
    (["network", "delete", "oppi"], 1, "Error: internalError", "with referring containers: box"),
    (["network", "delete", "default"], 1, "Error: internalError", "default"),
    (["network", "inspect", "nowhere"], 1, "Error: network not found: nowhere\n", ""),
    (["build", "/not/there"], 64, "Error: context dir does not exist", "Usage: container build"),
    (["build", "-f", "/not/there", "."], 64, "Error: dockerfile does not exist", "Usage: container build"),
    (["image", "delete", "nothing:1"], 1, "Error: internalError", "image not found"),
]


@pytest.mark.parametrize(("argv", "code", "begins", "contains"), ANSWERS, ids=[" ".join(row[0]) for row in ANSWERS])
def test_the_answers_and_exit_codes(box: Apple, argv: list[str], code: int, begins: str, contains: str) -> None:
    done = box.call(*argv)
    assert done.returncode == code, done.stderr
    assert begins in done.stderr and contains in done.stderr
    if code == 64:
        assert done.stdout == "" and done.stderr.startswith(begins)
    assert box.running() == ["box"]  # a refused call leaves nothing behind


def test_the_errors_of_old_releases_begin_with_a_code() -> None:
    with Apple(version="0.9.0", contents=[]) as old:
        assert old.call("exec", "nobody", "true").stderr == 'Error: notFound: "container with ID nobody not found"\n'
        assert old.call("stop", "nobody").returncode == old.call("delete", "nobody").returncode == 0
        assert old.json("inspect", "nobody") == []
        assert old.call("kill", "nobody").returncode == 1


def test_services_that_are_down_answer_nothing_but_their_state(apple: Apple) -> None:
    assert apple.json("system", "status", "--format", "json")["status"] == "running"
    assert len(apple.json("system", "version", "--format", "json")) == 2
    apple.services(False)
    for argv in (["list"], ["image", "list"], ["run", "-d", IMAGE], ["exec", "x", "y"], ["network", "create", "abc"]):
        done = apple.call(*argv)
        assert done.returncode == 1
        assert "XPC connection error" in done.stderr and "container system start" in done.stderr
    status = apple.call("system", "status", "--format", "json")
    assert (status.returncode, json.loads(status.stdout)["status"]) == (1, "unregistered")
    assert len(apple.json("system", "version", "--format", "json")) == 1
    assert apple.ok("--version").startswith("container CLI version 1.2.2")
    assert apple.call("list", "--nope").returncode == 64
    apple.ok("system", "start")
    apple.ok("system", "start")
    assert apple.ok("list", "-q") == ""


def test_a_missing_kernel_is_asked_for() -> None:
    with Apple(kernel=False, contents=[]) as fresh:
        fresh.services(False)
        done = fresh.call("system", "start")
        assert (done.returncode, done.stderr) == (1, "Error: failed to read user input\n")
        fresh.ok("system", "status")  # the services run all the same
        fresh.ok("system", "start", "--disable-kernel-install")
        for argv in (("run", "-d", "node:22"), ("build", "-f", "-", "-t", "a:b", ".")):
            done = fresh.call(*argv, input="FROM node:22\n")
            assert done.returncode == 1 and "kernel not configured" in done.stderr
        fresh.ok("system", "start", "--enable-kernel-install")
        fresh.ok("system", "start")
        assert fresh.call("build", "-f", "-", "-t", "a:b", ".", input="FROM node:22\n").stdout == "a:b\n"


def test_there_are_no_networks_before_macos_26() -> None:
    with Apple(macos=15, contents=[]) as old:
        done = old.call("network", "list")
        assert done.returncode == 64 and "not found" in done.stderr
        done = old.call("run", "--network", "oppi", "node:22-alpine")
        assert done.returncode == 1 and "requires macOS 26 or newer" in done.stderr


# -- images ------------------------------------------------------------------------------------------------------------

GOOD = """# syntax=docker/dockerfile:1
ARG TAG=22-alpine
FROM node:${TAG} AS base
ARG WHO=pi
RUN apk add --no-cache bash \\
    # a comment between
    git && \\
    adduser -D -u 1001 -s /bin/bash ${WHO} && mkdir -p /sessions /deep/er
ENV GREETING="hello there" UV_CACHE_DIR=/uv-cache
USER ${WHO}
WORKDIR /work
WORKDIR sub
LABEL a=b
ENTRYPOINT ["sh", "-c", "echo hello from $(id -un) in $PWD with $*: $GREETING; ls -d /sessions /deep/er"]
CMD ["sh", "last"]
"""
BAD = {
    "no FROM": ("RUN true\n", "no build stage"),
    "empty": ("# nothing\n", "cannot be empty"),
    "unknown instruction": ("FROM node:22\nRUNN true\n", "unknown instruction: RUNN"),
    "unknown base": ("FROM nobody/nothing:1\n", "not found"),
    "shell syntax": ("FROM node:22\nRUN if true; then\n", "did not complete successfully"),
    "bad ENV": ("FROM node:22\nENV A=1 B\n", "can't find ="),
    "too large": ("FROM node:22\n" + "#" * images.LARGEST, "smaller than 16384"),
}


@pytest.mark.parametrize(("text", "why"), BAD.values(), ids=BAD)
def test_a_build_that_fails(text: str, why: str) -> None:
    with pytest.raises(images.BuildFailed, match=why):
        images.Build({}).run(text)


@pytest.mark.parametrize("line", ["FROM node:22", "COPY a /a", "RUN <<END\ntrue\nEND"])
def test_what_an_image_cannot_have_here_is_no_failed_build(line: str) -> None:
    with pytest.raises(NotImplementedError):
        images.Build({}).run(f"FROM node:22\n{line}\n")


def test_an_image_is_what_its_dockerfile_says(apple: Apple, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(GOOD)
    done = apple.call("build", "-t", "mine:1", "-t", "mine:2", "--build-arg", "WHO=me", str(tmp_path))
    assert done.stdout == "mine:1\nmine:2\n" and "DONE" in done.stderr
    ran = apple.call("run", "--rm", "mine:1", "sh", "word")
    assert ran.stdout == "hello from me in /work/sub with word: hello there\n/deep/er\n/sessions\n"
    config = apple.json("image", "inspect", "mine:2")[0]["variants"][0]["config"]["config"]
    assert config["User"] == "me" and config["WorkingDir"] == "/work/sub" and config["Entrypoint"][0] == "sh"
    assert config["Cmd"] == ["sh", "last"] and "UV_CACHE_DIR=/uv-cache" in config["Env"] and config["Labels"] == {"a": "b"}
    assert apple.running() == []


def test_a_dockerfile_from_stdin_and_by_name(apple: Apple, tmp_path: Path) -> None:
    assert apple.ok("build", "-f", "-", "-t", "in:1", str(tmp_path), input="FROM node:22\n") == "in:1"
    (tmp_path / "Containerfile").write_text("FROM alpine\n")
    assert apple.ok("build", "-t", "found", str(tmp_path)) == "found:latest"
    (tmp_path / "other").write_text("FROM nobody/nothing\n")
    done = apple.call("build", "-f", str(tmp_path / "other"), "-t", "no:1", str(tmp_path))
    assert done.returncode == 1 and done.stdout == ""
    assert apple.call("image", "inspect", "no:1").returncode == 1
    listed = apple.ok("image", "list").splitlines()
    assert [line.split()[:2] for line in listed] == [["NAME", "TAG"], ["found", "latest"], ["in", "1"]]
    assert apple.ok("image", "delete", "in:1") == "in:1"
    assert [image["configuration"]["name"] for image in apple.json("image", "list", "--format", "json")] == ["found:latest"]


def test_without_internet_nothing_is_pulled_or_built() -> None:
    with Apple(online=False, contents=[]) as apple:
        for argv in (("run", "-d", "node:22"), ("build", "-f", "-", "-t", "a:b", ".")):
            assert apple.call(*argv, input="FROM node:22\n").returncode == 1


def test_building_leaves_its_builder_running(apple: Apple) -> None:
    apple.build()
    (entry,) = apple.json("list", "--format", "json")
    assert (entry["id"], entry["status"]["state"]) == ("buildkit", "running")
    apple.ok("stop", "buildkit")
    assert apple.ok("list", "-q") == ""


# -- containers and their JSON -----------------------------------------------------------------------------------------


def test_what_inspect_says_of_a_container(box: Apple) -> None:
    (entry,) = box.json("inspect", "box")
    configuration, status = entry["configuration"], entry["status"]
    assert (entry["id"], configuration["id"], status["state"]) == ("box", "box", "running")
    assert configuration["mounts"] == [
        {"type": {"virtiofs": {}}, "source": f"{box.home}/work", "destination": "/work", "options": []}
    ]
    assert configuration["useInit"] and not configuration["readOnly"]
    assert configuration["resources"] == {"cpus": 4, "memoryInBytes": 1 << 30}
    assert "FIRST=run" in configuration["initProcess"]["environment"]
    assert configuration["initProcess"]["user"] == {"raw": {"userString": "pi"}}
    (network,) = status["networks"]
    assert network["ipv4Gateway"] == "10.201.7.1" and network["ipv4Address"].startswith("10.201.7.")
    assert network["ipv4Address"].endswith("/24") and network["hostname"] == "box"
    assert time.strptime(status["startedDate"], "%Y-%m-%dT%H:%M:%SZ")
    assert "\\/" in box.ok("inspect", "box")
    compact = box.ok("list", "--format=json")
    assert "\n" not in compact and '"id":"box"' in compact
    assert set(box.ok("list", "-q").split()) == {"box", "buildkit"}


def test_old_releases_have_other_shapes() -> None:
    with Apple(version="0.9.0") as old:
        old.build()
        old.ok("network", "create", "--subnet", "10.1.0.0/24", "oppi")
        start(old, "ws1", "--network", "oppi")
        (entry,) = [e for e in old.json("list", "--format", "json") if e["configuration"]["id"] == "ws1"]
        assert "id" not in entry and entry["status"] == "running"
        assert entry["networks"][0]["gateway"] == "10.1.0.1"
        assert isinstance(entry["startedDate"], float) and entry["startedDate"] < time.time() - 900_000_000
        (network,) = old.json("network", "inspect", "oppi")
        assert (network["state"], network["config"]["id"]) == ("running", "oppi")
        assert old.ok("network", "list").splitlines()[0].split() == ["NETWORK", "STATE", "SUBNET"]
        assert set(old.json("image", "list", "--format", "json")[0]) == {"reference", "fullSize", "descriptor"}
        assert "ADDR" in old.ok("list")
        old.ok("stop", "-t", "0", "ws1")
        shown = [e["configuration"]["id"] for e in old.json("list", "--format", "json")]
        assert "ws1" in shown  # the JSON always was of all
        assert "ws1" not in old.ok("list", "-q")


def test_the_life_of_a_container(box: Apple) -> None:
    assert box.ok("create", "--name", "life", "--entrypoint", "sh", IMAGE, *IDLE) == "life"
    assert state(box, "life") == "stopped"
    assert box.call("exec", "life", "true").returncode == 1
    assert box.call("kill", "life").returncode == 1
    assert box.ok("stop", "life") == "life"  # stopped already: fine
    assert box.ok("start", "life") == "life"
    assert box.ok("start", "life") == "life"  # runs already: fine
    shell(box, "life", "echo kept > /tmp/file")
    assert box.ok("stop", "-t", "0", "life") == "life"
    assert state(box, "life") == "stopped" and "life" not in box.ok("list", "-q")
    assert "life" in box.ok("list", "-a", "-q")
    box.ok("start", "life")
    assert shell(box, "life", "cat /tmp/file") == "kept"  # the writable layer survives a stop
    assert box.call("delete", "life").returncode == 1
    assert box.ok("delete", "-f", "life") == "life"
    assert box.call("inspect", "life").returncode == 1


def test_a_container_with_rm_is_gone_when_it_ends(box: Apple) -> None:
    start(box, "brief", "--rm")
    box.die("brief")
    assert box.call("inspect", "brief").returncode == 1
    start(box, "brief", "--rm")
    box.ok("stop", "-t", "0", "brief")
    assert "brief" not in box.ok("list", "-a", "-q")
    assert not (box.state / "containers" / "brief").exists()


def test_a_start_that_fails_leaves_nothing(box: Apple) -> None:
    assert box.call("run", "-d", "--name", "broken", "--entrypoint", "nothing", IMAGE).returncode == 1
    assert box.call("inspect", "broken").returncode == 1
    gone = box.home / "gone"
    gone.mkdir()
    box.ok("create", "--name", "broken", "-v", f"{gone}:/a", "--entrypoint", "sh", IMAGE)
    gone.rmdir()
    done = box.call("start", "broken")
    assert done.returncode == 1 and "does not exist" in done.stderr
    box.ok("delete", "broken")


def test_the_end_of_the_first_process_ends_all(box: Apple) -> None:
    start(box, "short", command=("-c", "mkfifo /tmp/go; setsid sleep 1000 & read line < /tmp/go"))
    cli = box.open("exec", "-i", "short", "sleep", "2000")
    until(lambda: {"sleep 1000", "sleep 2000"} <= set(box.processes("short").values()), "both")
    inside = box.processes("short")
    box.call("exec", "short", "sh", "-c", "echo > /tmp/go")  # which may be killed with the rest
    until(lambda: state(box, "short") == "stopped", "the end")
    assert cli.wait(10) == 137
    assert not any(alive(pid) for pid in inside)
    box.ok("delete", "short")


def test_a_foreground_run_returns_what_the_process_returns(box: Apple) -> None:
    done = box.call("run", "--rm", "--entrypoint", "sh", IMAGE, "-c", "cat; echo out; echo err >&2; exit 7", input="unread")
    assert (done.returncode, done.stdout) == (7, "out\n") and done.stderr.endswith("err\n")
    assert box.ok("run", "--rm", "-i", "--entrypoint", "cat", IMAGE, input="read") == "read"
    assert box.call("run", "--rm", "--init", "--entrypoint", "sh", IMAGE, "-c", "kill -9 $$").returncode == 137


def test_logs_are_of_the_first_process_only(box: Apple) -> None:
    start(box, "talker", command=("-c", "echo one; echo two; echo three >&2; sleep 1000"))
    until(lambda: "three" in box.ok("logs", "talker"), "the log")
    shell(box, "talker", "echo unheard")
    assert box.ok("logs", "talker") == "one\ntwo\nthree"
    assert box.ok("logs", "-n", "1", "talker") == "three"
    box.ok("delete", "-f", "talker")


def test_stop_waits_for_a_first_process_without_handlers_and_init_does_not(box: Apple) -> None:
    """Signals without a handler do not reach the first process of a PID namespace; an init passes them on."""
    start(box, "slow", command=("-c", "sleep 1000; true"))
    begin = time.monotonic()
    box.ok("stop", "-t", "1", "slow")
    assert time.monotonic() - begin > 1
    start(box, "quick", "--init", command=("-c", "sleep 1000; true"))
    begin = time.monotonic()
    box.ok("stop", "-t", "20", "quick")
    assert time.monotonic() - begin < 10
    box.ok("delete", "slow", "quick")


def test_kill_sends_what_it_is_told(box: Apple) -> None:
    start(box, "hup", command=("-c", "trap 'echo heard; exit 0' HUP; echo ready; while :; do sleep 0.05; done"))
    until(lambda: box.ok("logs", "hup") == "ready", "the trap")
    box.ok("kill", "-s", "HUP", "hup")
    until(lambda: state(box, "hup") == "stopped", "the end")
    assert box.ok("logs", "hup") == "ready\nheard"
    box.ok("start", "hup")
    assert box.ok("kill", "hup") == "hup"
    assert state(box, "hup") == "stopped"
    box.ok("delete", "hup")


# -- exec --------------------------------------------------------------------------------------------------------------


def test_the_environment_of_an_exec(box: Apple) -> None:
    options = ("-e", "TWICE=exec", "-e", "HOME=/elsewhere", "-e", "PATH=/nowhere", "-e", "NEW=1")
    raw = box.ok("exec", *options, "box", "cat", "/proc/self/environ").rstrip("\0").split("\0")
    assert raw[:2] == ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "NODE_VERSION=22.23.3"]
    assert raw[2:] == ["FIRST=run", "TWICE=run", "TWICE=exec", "HOME=/elsewhere", "PATH=/nowhere", "NEW=1"]
    # getenv takes the first: a program that overrides has to be started through env
    assert box.ok("exec", "-e", "FIRST=exec", "box", "node", "-p", "process.env.FIRST") == "run"
    assert box.ok("exec", "box", "env", "FIRST=exec", "printenv", "FIRST") == "exec"
    assert box.ok("exec", "box", "printenv", "HOME") == "/home/pi"


def test_the_environment_of_the_cli_stays_outside(box: Apple) -> None:
    secret = {"SECRET_KEY": "hush"}
    assert "hush" not in box.ok("exec", "box", "env", env=secret)
    assert "SECRET_KEY=hush" in box.ok("exec", "-e", "SECRET_KEY", "box", "env", env=secret).split()
    assert "ABSENT" not in box.ok("exec", "-e", "ABSENT", "box", "env")
    assert any("SECRET_KEY" in warning for entry in box.log() for warning in entry.get("warnings", []))


def test_image_and_run_environments_are_merged(box: Apple) -> None:
    shown = box.ok("run", "--rm", "-e", "NODE_VERSION=mine", "-e", "A=1", "-e", "A=2", "--entrypoint", "env", IMAGE)
    assert [line for line in shown.splitlines() if line[0] in "NA"] == ["NODE_VERSION=mine", "A=2"]


def test_who_and_where_an_exec_is(box: Apple) -> None:
    assert shell(box, "box", "id -u; id -g; pwd") == "1001\n1001\n/work"
    assert shell(box, "box", "id -u; id -g; pwd", "-u", "0", "-w", "/tmp/new/folder") == "0\n0\n/tmp/new/folder"
    assert shell(box, "box", "id -u; id -g", "-u", "node:pi") == "1000\n1001"
    assert shell(box, "box", "id -u; id -g", "--uid", "4711", "--gid", "12") == "4711\n12"
    assert shell(box, "box", "hostname; echo $HOME") == "box\n/home/pi"
    limits = ("--ulimit", "nofile=99:100", "--ulimit", "nproc=500")
    assert box.ok("exec", *limits, "box", "bash", "-c", "ulimit -n; ulimit -Hn; ulimit -u") == "99\n100\n500"


def test_stdin_is_given_only_on_request(box: Apple) -> None:
    assert box.ok("exec", "box", "cat", input="unread") == ""
    assert box.ok("exec", "-i", "box", "cat", input="read") == "read"
    long = "x" * 3_000_000
    assert box.ok("exec", "-i", "box", "cat", input=long) == long


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 3", 3), ("kill -TERM $$", 143), ("kill -9 $$", 137)])
def test_the_exit_code_of_an_exec(box: Apple, script: str, code: int) -> None:
    assert box.call("exec", "box", "sh", "-c", script).returncode == code


def test_output_and_errors_are_apart(box: Apple) -> None:
    done = box.call("exec", "box", "sh", "-c", "echo out; echo err >&2")
    assert (done.stdout, done.stderr) == ("out\n", "err\n")


def test_streams_left_open_are_waited_for_but_not_long(box: Apple) -> None:
    begin = time.monotonic()
    assert shell(box, "box", "setsid sleep 300 & echo begun") == "begun"
    assert 2.5 < time.monotonic() - begin < 10
    shell(box, "box", "pkill -f 'sleep 30[0]'")


def test_a_detached_exec_goes_on_alone(box: Apple) -> None:
    assert box.ok("exec", "-d", "box", "sleep", "321") == "box"
    assert ["sleep", "321"] in box.execs("box").values()
    box.end_exec("box", "321")
    until(lambda: not box.execs("box"), "its end")


def test_signals_are_not_passed_on_and_the_third_ends_the_cli_alone(box: Apple) -> None:
    cli = box.open("exec", "-i", "box", "sh", "-c", "echo up; exec sleep 456")
    assert cli.stdout and cli.stderr and cli.stdin
    assert cli.stdout.readline() == b"up\n"
    for number in (signal.SIGTERM, signal.SIGINT):
        cli.send_signal(number)
        assert b"missing signal in xpc message" in cli.stderr.readline()
    assert cli.poll() is None
    cli.send_signal(signal.SIGTERM)
    assert cli.wait(10) == 1
    assert "sleep 456" in box.processes("box").values()  # it lives on
    shell(box, "box", "pkill -f 'sleep 45[6]'")
    until(lambda: not box.execs("box"), "the end by a second exec")


def test_signals_were_passed_on_before_1_0() -> None:
    with Apple(version="0.9.0") as old:
        old.build()
        start(old, "ws1", "--network", "none")
        cli = old.open("exec", "ws1", "sh", "-c", "trap 'exit 5' TERM; echo up; while :; do sleep 0.05; done")
        assert cli.stdout and cli.stdout.readline() == b"up\n"
        cli.terminate()
        assert cli.wait(10) == 5


@pytest.mark.parametrize("hold", [True, False])
def test_a_process_outlives_its_cli(hold: bool) -> None:
    with Apple(hold=hold) as apple:
        apple.build()
        start(apple, "ws1", "--network", "none")
        cli = apple.open("exec", "-i", "ws1", "sh", "-c", "echo up; cat > /dev/null; echo ended > /tmp/ended")
        assert cli.stdout and cli.stdout.readline() == b"up\n"
        (pid,) = apple.execs("ws1")
        cli.kill()
        cli.wait()
        if hold:  # nobody promises the end of its input
            assert not jail.wait_gone(pid, 0.3)
            os.kill(pid, signal.SIGKILL)
        else:
            assert jail.wait_gone(pid, 10)


def test_the_end_of_input_is_passed_on(box: Apple) -> None:
    cli = box.open("exec", "-i", "box", "sh", "-c", "while read line; do echo got $line; done; echo end")
    assert cli.stdin and cli.stdout
    cli.stdin.write(b"one\n")
    cli.stdin.flush()
    assert cli.stdout.readline() == b"got one\n"
    cli.stdin.close()
    assert cli.stdout.read() == b"end\n"
    assert cli.wait(10) == 0


def test_a_container_that_dies_ends_its_execs(box: Apple) -> None:
    start(box, "mortal")
    cli = box.open("exec", "-i", "mortal", "cat")
    until(lambda: box.execs("mortal"), "cat")
    box.die("mortal")
    assert cli.wait(10) == 137
    assert state(box, "mortal") == "stopped"
    box.ok("delete", "mortal")


# -- files -------------------------------------------------------------------------------------------------------------


def test_shared_folders_belong_to_whoever_runs_inside(box: Apple) -> None:
    work = box.home / "work"
    (work / "private").write_text("from here")
    (work / "private").chmod(0o600)
    assert shell(box, "box", "cat private; echo from there > answer; chmod 600 answer; mkdir made") == "from here"
    assert (work / "answer").read_text() == "from there\n"
    assert (work / "answer").stat().st_uid == os.geteuid()
    assert (work / "made").stat().st_gid == os.getegid()


def test_nothing_else_of_this_machine_can_be_seen(box: Apple) -> None:
    hidden = [box.folder, Path.home() / ".cache", Path(__file__).parent, "/etc/shadow", "/etc/machine-id", "/home/user"]
    script = "for path; do test -e $path && echo $path; done; true"
    assert box.ok("exec", "-u", "0", "box", "sh", "-c", script, "sh", *map(str, hidden)) == ""
    assert shell(box, "box", "ls -A /root /home/pi /opt /srv /var/tmp", "-u", "0").split() == [
        "/home/pi:", "/opt:", "/root:", "/srv:", "/var/tmp:"
    ]  # fmt: skip
    seen = [line.split()[0] for line in shell(box, "box", "ps -e -o pid=").splitlines()]
    assert seen[0] == "1" and len(seen) < 12
    for place in ("/usr/bin", "/usr/lib", "/usr/local/lib/node_modules", "/etc/ssl"):
        assert "Read-only" in box.call("exec", "-u", "0", "box", "touch", f"{place}/x").stderr


def test_mounts_and_their_modes(box: Apple) -> None:
    for name in ("outer/inner", "read", "deep"):
        (box.home / name).mkdir(parents=True)
        (box.home / name / "file").write_text(name)
    home = box.home
    start(
        box, "mounts", "-v", f"{home}/deep:/a/b/c", "-v", f"{home}/outer:/a", "-v", f"{home}/read:/read:ro",
        "--mount", f"type=bind,source={home}/outer/inner,target=/inner,readonly", "--tmpfs", "/scratch",
        "--mount", "type=tmpfs,target=/small,size=1M,mode=1777", "-u", "0",
    )  # fmt: skip
    assert shell(box, "mounts", "cat /a/b/c/file /a/inner/file /read/file /inner/file") == "deepouter/innerreadouter/inner"
    for place, message in (("/read/x", "Read-only"), ("/inner/x", "Read-only"), ("/small/x", "No space")):
        done = box.call("exec", "mounts", "dd", "if=/dev/zero", f"of={place}", "bs=2M", "count=1")
        assert done.returncode == 1 and message in done.stderr
    shell(box, "mounts", "touch /a/x /a/b/c/x /scratch/x && touch /a/inner/y")
    assert (home / "outer/inner/y").exists()  # it stays writable through the outer mount
    box.ok("delete", "-f", "mounts")


def test_one_folder_mounted_twice_has_one_mode(box: Apple) -> None:
    twice = box.home / "twice"
    twice.mkdir()
    start(box, "share", "-v", f"{twice}:/one", "-v", f"{twice}:/two:ro")
    assert box.call("exec", "share", "touch", "/one/x").returncode == 1
    assert any("twice" in warning for warning in box.log()[-2]["warnings"])
    box.ok("delete", "-f", "share")


def test_a_read_only_root(box: Apple) -> None:
    (box.home / "rw").mkdir()
    start(box, "fixed", "--read-only", "-v", f"{box.home}/rw:/work", "--tmpfs", "/tmp", "-u", "0")
    assert "Read-only" in box.call("exec", "fixed", "touch", "/opt/x").stderr
    shell(box, "fixed", "touch /work/x /tmp/x")
    assert box.json("inspect", "fixed")[0]["configuration"]["readOnly"]
    box.ok("delete", "-f", "fixed")


def test_capabilities(box: Apple) -> None:
    def bounding(*options: str) -> int:
        script = ("sh", IMAGE, "-c", "grep CapBnd /proc/self/status")
        return int(box.ok("run", "--rm", "-u", "0", *options, "--entrypoint", *script).split()[1], 16)

    assert bounding("--cap-drop", "ALL") == 0
    assert bounding("--cap-drop", "ALL", "--cap-add", "CAP_KILL") == 1 << jail.CAPABILITIES.index("KILL")
    assert not bounding() & 1 << jail.CAPABILITIES.index("SYS_ADMIN")


# -- networks ----------------------------------------------------------------------------------------------------------

CONNECT = """exec 3<>/dev/tcp/{}/{} && read -r line <&3 && echo "$line" """


@contextlib.contextmanager
def greeter(address: str) -> Iterator[int]:
    """A server that tells each peer its address; yields its port."""
    with socket.create_server((address, 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    peer, (host, _) = server.accept()
                    with peer:
                        peer.sendall(f"you are {host}\n".encode())

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def reach(apple: Apple, name: str, address: str, port: int) -> str:
    done = apple.call("exec", name, "timeout", "2", "bash", "-c", CONNECT.format(address, port))
    return done.stdout.strip() if done.returncode == 0 else ""


def address_of(apple: Apple, name: str) -> str:
    return str(apple.json("inspect", name)[0]["status"]["networks"][0]["ipv4Address"].split("/")[0])


def test_a_network_has_a_gateway_only_while_it_is_used(apple: Apple) -> None:
    apple.build()
    apple.ok("network", "create", "--subnet", "10.55.0.0/24", "--label", "owner=me", "oppi")
    (network,) = apple.json("network", "inspect", "oppi")
    assert network["status"] == {"ipv4Subnet": "10.55.0.0/24", "ipv4Gateway": "10.55.0.1"}
    assert network["configuration"]["ipv4Subnet"] == "10.55.0.0/24"
    assert network["configuration"]["labels"] == {"owner": "me"} and network["configuration"]["mode"] == "nat"
    with pytest.raises(OSError) as failed:
        socket.create_server(("10.55.0.1", 0))
    assert failed.value.errno == errno.EADDRNOTAVAIL
    for name in ("one", "two"):
        start(apple, name, "--network", "oppi")
    with greeter("10.55.0.1") as port:
        for name in ("one", "two"):
            assert reach(apple, name, "10.55.0.1", port) == f"you are {address_of(apple, name)}"
    assert address_of(apple, "one") != address_of(apple, "two")
    before = address_of(apple, "one")
    apple.ok("stop", "-t", "0", "one", "two")
    with pytest.raises(OSError):
        socket.create_server(("10.55.0.1", 0))
    apple.ok("start", "one")
    assert address_of(apple, "one") != before
    apple.ok("delete", "-f", "one", "two")
    assert apple.ok("network", "delete", "oppi") == "oppi"


def test_who_reaches_whom(box: Apple) -> None:
    box.ok("network", "create", "--internal", "closed")
    closed = box.json("network", "inspect", "closed")[0]
    assert closed["configuration"]["mode"] == "hostOnly"
    start(box, "inner", "--network", "closed")
    start(box, "lonely", "--network", "none")
    start(box, "listener", "--network", "oppi", command=("-c", "node -e \"net.createServer(s => s.end('hi\\n')).listen(9099)\""))
    internet("203.0.113.7")
    with greeter("203.0.113.7") as outside, greeter("127.0.0.1") as local, greeter("0.0.0.0") as everywhere:
        assert reach(box, "box", "203.0.113.7", outside)
        assert not reach(box, "inner", "203.0.113.7", outside)
        assert reach(box, "inner", closed["status"]["ipv4Gateway"], everywhere)  # the host itself remains reachable
        assert not reach(box, "box", "10.201.7.1", local) and not reach(box, "box", "127.0.0.1", local)
        assert not reach(box, "lonely", "10.201.7.1", everywhere)
        listener = address_of(box, "listener")
        until(lambda: reach(box, "box", listener, 9099) == "hi", "containers of one network reach each other")
        assert not reach(box, "inner", listener, 9099)
    assert shell(box, "box", "cat /etc/resolv.conf") == "nameserver 10.201.7.1"
    box.ok("delete", "-f", "inner", "lonely", "listener")
    box.ok("network", "delete", "closed")


def test_the_gateway_stays_where_it_is_when_a_neighbour_leaves(box: Apple) -> None:
    """A bridge takes the lowest address of its ports unless it has one of its own."""
    bridge = f"ct{box.tag}{box.store.read()['networks']['oppi']['number']}"
    jail.ip("link add lowest address 02:00:00:00:00:01 type veth peer name lower", f"link set lowest master {bridge}")
    with greeter("10.201.7.1") as port:
        assert reach(box, "box", "10.201.7.1", port)
        jail.ip("link delete lowest")
        assert reach(box, "box", "10.201.7.1", port)


def test_subnets_are_given_out_without_overlap(box: Apple) -> None:
    for name in ("auto1", "auto2"):
        box.ok("network", "create", name)
    subnets = {entry["status"]["ipv4Subnet"] for entry in box.json("network", "list", "--format", "json")}
    assert subnets == {SUBNET, "192.168.64.0/24", "192.168.65.0/24", "192.168.66.0/24"}
    done = box.call("network", "create", "--subnet", "192.168.65.128/25", "inside")
    assert done.returncode == 1 and "overlaps an existing network with subnet 192.168.65.0/24" in done.stderr
    box.ok("network", "delete", "auto1", "auto2")
    assert "default" in box.ok("network", "list", "-q").split()
    assert "ipv4Subnet" not in box.json("network", "inspect", "default")[0]["configuration"]  # only what was asked for


# -- what a test can make go wrong -------------------------------------------------------------------------------------


def test_a_wrong_answer_to_a_call(box: Apple) -> None:
    box.fault("network", "create", exit=1, stderr="Error: no luck\n", times=1)
    done = box.call("network", "create", "--subnet", "10.9.0.0/24", "nine")
    assert (done.returncode, done.stderr) == (1, "Error: no luck\n")
    box.ok("network", "create", "--subnet", "10.9.0.0/24", "nine")
    box.ok("network", "delete", "nine")
    box.fault("list", exit=0, stdout="[]\n", has=["--format"])
    assert box.json("list", "--format", "json") == [] and "box" in box.ok("list", "-q")
    box.healthy()


def test_a_failing_build_and_a_stop_that_times_out_though_it_worked(apple: Apple) -> None:
    apple.build()
    apple.fault("build", exit=1, stderr="Error: unknown: process did not complete\n")
    assert apple.call("build", "-t", "x:1", str(apple.folder / "context")).returncode == 1
    assert apple.call("image", "inspect", "x:1").returncode == 1
    start(apple, "ws1")
    apple.fault("stop", exit=1, stderr="Error: XPC timeout\n", times=1)
    apple.fault("stop", exit=1, stderr="Error: XPC timeout\n", act=True)
    assert apple.call("stop", "-t", "0", "ws1").returncode == 1
    assert state(apple, "ws1") == "running"
    assert apple.call("stop", "-t", "0", "ws1").returncode == 1
    assert state(apple, "ws1") == "stopped"


def test_a_call_that_hangs_or_takes_long(box: Apple) -> None:
    before = box.faulted()
    for number, deaf in enumerate((False, True), 1):
        box.fault("inspect", hang=True, deaf=deaf, times=1)
        cli = box.open("inspect", "box")
        until(lambda number=number: box.faulted() == before + number, "the call")
        with pytest.raises(subprocess.TimeoutExpired):
            cli.wait(0.1)
        cli.terminate()
        if deaf:
            with pytest.raises(subprocess.TimeoutExpired):
                cli.wait(0.3)
            cli.kill()
        assert cli.wait(10) == -(signal.SIGKILL if deaf else signal.SIGTERM)
    box.fault("inspect", delay=0.3, times=1)
    begin = time.monotonic()
    box.ok("inspect", "box")
    assert time.monotonic() - begin > 0.3
    box.healthy()


def test_an_exec_that_breaks_off(box: Apple) -> None:
    script = ("exec", "box", "sh", "-c", "echo 0123456789; exec sleep 500")
    box.fault("exec", bytes=4, times=1)
    box.fault("exec", bytes=4, exit=1, abandon=True, times=1)
    done = box.call(*script)
    assert (done.returncode, done.stdout) == (137, "0123")
    assert not box.execs("box")
    done = box.call(*script)
    assert (done.returncode, done.stdout) == (1, "0123")
    assert "sleep 500" in box.processes("box").values()
    box.end_exec("box", "sh")
    until(lambda: not box.execs("box"), "its end")
    cli = box.open("exec", "-i", "box", "cat")
    until(lambda: box.execs("box"), "cat")
    box.end_exec("box", "cat", signal.SIGTERM)
    assert cli.wait(10) == 143
    box.healthy()


def test_a_container_that_was_lost_by_the_services(box: Apple) -> None:
    start(box, "lost1")
    box.lose("lost1")
    assert state(box, "lost1") == "stopped" and "lost1" not in box.ok("list", "-q")
    box.ok("stop", "lost1")
    inside = box.processes("lost1")
    assert inside and box.call("exec", "lost1", "true").returncode == 1
    box.ok("delete", "-f", "lost1")
    assert not any(alive(pid) for pid in inside)


def test_every_call_is_written_down(box: Apple) -> None:
    box.call("exec", "-e", "A=1", "box", "true", env={"LEAK": "secret"})
    entry = box.log()[-1]
    assert entry["argv"] == ["exec", "-e", "A=1", "box", "true"] and entry["exit"] == 0
    assert entry["env"] == {**box.minimal(), "LEAK": "secret"} and entry["cwd"] == str(box.folder)
    assert entry["end"] >= entry["at"] and "secret" in box.spoken()


def test_bad_calls_of_others_fail_the_test(apple: Apple) -> None:
    apple.call("list", "--nope")
    assert apple.complaints() == []
    for argv in (["list", "--nope"], ["build", "-f", "-", "."], ["image", "inspect", "nothing:1"]):
        subprocess.run([str(apple.program), *argv], input=b"FROM node\nADD a /b\n", check=False, capture_output=True)
    refused, undone = apple.complaints()
    assert refused == "container list --nope: refused" and undone == "container build -f - .: not carried out"
    apple.build()
    (apple.home / "file").write_text("")
    sources = ("-v", f"{apple.home}/file:/file", "-v", f"{apple.home}:/missing")
    argv = ["run", "--rm", "--read-only", *sources, "-e", "PATH", "--entrypoint", "true", IMAGE]
    subprocess.run([str(apple.program), *argv], check=True, capture_output=True)
    assert len(apple.complaints()) == 4
    assert apple.complaints() == []


def test_nothing_is_left_of_a_stand_in_whatever_happened() -> None:
    bridges = jail.ip("link show type bridge")
    with pytest.raises(ZeroDivisionError), Apple() as apple:
        apple.build()
        start(apple, "left")
        cli = apple.open("exec", "-i", "left", "sleep", "777")
        until(lambda: apple.execs("left"), "sleep")
        pids = [pid for pid, _ in apple.leftovers()]
        raise ZeroDivisionError
    cli.wait(10)
    assert len(pids) >= 3
    assert not apple.folder.exists() and not any(alive(pid) for pid in pids)
    assert jail.ip("link show type bridge") == bridges


ABANDONED = """
import sys, time
from tests.container.rig import Apple, jail
apple = Apple()
apple.build()
apple.ok("run", "-d", "--name", "left", "--network", "none", "--entrypoint", "sleep", "oppi-test:local", "1000")
apple.fault("list", hang=True, deaf=True)
apple.open("list")
while not apple.calls("list"):
    time.sleep(0.01)
print(apple.folder, *(pid for pid, _ in apple.leftovers()), flush=True)
time.sleep(1000)
"""


def test_containers_end_with_tests_that_were_killed() -> None:
    tests = subprocess.Popen([sys.executable, "-c", ABANDONED], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    assert tests.stdout
    folder, *pids = tests.stdout.readline().split()
    assert len(pids) >= 3 and all(alive(int(pid)) for pid in pids)
    tests.kill()
    tests.wait()
    until(lambda: not any(alive(int(pid)) for pid in pids), "the end of all")
    shutil.rmtree(folder)


def test_two_starts_at_once_make_one_container(box: Apple) -> None:
    command = ("run", "-d", "--name", "race", "--network", "oppi", "--entrypoint", "sh", IMAGE, *IDLE)
    calls = [box.open(*command) for _ in range(4)]
    assert sorted(call.wait(20) for call in calls) == [0, 1, 1, 1]
    box.ok("delete", "-f", "race")


# -- with oppi ---------------------------------------------------------------------------------------------------------


def test_a_server_finds_the_stand_in_and_the_scripted_pi_can_be_inside() -> None:
    with Apple(fake={"DIALECT": "0.87"}) as apple, Server(env=apple.env) as server:
        assert server.pair("1.1").token
        found = subprocess.run(["sh", "-c", "command -v container"], env=server.env, capture_output=True, text=True, check=True)
        assert found.stdout.strip() == str(apple.program)
        apple.build()
        start(apple, "ws1", "--network", "none")
        cli = apple.open("exec", "-i", "ws1", "pi", "--mode", "rpc")
        assert cli.stdin and cli.stdout
        cli.stdin.write(b'{"type": "get_state", "id": "1"}\n')
        cli.stdin.flush()
        while json.loads(cli.stdout.readline()).get("id") != "1":
            pass
        cli.stdin.close()
        assert cli.wait(10) == 0


def test_a_container_that_is_being_stopped_says_so(box: Apple) -> None:
    start(box, "going", command=("-c", "sleep 1000; true"))
    cli = box.open("stop", "-t", "60", "going")
    until(lambda: state(box, "going") == "stopping", "the stop")
    assert box.call("exec", "going", "true").returncode == 1
    box.ok("kill", "going")
    assert cli.wait(10) == 0 and state(box, "going") == "stopped"
    box.ok("delete", "going")
