"""Images of the stand-in: base images that a registry would have, and what `container build` makes of a Dockerfile.

A RUN line is not run: nothing can be fetched here.  Its shell syntax is checked, users and folders that it adds are
there afterwards (folders as root's), and what it would have installed is taken from folders of this machine that the
configuration names ("contents": a pattern of the Dockerfile's text or of a RUN line with its variables filled in,
paths in the image and where they are here).  What a Dockerfile may have and this one cannot is no failed build but
NotImplementedError: several stages, here-documents, COPY and the like.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
from typing import Any

LARGEST = 16 * 1024  # bytes of a Dockerfile; from there on the real builder fails
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
USERS = {"root": [0, 0, "/root", "/bin/sh"], "nobody": [65534, 65534, "/", "/bin/sh"]}
NODE = {"node": [1000, 1000, "/home/node", "/bin/sh"]}
TAG = r"(:[A-Za-z0-9_.-]+)?(@sha256:[0-9a-f]{64})?"
BASES: list[tuple[str, dict[str, Any]]] = [
    (f"node{TAG}", {"env": [PATH, "NODE_VERSION=22.23.3"], "cmd": ["node"], "users": {**USERS, **NODE}}),
    (f"(alpine|debian|ubuntu|busybox){TAG}", {"env": [PATH], "cmd": ["/bin/sh"], "users": USERS}),
]
ELSEWHERE = "COPY ADD SHELL EXPOSE VOLUME HEALTHCHECK MAINTAINER ONBUILD".split()
TAKES_VALUE = ("-h", "-d", "--home", "--home-dir", "-s", "--shell", "-G", "--groups", "-c", "--gecos", "-k")


class BuildFailed(Exception):
    """The build ends with exit 1; the text is the reason."""


def full_name(reference: str) -> str:
    """A reference with the registry and tag it means when it is pulled."""
    name = reference if "@" in reference else tagged(reference)
    first, slash, _ = name.partition("/")
    if not slash:
        return f"docker.io/library/{name}"
    return name if "." in first or ":" in first or first == "localhost" else f"docker.io/{name}"


def short_name(reference: str) -> str:
    return re.sub(r"^docker\.io/(library/)?", "", reference)


def tagged(reference: str) -> str:
    return reference if ":" in reference.rsplit("/", 1)[-1] else f"{reference}:latest"


def base_image(reference: str) -> dict[str, Any] | None:
    """What a registry has under this name, or None."""
    for expression, found in BASES:
        if re.fullmatch(expression, short_name(full_name(reference))):
            config = {"Env": list(found["env"]), "Cmd": found["cmd"], "Entrypoint": [], "WorkingDir": "/", "User": ""}
            return {
                "config": {**config, "Labels": {}},
                "users": dict(found["users"]),
                "folders": [],
                "text": f"FROM {reference}\n",
            }
    return None


def finish(image: dict[str, Any], contents: list[dict[str, Any]], created: str) -> dict[str, Any]:
    """Gives an image its id and what this machine has for it."""
    paths: dict[str, str] = {}
    links: dict[str, str] = {}
    for entry in contents:
        if re.search(entry.get("when", ""), image["text"]):
            paths.update(entry.get("paths", {}))
            links.update(entry.get("links", {}))
    digest = hashlib.sha256(json.dumps([image["config"], image["text"], created]).encode()).hexdigest()
    return {**image, "contents": paths, "links": links, "id": digest, "digest": f"sha256:{digest}", "created": created}


# -- the Dockerfile ----------------------------------------------------------------------------------------------------


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile: name and the rest of the line, with continued lines joined."""
    lines, found = [line for line in text.split("\n") if line.strip() and not line.lstrip().startswith("#")], []
    while lines:
        line = lines.pop(0)
        while line.rstrip().endswith("\\") and lines:
            line = line.rstrip()[:-1] + lines.pop(0)
        word, _, rest = line.strip().partition(" ")
        name = word.upper()
        if name in ELSEWHERE or (name == "RUN" and "<<" in rest):
            raise NotImplementedError(f"a Dockerfile with {name} {rest[:40]}")
        if name not in STEPS:
            raise BuildFailed(f"dockerfile parse error: unknown instruction: {word}")
        if not rest.strip():
            raise BuildFailed(f"dockerfile parse error: {name} requires at least one argument")
        found.append((name, rest.strip()))
    if not found:
        raise BuildFailed("the Dockerfile cannot be empty")
    return found


def expand(text: str, variables: dict[str, str]) -> str:
    def value(found: re.Match[str]) -> str:
        return variables.get(found[1] or found[3], found[2] or "")

    return re.sub(r"(?<!\\)\$(?:\{(\w+)(?::-([^}]*))?\}|(\w+))", value, text)


def words_or_json(rest: str) -> list[str]:
    """The exec form of ENTRYPOINT and CMD, or the shell form run by a shell."""
    if rest.startswith("["):
        try:
            words = json.loads(rest)
        except ValueError:
            words = None
        if isinstance(words, list) and words and all(isinstance(word, str) for word in words):
            return words
    return ["/bin/sh", "-c", rest]


