"""Images of the stand-in: base images that a registry would have, and what `container build` makes of a Dockerfile.

A RUN line is not run: nothing can be fetched here.  Its shell syntax is checked, users that it adds are known
afterwards, and what it would have installed is taken from folders of this machine that the configuration names
("contents": a pattern of the Dockerfile's text or of a RUN line with its variables filled in, paths in the image and
where they are here).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
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
KNOWN = (
    "FROM ARG RUN COPY ADD ENV USER WORKDIR ENTRYPOINT CMD LABEL SHELL EXPOSE VOLUME STOPSIGNAL HEALTHCHECK MAINTAINER"
).split()
COPY_FLAGS = ("--from=", "--chown=", "--chmod=", "--link", "--parents", "--exclude=")


class BuildFailed(Exception):
    """The build ends with exit 1; the text is the reason."""


def full_name(reference: str) -> str:
    """A reference with the registry and tag it means when it is pulled."""
    name = reference if "@" in reference or ":" in reference.rsplit("/", 1)[-1] else f"{reference}:latest"
    first, slash, _ = name.partition("/")
    if not slash:
        return f"docker.io/library/{name}"
    return name if "." in first or ":" in first or first == "localhost" else f"docker.io/{name}"


def short_name(reference: str) -> str:
    for prefix in ("docker.io/library/", "docker.io/"):
        if reference.startswith(prefix):
            return reference[len(prefix) :]
    return reference


def tagged(reference: str) -> str:
    return reference if ":" in reference.rsplit("/", 1)[-1] else f"{reference}:latest"


def base_image(reference: str) -> dict[str, Any] | None:
    """What a registry has under this name, or None."""
    name = short_name(full_name(reference))
    for expression, found in BASES:
        if re.fullmatch(expression, name):
            config = {"Env": list(found["env"]), "Cmd": list(found["cmd"]), "WorkingDir": "/", "User": "", "Labels": {}}
            return {
                "config": {**config, "Entrypoint": []},
                "users": dict(found["users"]),
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


def instructions(text: str) -> list[tuple[str, str, list[str]]]:
    """The instructions of a Dockerfile: name, the rest of the line (continued lines joined), here-documents."""
    lines, found = text.split("\n"), []
    while lines:
        line = lines.pop(0)
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        while line.rstrip().endswith("\\") and lines:
            following = lines.pop(0)
            if following.lstrip().startswith("#") or not following.strip():
                continue
            line = line.rstrip()[:-1] + "\n" + following
        word, _, rest = line.strip().partition(" ")
        name = word.upper()
        if name not in KNOWN:
            raise BuildFailed(f"dockerfile parse error: unknown instruction: {word}")
        if not rest.strip():
            raise BuildFailed(f"dockerfile parse error: {name} requires at least one argument")
        documents = []
        for mark in re.findall(r"<<-?[\"']?(\w+)[\"']?", rest) if name in ("RUN", "COPY") else []:
            documents.append(here_document(lines, mark))
        found.append((name, rest.strip(), documents))
    if not found:
        raise BuildFailed("the Dockerfile cannot be empty")
    return found


def here_document(lines: list[str], mark: str) -> str:
    body: list[str] = []
    while lines:
        line = lines.pop(0)
        if line.strip() == mark:
            return "\n".join([*body, ""])
        body.append(line)
    raise BuildFailed(f"unterminated heredoc {mark}")


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
    """`K=V K2="v w"`, or the old form `K V`."""
    try:
        words = shlex.split(rest.replace("\n", " "))
    except ValueError as error:
        raise BuildFailed(f"dockerfile parse error: {error}") from None
    if "=" not in words[0]:
        if len(words) < 2:
            raise BuildFailed("dockerfile parse error: must have two arguments")
        return {words[0]: rest.split(None, 1)[1]}
    if any("=" not in word for word in words):
        raise BuildFailed("dockerfile parse error: syntax error, can't find = ")
    return dict(word.split("=", 1) for word in words)


def added_user(words: list[str], known: int) -> tuple[str, list[Any]] | None:
    """The user that the words after `adduser` or `useradd` make."""
    numbers = {"-u": 0, "--uid": 0, "-g": 1, "--gid": 1}
    found: list[Any] = [known, None, None, "/bin/sh"]
    names = []
    while words:
        word, equals, value = words.pop(0).partition("=")
        takes = word in ("-h", "-d", "--home", "--home-dir", "-s", "--shell", "-G", "--groups", "-c", "--gecos", "-k")
        if word in numbers or takes:
            value = value if equals else (words.pop(0) if words else "")
        if word in numbers and value.isdigit():
            found[numbers[word]] = int(value)
        elif word in ("-h", "-d", "--home", "--home-dir"):
            found[2] = value
        elif not word.startswith("-"):
            names.append(word)
    if not names:
        return None
    uid, gid, home, shell = found
    return names[0], [uid, uid if gid is None else gid, home or f"/home/{names[0]}", shell]


class Build:
    """Carries out the instructions one after the other; stages have a name or a number."""

    def __init__(self, context: str, layers: str, arguments: dict[str, str]) -> None:
        self.context, self.layers, self.arguments = os.path.realpath(context), layers, arguments
        self.stages: dict[str, dict[str, Any]] = {}
        self.stage: dict[str, Any] = {}
        self.variables: dict[str, str] = {}
        self.globals: dict[str, str] = {}

    def run(self, text: str, target: str | None) -> dict[str, Any]:
        """The finished image, without an id."""
        if len(text.encode()) >= LARGEST:
            raise BuildFailed(f"the Dockerfile has to be smaller than {LARGEST} bytes")
        for name, rest, documents in instructions(text):
            if not self.stage and name not in ("FROM", "ARG"):
                raise BuildFailed("dockerfile parse error: no build stage in current context")
            getattr(self, f"do_{name.lower()}", self.ignore)(rest, documents)
        if target is not None and target not in self.stages:
            raise BuildFailed(f"target stage {target!r} could not be found")
        image = self.stages[target] if target is not None else self.stage
        if not image:
            raise BuildFailed("no build stage in the Dockerfile")
        return {**image, "text": "\n".join([text, *image["ran"]])}

    def ignore(self, rest: str, documents: list[str]) -> None:
        """Instructions without an effect on what the stand-in shows."""

    def do_from(self, rest: str, documents: list[str]) -> None:
        found = re.fullmatch(r"(--platform=\S+\s+)?(\S+)(?:\s+as\s+([\w.-]+))?", expand(rest, self.globals), re.I)
        if not found:
            raise BuildFailed("dockerfile parse error: FROM requires either one or three arguments")
        earlier = self.stages.get(found[2])
        base = json.loads(json.dumps(earlier)) if earlier else base_image(found[2])
        if base is None:
            raise BuildFailed(f"failed to resolve source metadata for {full_name(found[2])}: not found")
        number = str(sum(name.isdigit() for name in self.stages))
        layer = os.path.join(self.layers, number)
        os.makedirs(layer)
        if earlier:
            shutil.copytree(earlier["layer"], layer, symlinks=True, dirs_exist_ok=True)
        self.stage = {"ran": [], **base, "layer": layer}
        self.stages[number] = self.stages[found[3] or number] = self.stage
        self.variables = dict(entry.split("=", 1) for entry in self.config["Env"])

    @property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = self.stage["config"]
        return found

    def do_arg(self, rest: str, documents: list[str]) -> None:
        name, equals, default = rest.partition("=")
        value = self.arguments.get(name, self.globals.get(name, shlex.split(default)[0] if default else ""))
        (self.variables if self.stage else self.globals)[name] = value

    def do_env(self, rest: str, documents: list[str]) -> None:
        for name, value in pairs(rest).items():
            value = expand(value, self.variables)
            self.variables[name] = value
            kept = [entry for entry in self.config["Env"] if not entry.startswith(f"{name}=")]
            self.config["Env"] = [*kept, f"{name}={value}"]

    def do_label(self, rest: str, documents: list[str]) -> None:
        self.config["Labels"].update({name: expand(value, self.variables) for name, value in pairs(rest).items()})

    def do_user(self, rest: str, documents: list[str]) -> None:
        self.config["User"] = expand(rest, self.variables)

    def do_workdir(self, rest: str, documents: list[str]) -> None:
        path = os.path.normpath(os.path.join(self.config["WorkingDir"], expand(rest, self.variables)))
        self.config["WorkingDir"] = path
        os.makedirs(self.stage["layer"] + path, exist_ok=True)

    def do_entrypoint(self, rest: str, documents: list[str]) -> None:
        self.config["Entrypoint"], self.config["Cmd"] = words_or_json(rest), []

    def do_cmd(self, rest: str, documents: list[str]) -> None:
        self.config["Cmd"] = words_or_json(rest)

    def do_stopsignal(self, rest: str, documents: list[str]) -> None:
        self.config["StopSignal"] = rest

    def do_run(self, rest: str, documents: list[str]) -> None:
        rest = re.sub(r"^(--(mount|network|security)=\S+\s+)+", "", rest)
        script = "\n".join(documents) if documents and rest.startswith("<<") else rest
        script = re.sub(r"\n\s*", " ", script) if not documents else script
        checked = subprocess.run(["/bin/sh", "-n"], input=script, capture_output=True, text=True, check=False)
        if checked.returncode:
            raise BuildFailed(f'process "/bin/sh -c {script}" did not complete successfully: exit code: 2')
        self.stage["ran"].append(expand(script, self.variables))
        for command in re.split(r"&&|\|\||;|\n", self.stage["ran"][-1]):
            words = command.split()
            if words[:1] in (["adduser"], ["useradd"]):
                added = added_user(words[1:], 1000 + len(self.stage["users"]) - len(USERS))
                if added:
                    self.stage["users"][added[0]] = added[1]

    def do_copy(self, rest: str, documents: list[str]) -> None:
        words = words_or_json(rest)[0:] if rest.startswith("[") else shlex.split(expand(rest, self.variables))
        flags = [word for word in words if word.startswith("--")]
        words = [word for word in words if not word.startswith("--")]
        if any(not flag.startswith(COPY_FLAGS) for flag in flags):
            raise BuildFailed(f"dockerfile parse error: unknown flag: {flags[0]}")
        if len(words) < 2:
            raise BuildFailed("dockerfile parse error: COPY requires at least two arguments")
        stage = next((flag[7:] for flag in flags if flag.startswith("--from=")), None)
        mode = next((int(flag[8:], 8) for flag in flags if flag.startswith("--chmod=")), None)
        target = os.path.join(self.config["WorkingDir"], words[-1])
        if documents:
            self.place(None, documents[0], target, mode)
            return
        for word in words[:-1]:
            self.copy_one(word, stage, target, mode, len(words) > 2)

    do_add = do_copy

    def copy_one(self, word: str, stage: str | None, target: str, mode: int | None, several: bool) -> None:
        if stage is not None:
            if stage not in self.stages and base_image(stage) is None:
                raise BuildFailed(f"failed to resolve source metadata for {full_name(stage)}: not found")
            source = self.stages[stage]["layer"] + "/" + word.lstrip("/") if stage in self.stages else ""
            if not os.path.exists(source):
                return  # a RUN of that stage would have made it
        else:
            source = os.path.realpath(os.path.join(self.context, word.lstrip("/")))
            inside = source == self.context or source.startswith(self.context + os.sep)
            if not inside or not os.path.exists(source):
                raise BuildFailed(f'failed to calculate checksum of ref: "/{word}": not found')
        into_folder = target.endswith("/") or several or os.path.isdir(self.stage["layer"] + target)
        if into_folder and not os.path.isdir(source):
            target = os.path.join(target, os.path.basename(source))
        self.place(source, None, target, mode)

    def place(self, source: str | None, text: str | None, target: str, mode: int | None) -> None:
        path = os.path.normpath(self.stage["layer"] + target)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if source is None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text or "")
        elif os.path.isdir(source):
            shutil.copytree(source, path, symlinks=True, dirs_exist_ok=True)
        else:
            shutil.copy(source, path)
        if mode is not None:
            for folder, _, files in os.walk(path):
                for name in ("", *files):
                    os.chmod(os.path.join(folder, name), mode)
            os.chmod(path, mode)