def pairs(rest: str) -> dict[str, str]:
    """`K=V K2="v w"`."""
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise BuildFailed(f"dockerfile parse error: {error}") from None
    if any("=" not in word for word in words):
        raise BuildFailed("dockerfile parse error: syntax error, can't find = ")
    return dict(word.split("=", 1) for word in words)


def added_user(words: list[str], known: int) -> dict[str, list[Any]]:
    """The user that the words after `adduser` or `useradd` make."""
    numbers = {"-u": 0, "--uid": 0, "-g": 1, "--gid": 1}
    found: list[Any] = [known, None, None, "/bin/sh"]
    names = []
    while words:
        word, equals, value = words.pop(0).partition("=")
        if word in numbers or word in TAKES_VALUE:
            value = value if equals else (words.pop(0) if words else "")
        if word in numbers and value.isdigit():
            found[numbers[word]] = int(value)
        elif word in ("-h", "-d", "--home", "--home-dir"):
            found[2] = value
        elif not word.startswith("-"):
            names.append(word)
    uid, gid, home, shell = found
    return {name: [uid, uid if gid is None else gid, home or f"/home/{name}", shell] for name in names[:1]}


class Build:
    """Carries out the instructions one after the other."""

    def __init__(self, arguments: dict[str, str]) -> None:
        self.arguments = arguments
        self.image: dict[str, Any] = {}
        self.variables: dict[str, str] = {}
        self.ran: list[str] = []

    def run(self, text: str) -> dict[str, Any]:
        """The finished image, without an id."""
        if len(text.encode()) >= LARGEST:
            raise BuildFailed(f"the Dockerfile has to be smaller than {LARGEST} bytes")
        for name, rest in instructions(text):
            if not self.image and name not in ("FROM", "ARG"):
                raise BuildFailed("dockerfile parse error: no build stage in current context")
            STEPS[name](self, rest)
        if not self.image:
            raise BuildFailed("no build stage in the Dockerfile")
        return {**self.image, "text": "\n".join([text, *self.ran])}

    @property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = self.image["config"]
        return found

    def start(self, rest: str) -> None:
        found = re.fullmatch(r"(--platform=\S+\s+)?(\S+)(?:\s+as\s+([\w.-]+))?", expand(rest, self.variables), re.I)
        if not found:
            raise BuildFailed("dockerfile parse error: FROM requires either one or three arguments")
        if self.image:
            raise NotImplementedError("several stages")
        base = base_image(found[2])
        if base is None:
            raise BuildFailed(f"failed to resolve source metadata for {full_name(found[2])}: not found")
        self.image = base
        self.variables = dict(entry.split("=", 1) for entry in self.config["Env"])

    def argument(self, rest: str) -> None:
        name, _, default = rest.partition("=")
        self.variables[name] = self.arguments.get(name, shlex.split(default)[0] if default else "")

    def environment(self, rest: str) -> None:
        for name, value in pairs(rest).items():
            self.variables[name] = expand(value, self.variables)
            kept = [entry for entry in self.config["Env"] if not entry.startswith(f"{name}=")]
            self.config["Env"] = [*kept, f"{name}={self.variables[name]}"]

    def label(self, rest: str) -> None:
        self.config["Labels"].update({name: expand(value, self.variables) for name, value in pairs(rest).items()})

    def user(self, rest: str) -> None:
        self.config["User"] = expand(rest, self.variables)

    def workdir(self, rest: str) -> None:
        path = os.path.normpath(os.path.join(self.config["WorkingDir"], expand(rest, self.variables)))
        self.config["WorkingDir"] = path
        self.image["folders"].append(path)

    def entrypoint(self, rest: str) -> None:
        self.config.update(Entrypoint=words_or_json(rest), Cmd=[])

    def command(self, rest: str) -> None:
        self.config["Cmd"] = words_or_json(rest)

    def stop_signal(self, rest: str) -> None:
        self.config["StopSignal"] = rest

    def shell(self, rest: str) -> None:
        script = re.sub(r"^(--(mount|network|security)=\S+\s+)+", "", rest)
        checked = subprocess.run(["/bin/sh", "-n"], input=script, capture_output=True, text=True, check=False)
        if checked.returncode:
            raise BuildFailed(f'process "/bin/sh -c {script}" did not complete successfully: exit code: 2')
        self.ran.append(expand(script, self.variables))
        for command in re.split(r"&&|\|\||;", self.ran[-1]):
            words = command.split()
            if words[:1] in (["adduser"], ["useradd"]):
                self.image["users"].update(added_user(words[1:], 1000 + len(self.image["users"]) - len(USERS)))
            elif words[:1] == ["mkdir"]:
                self.image["folders"] += [word for word in words if word.startswith("/")]


STEPS = {
    "FROM": Build.start,
    "ARG": Build.argument,
    "ENV": Build.environment,
    "LABEL": Build.label,
    "USER": Build.user,
    "WORKDIR": Build.workdir,
    "ENTRYPOINT": Build.entrypoint,
    "CMD": Build.command,
    "STOPSIGNAL": Build.stop_signal,
    "RUN": Build.shell,
}
