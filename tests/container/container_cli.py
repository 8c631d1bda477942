"""A strict stand-in for Apple's `container`: what oppi relies on, on Linux, without a Mac.

The command line is that of 1.x (or, by "version" in the configuration, of 0.9 and what lies between): what the real
tool rejects is rejected here, and more.  Containers are namespaces (`jail`), images are text (`images`), everything
else is state in one folder, which the wrapper script on PATH names, because oppi gives the CLI nothing but HOME and
PATH.  In that folder:

- config.json   what this "Mac" is: see `CONFIG` below
- db.json       containers, images, networks, volumes, whether the services run; changed under a lock
- faults.json   what shall go wrong: {"rules": [...]}, see `Faults`
- log.jsonl     every call: {"call", "argv", "env", "cwd", "pid", "at", "warnings"} and later {"call", "exit", "at"}
- containers/   for each: its root folder, the output of its first process, its running execs

This is a test double, not a sandbox: it does not keep a hostile root user inside.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Callable, NoReturn

from tests.container import grammar
from tests.container.grammar import MIB, Call, Usage, parse, usage, version_tuple

if TYPE_CHECKING:
    import socket

# What only some commands need is imported by them: most of a call's time is Python's start.
Record = dict[str, Any]
CONFIG: Record = {
    "version": "1.2.2",
    "macos": 26,  # 15 has no networks
    "kernel": True,  # False: `system start` asks for one, and nothing runs without
    "online": True,  # False: nothing can be pulled or built
    "contents": [],  # what images have from this machine: {"when": pattern, "paths": {inside: here}, "links": {}}
    "tag": "",  # what tells the bridges of several stand-ins apart; at most six characters
    "owner": 1,  # the process whose end ends all containers
    "netns": None,  # the network namespace of the tests, in which bridges may be made
    "hold": True,  # the stdin of an exec stays open when its CLI is killed; False: it ends
}
EPOCH_2001 = 978307200  # s; what dates counted from before 1.0
OUTPUT_GRACE = 3.0  # s the CLI waits for output streams to close after the process ended
STOP_GRACE = 5  # s
FAULT = 70  # exit code for what is no answer of the tool's
SERVICELESS = ("system start", "system status", "system stop", "system version")
CONTAINER_OF_BUILDS = "buildkit"
SMALLEST = {"cpus": 4, "memory": 1024 * MIB}
XPC = (
    'interrupted: "XPC connection error: Connection invalid"\n'
    "Ensure container system service has been started with `container system start`."
)
NO_KERNEL = "default kernel not configured for architecture arm64, please use the `container system kernel set` command"


class Failed(Exception):
    """A run-time error: exit 1, with the code that releases before 0.11 print in front of the message."""

    def __init__(self, message: str, code: str = "internalError") -> None:
        super().__init__(message)
        self.code = code


def not_found(message: str) -> Failed:
    return Failed(message, "notFound")


# -- state -------------------------------------------------------------------------------------------------------------


def fresh_id() -> str:
    import uuid

    return str(uuid.uuid4())


def remove_tree(path: str) -> None:
    import shutil

    shutil.rmtree(path, ignore_errors=True)


def load(path: str, default: Any) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return default


def save(path: str, value: Any) -> None:
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file)
    os.replace(temporary, path)


def first_state(kernel: bool) -> Record:
    default = network_record("default", (192 << 24 | 168 << 16 | 64 << 8, 24), 0)
    return {"services": True, "kernel": kernel, "containers": {}, "images": {}, "networks": {"default": default}, "bridges": 1}


class Store:
    """The files of the state folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.config: Record = {**CONFIG, **load(self.path("config.json"), {})}

    def path(self, *names: str) -> str:
        return os.path.join(self.folder, *names)

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        with open(self.path(f"{name}.lock"), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def change(self) -> Iterator[Record]:
        """The state, saved if nothing goes wrong; nobody else can read or change it meanwhile."""
        with self.locked("db"):
            db = load(self.path("db.json"), None) or first_state(self.config["kernel"])
            self.settle(db)
            yield db
            save(self.path("db.json"), db)

    def read(self) -> Record:
        with self.locked("db"):
            db: Record = load(self.path("db.json"), None) or first_state(self.config["kernel"])
            self.settle(db)
            return db

    def settle(self, db: Record) -> None:
        """A container whose keeper was killed has stopped, though nobody noted it."""
        for name, record in list(db["containers"].items()):
            if record["status"] == "running" and record.get("keeper") and not os.path.exists(f"/proc/{record['keeper']}"):
                self.ended(db, name)

    def ended(self, db: Record, name: str) -> None:
        record = db["containers"][name]
        record.update(status="stopped", pid=None, keeper=None, networks=[], stopping=False)
        if record["rm"]:
            self.forget(db, name)

    def forget(self, db: Record, name: str) -> None:
        db["containers"].pop(name, None)
        remove_tree(self.path("containers", name))

    def note(self, **fields: Any) -> None:
        line = json.dumps(fields) + "\n"
        descriptor = os.open(self.path("log.jsonl"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(descriptor, line.encode())
        os.close(descriptor)


class Faults:
    """What a test wants to go wrong.  A rule of faults.json has

    - argv: the first words of the calls it is for; has: words that must occur anywhere in them
    - times: how many calls it is for (all, if absent)
    - delay: seconds before anything happens; hang: no answer until killed; deaf: not even SIGTERM ends it
    - act: the command is carried out all the same, silently, and answered wrongly
    - exit, stdout, stderr: the answer, instead of carrying it out
    - bytes (exec and run): after so much output the process is killed, or with `abandon` only the CLI ends
    """

    def __init__(self, store: Store, argv: list[str]) -> None:
        self.rule: Record = {}
        self.owner = store.config["owner"]
        with store.locked("faults"):
            used = load(store.path("faults.used"), {})
            for rule in load(store.path("faults.json"), {}).get("rules", []):
                key = json.dumps(rule, sort_keys=True)
                if self.applies(rule, argv) and used.get(key, 0) < rule.get("times", 1 << 30):
                    if rule.get("deaf"):
                        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                            signal.signal(number, signal.SIG_IGN)
                    used[key] = used.get(key, 0) + 1
                    save(store.path("faults.used"), used)
                    self.rule = rule
                    return

    @staticmethod
    def applies(rule: Record, argv: list[str]) -> bool:
        first = rule.get("argv", [])
        return argv[: len(first)] == first and all(word in argv for word in rule.get("has", []))

    def before(self) -> None:
        """The part that comes before any work; does not return if the call hangs."""
        time.sleep(self.rule.get("delay", 0))
        if not self.rule.get("act"):
            self.hang()

    def hang(self) -> None:
        """For as long as the tests run, if that is wanted."""
        while self.rule.get("hang") and os.path.exists(f"/proc/{self.owner}"):
            time.sleep(0.2)

    def answer(self) -> int | None:
        """Prints the wrong answer and returns the exit code, if there is one."""
        self.hang()
        if "exit" not in self.rule or "bytes" in self.rule:
            return None
        sys.stdout.write(self.rule.get("stdout", ""))
        sys.stderr.write(self.rule.get("stderr", ""))
        return int(self.rule["exit"])


# -- forms of output ---------------------------------------------------------------------------------------------------


def show_json(value: Any, pretty: bool = False) -> str:
    """As Swift prints it: sorted, slashes escaped."""
    layout: Record = {"indent": 2, "separators": (",", " : ")} if pretty else {"separators": (",", ":")}
    return json.dumps(value, sort_keys=True, ensure_ascii=False, **layout).replace("/", "\\/")


def table(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def stamp() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def dotted(address: int) -> str:
    return ".".join(map(str, address.to_bytes(4, "big")))


def network_record(name: str, subnet: tuple[int, int], number: int, **fields: Any) -> Record:
    created = {"creationDate": stamp(), "labels": {}, "options": {}, "plugin": "container-network-vmnet"}
    return {
        "name": name,
        "subnet": list(subnet),
        "number": number,
        "last": 1,
        "mode": "nat",
        "chosen": False,
        **created,
        **fields,
    }


def gateway(network: Record) -> str:
    return dotted(network["subnet"][0] + 1)


def cidr_text(network: Record) -> str:
    return f"{dotted(network['subnet'][0])}/{network['subnet'][1]}"


def seconds(date: str) -> float:
    import calendar

    return float(calendar.timegm(time.strptime(date, "%Y-%m-%dT%H:%M:%SZ")) - EPOCH_2001)


def image_descriptor(image: Record) -> Record:
    return {"mediaType": "application/vnd.oci.image.index.v1+json", "digest": image["digest"], "size": 4000}


class Shapes:
    """The JSON forms of things, which changed with 1.0."""

    def __init__(self, version: str) -> None:
        self.old = version_tuple(version) < (1,)

    def date(self, text: str | None) -> Any:
        return seconds(text) if text and self.old else text

    def container(self, record: Record) -> Record:
        configuration = {**record["configuration"], "creationDate": self.date(record["configuration"]["creationDate"])}
        started = {"startedDate": self.date(record["startedDate"])} if record.get("startedDate") else {}
        status = "stopped" if record.get("lost") else "stopping" if record.get("stopping") else record["status"]
        networks = [] if record.get("lost") else record["networks"]
        if self.old:
            return {"status": status, "configuration": configuration, "networks": networks, **started}
        state = {"state": status, "networks": networks, **started}
        return {"id": record["id"], "configuration": configuration, "status": state}

    def network(self, record: Record) -> Record:
        subnet, status = cidr_text(record), {"ipv4Subnet": cidr_text(record), "ipv4Gateway": gateway(record)}
        keys = ("name", "mode", "labels", "plugin", "options")
        configuration = {**{key: record[key] for key in keys}, "creationDate": self.date(record["creationDate"])}
        if record["chosen"]:
            configuration["ipv4Subnet"] = subnet
        if self.old:
            configuration["id"] = configuration.pop("name")
            old = {"address": subnet, "gateway": gateway(record)}
            return {"id": record["name"], "state": "running", "config": configuration, "status": {**status, **old}}
        return {"id": record["name"], "configuration": configuration, "status": status}

    def image(self, image: Record) -> Record:
        descriptor = image_descriptor(image)
        if self.old:
            return {"reference": image["name"], "fullSize": "4 KB", "descriptor": descriptor}
        system = {"architecture": "arm64", "os": "linux"}
        variant = {"platform": system, "digest": image["digest"], "size": 4000}
        variant["config"] = {**system, "created": image["created"], "config": image["config"]}
        configuration = {"name": image["name"], "creationDate": image["created"], "descriptor": descriptor}
        return {"id": image["id"], "configuration": configuration, "variants": [variant]}


# -- users, environments, mounts of a new container --------------------------------------------------------------------


def find_user(text: str, users: Record) -> tuple[int, int, str]:
    """uid, gid and home of `name|uid[:gid]`."""
    name, colon, group = text.partition(":")
    if name in users:
        uid, gid, home, _ = users[name]
    elif name.isdigit():
        known = next((user for user in users.values() if user[0] == int(name)), [int(name), 0, "/", ""])
        uid, gid, home, _ = known
    else:
        raise not_found(f"unable to find user {name}: no matching entries in passwd file")
    if colon:
        found = users[group][1] if group in users else int(group) if group.isdigit() else None
        if found is None:
            raise not_found(f"unable to find group {group}: no matching entries in group file")
        gid = found
    return uid, gid, home


def user_text(call: Call, default: str) -> str:
    if call.get("user"):
        return str(call.get("user"))
    if call.get("uid") is None and call.get("gid") is None:
        return default
    return f"{call.get('uid', 0)}:{call.get('gid', 0)}"


def given_environment(call: Call, warnings: list[str]) -> list[str]:
    """The entries of --env-file and -e, in this order; a bare name is taken from the CLI's own environment."""
    found: list[tuple[str, str | None]] = []
    for path in call.get("env-file", []):
        try:
            with open(path, encoding="utf-8") as file:
                lines = [line.strip() for line in file if line.strip() and not line.startswith("#")]
        except OSError as error:
            raise Failed(f"failed to read env file {path}: {error.strerror}", "invalidArgument") from None
        found += [grammar.environment(line) for line in lines]
    found += call.get("env", [])
    for name, value in found:
        if value is None:
            warnings.append(f"-e {name} takes its value from the environment of the CLI")
    inherited = [(name, os.environ.get(name) if value is None else value) for name, value in found]
    return [f"{name}={value}" for name, value in inherited if value is not None]


def merge(*lists: Iterable[str]) -> list[str]:
    """Environments with later values in place of earlier ones."""
    return [f"{name}={value}" for name, value in dict(entry.split("=", 1) for one in lists for entry in one).items()]


def with_defaults(environment: list[str], home: str) -> list[str]:
    from tests.container.jail import DEFAULT_PATH

    names = {entry.split("=", 1)[0] for entry in environment}
    added = {"PATH": DEFAULT_PATH, "HOME": home}
    return [*environment, *(f"{name}={value}" for name, value in added.items() if name not in names)]


def checked_mounts(call: Call, warnings: list[str]) -> list[Record]:
    """The mounts of a run or create, their sources on this machine, in the order in which they are made."""
    found: list[Record] = []
    for item in [*call.get("volume", []), *call.get("mount", [])]:
        item = dict(item)
        if item["kind"] == "bind":
            item["source"] = checked_source(item, warnings)
        found.append(item)
    found += [{"kind": "tmpfs", "target": path, "source": None, "ro": False} for path in call.get("tmpfs", [])]
    targets = [os.path.normpath(item["target"]) for item in found]
    if len(set(targets)) < len(targets):
        raise Failed("two mounts have the same target", "invalidArgument")
    return one_share_each(sorted(found, key=lambda item: os.path.normpath(item["target"]).count("/")), warnings)


def checked_source(item: Record, warnings: list[str]) -> str:
    source: str = os.path.realpath(item["source"])
    if not os.path.exists(source):
        raise Failed(f"path '{item['source']}' does not exist", "invalidArgument")
    if not os.path.isdir(source):
        if item.get("mount"):
            raise Failed(f"path '{item['source']}' is not a directory", "invalidArgument")
        warnings.append(f"a single file is mounted: {source}")
    return source


def one_share_each(mounts: list[Record], warnings: list[str]) -> list[Record]:
    """The same source, once read-only and once not, becomes one share: the last one's mode is that of both."""
    modes = {item["source"]: item["ro"] for item in mounts if item["kind"] == "bind"}
    for item in mounts:
        if item["kind"] == "bind" and item["ro"] != modes[item["source"]]:
            warnings.append(f"mounted twice with different modes: {item['source']}")
            item["ro"] = modes[item["source"]]
    return mounts


def mount_json(item: Record) -> Record:
    kinds: Record = {"bind": {"virtiofs": {}}, "tmpfs": {"tmpfs": {}}}
    options = ["ro"] if item["ro"] else []
    return {"type": kinds[item["kind"]], "source": item["source"] or "tmpfs", "destination": item["target"], "options": options}


def configuration_json(call: Call, record: Record, image: Record, user: Record) -> Record:
    """What `inspect` shows of it."""
    process, mtu = record["process"], 1280
    first = {
        "executable": process["argv"][0],
        "arguments": process["argv"][1:],
        "environment": process["env"],
        "workingDirectory": process["cwd"],
        "terminal": False,
        "user": user,
        "supplementalGroups": [],
        "rlimits": [{"limit": f"RLIMIT_{n.upper()}", "soft": s, "hard": h} for n, s, h in process["rlimits"]],
    }
    networks = [
        {"network": net["name"], "options": {"hostname": record["id"], "mtu": int(net.get("mtu", mtu))}} for net in record["nets"]
    ]
    memory, processors = (call.get(key, SMALLEST[key]) for key in ("memory", "cpus"))
    found = {
        "id": record["id"],
        "image": {"reference": image["name"], "descriptor": image_descriptor(image)},
        "mounts": [mount_json(item) for item in record["mounts"]],
        "publishedPorts": [],
        "publishedSockets": [],
        "labels": dict(call.get("label", [])),
        "sysctls": {},
        "networks": networks,
        "dns": {"nameservers": record["dns"] or [], "searchDomains": [], "options": []},
        "rosetta": False,
        "initProcess": first,
        "platform": {"os": "linux", "architecture": "arm64", "variant": "v8"},
        "resources": {"cpus": processors, "memoryInBytes": memory},
        "runtimeHandler": "container-runtime-linux",
        "virtualization": False,
        "ssh": False,
        "readOnly": record["readOnly"],
        "useInit": record["init"],
        "capAdd": call.get("cap-add", []),
        "capDrop": call.get("cap-drop", []),
        "creationDate": stamp(),
    }
    if call.get("no-dns"):
        del found["dns"]
    return found


def bounding_set(call: Call) -> list[str]:
    from tests.container.jail import CAPABILITIES, GRANTED

    found = set(GRANTED)
    for action, names in (("drop", call.get("cap-drop", [])), ("add", call.get("cap-add", []))):
        chosen = set(CAPABILITIES) if "ALL" in names else set(names)
        found = found - chosen if action == "drop" else found | chosen
    return sorted(found)


# -- the commands ------------------------------------------------------------------------------------------------------


class Cli:
    """One call of the CLI."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.version: str = store.config["version"]
        self.level = version_tuple(self.version)
        self.shapes = Shapes(self.version)
        self.warnings: list[str] = []
        self.faults: Faults | None = None
        self.finish: Callable[[int], None] = lambda code: None
        self.signals = 0

    def run(self, argv: list[str]) -> int:
        if argv == ["--version"]:
            return self.out(f"container CLI version {self.version} (build: release, commit: 0000000)")
        call = parse(argv, self.version, self.store.config["macos"])
        key = " ".join(call.words)
        if call.get("help"):
            return self.out(usage(call.words))
        if key not in SERVICELESS and not self.store.read()["services"]:
            raise Failed(XPC, "interrupted")
        try:
            code: int | None = getattr(self, "do_" + key.replace(" ", "_"))(call)
        except Usage as error:
            error.words = call.words
            raise
        return code or 0

    def out(self, text: str) -> int:
        sys.stdout.write(text + "\n")
        return 0

    def error_text(self, error: Failed) -> str:
        if self.level < (0, 11) and not str(error).startswith("interrupted"):
            return f'Error: {error.code}: "{error}"'
        return f"Error: {error}"

    def listing(self, call: Call, values: list[Any], rows: list[list[str]]) -> int:
        """Prints a list in the form that was asked for."""
        form = "quiet" if call.get("quiet") else call.get("format", "table")
        if form == "toml":
            raise Usage("the stand-in cannot write toml")
        if form == "quiet":
            for row in rows[1:]:
                self.out(row[0])
            return 0
        return self.out(table(rows) if form == "table" else show_json(values))

    def ids(self, call: Call, known: Iterable[str]) -> list[str]:
        if bool(call.positionals) == bool(call.get("all")):
            both = call.positionals
            raise Failed(
                "explicitly supplied ids conflict with the --all flag" if both else "no ids specified and --all not supplied",
                "invalidArgument",
            )
        return list(known) if call.get("all") else list(dict.fromkeys(call.positionals))

    def each(self, names: list[str], what: str, action: Callable[[str], str | None]) -> int:
        """Does something to each of several and prints its name; the failures come last and make the exit code 1."""
        problems = []
        for name in names:
            try:
                shown = action(name)
                if shown is not None:
                    self.out(shown)
            except Failed as error:
                problems.append(f'Error: internalError: "failed to {what}" (cause: "{error.code}: \\"{error}\\"")')
        sys.stdout.flush()
        for problem in problems:
            sys.stderr.write(problem + "\n")
        return 1 if problems else 0

    # -- system

    def do_system_start(self, call: Call) -> int:
        """The services run even if the question for a kernel that follows is not answered."""
        with self.store.change() as db:
            db["services"] = True
            missing = not db["kernel"]
        install = call.get("enable-kernel-install")
        if missing and not install and not call.get("disable-kernel-install"):
            sys.stdout.write("No default kernel configured.\nInstall the recommended default kernel? [Y/n]: ")
            sys.stdout.flush()
            answer = sys.stdin.readline()
            if not answer:
                raise Failed("failed to read user input")
            install = answer.strip().lower() in ("", "y")
        with self.store.change() as db:
            db["kernel"] = db["kernel"] or bool(install)
        return 0

    def do_system_stop(self, call: Call) -> int:
        for name, record in self.store.read()["containers"].items():
            if record["status"] == "running":
                self.stop_one(name, "TERM", STOP_GRACE)
        with self.store.change() as db:
            db["services"] = False
        return 0

    def do_system_status(self, call: Call) -> int:
        up = self.store.read()["services"]
        fields: Record = {"status": "running" if up else "unregistered"}
        if up:
            build = {"Version": f"container-apiserver version {self.version}", "Commit": "0000000", "Build": "release"}
            fields.update({f"apiServer{name}": value for name, value in build.items()})
            fields.update(apiServerAppName="container-apiserver", appRoot="/Users/me/Library", installRoot="/usr/local")
        if call.get("format", "table") == "table":
            self.out(table([["FIELD", "VALUE"], *([key, value] for key, value in fields.items())]))
        else:
            self.out(show_json(fields))
        return 0 if up else 1

    def do_system_version(self, call: Call) -> int:
        mine = {"appName": "container", "buildType": "release", "commit": "0000000", "version": self.version}
        server = {**mine, "appName": "container-apiserver", "version": f"container-apiserver version {self.version}"}
        values = [mine, server] if self.store.read()["services"] else [mine]
        keys = ("appName", "version", "buildType", "commit")
        return self.listing(call, values, [[key.upper() for key in keys], *([v[key] for key in keys] for v in values)])

    # -- images

    def find_image(self, db: Record, reference: str) -> Record | None:
        from tests.container.images import full_name, tagged

        for name in (reference, tagged(reference), full_name(reference)):
            if name in db["images"]:
                found: Record = db["images"][name]
                return found
        return None

    def pull(self, db: Record, reference: str) -> Record:
        from tests.container import images

        name = images.full_name(reference)
        found = images.base_image(reference) if self.store.config["online"] else None
        if found is None:
            repository, _, tag = name.partition("/")[2].rpartition(":")
            url = f"https://registry-1.docker.io/v2/{repository}/manifests/{tag}"
            raise Failed(f"HTTP request to {url} failed with response: 401 Unauthorized. Reason: access denied or wrong name")
        image = images.finish({**found, "layer": None}, self.store.config["contents"], stamp())
        db["images"][name] = {**image, "name": name}
        return {**image, "name": name}

    def do_image_list(self, call: Call) -> int:
        from tests.container.images import short_name

        found = sorted(self.store.read()["images"].values(), key=lambda image: image["name"])
        rows = [["NAME", "TAG", "DIGEST"]]
        for image in found:
            name, _, tag = short_name(image["name"]).rpartition(":")
            rows.append([name, tag, image["digest"][7:19]])
        if call.get("quiet"):
            rows = [["NAME"], *([short_name(image["name"])] for image in found)]
        return self.listing(call, [self.shapes.image(image) for image in found], rows)

    def do_image_inspect(self, call: Call) -> int:
        db = self.store.read()
        found = {name: self.find_image(db, name) for name in call.positionals}
        missing = [name for name, image in found.items() if image is None]
        if missing and self.level >= (1,):
            raise not_found(f"image not found: {', '.join(missing)}")
        return self.out(show_json([self.shapes.image(image) for image in found.values() if image], pretty=True))

    def do_image_delete(self, call: Call) -> int:
        db = self.store.read()

        def delete(name: str) -> str | None:
            image = self.find_image(db, name)
            if image is None:
                if call.get("force"):
                    return None
                raise not_found(f"image not found: {name}")
            with self.store.change() as changed:
                changed["images"].pop(image["name"], None)
            return name

        return self.each(self.ids(call, db["images"]), "delete image", delete)

    def do_build(self, call: Call) -> int:
        from tests.container import images

        context = call.positionals[0] if call.positionals else "."
        tags = call.get("tag", [])
        text = self.dockerfile(call, context)
        with self.store.change() as db:
            self.builder(db)
        try:
            if not self.store.config["online"]:
                raise images.BuildFailed("failed to do request: dial tcp: lookup registry-1.docker.io: no such host")
            image = images.finish(images.Build(dict(call.get("build-arg", []))).run(text), self.store.config["contents"], stamp())
        except images.BuildFailed as error:
            raise Failed(f"unknown: {error}", "unknown") from None
        with self.store.change() as db:
            for name in map(images.tagged, tags or [fresh_id()]):
                db["images"][name] = {**image, "name": name}
        sys.stderr.write("#1 [internal] load build definition\n#2 DONE\n")
        for name in map(images.tagged, tags):
            self.out(name)
        return 0

    def dockerfile(self, call: Call, context: str) -> str:
        """The text of the file to build; what is missing is an error of usage."""
        if not os.path.isdir(context):
            raise Usage(f"context dir does not exist {context}")
        path = call.get("file")
        if path == "-":
            return sys.stdin.read()
        names = [path] if path else [os.path.join(context, name) for name in ("Dockerfile", "Containerfile")]
        for name in names:
            if os.path.isfile(name):
                with open(name, encoding="utf-8") as file:
                    return file.read()
        raise Usage(f"dockerfile does not exist at path: {names[0]}")

    def builder(self, db: Record) -> Record:
        """The container in which builds run, which stays."""
        if not db["kernel"]:
            raise not_found(NO_KERNEL)
        record: Record = db["containers"].setdefault(CONTAINER_OF_BUILDS, builder_record())
        record.update(status="running", startedDate=stamp())
        return record

    # -- making containers

    def do_create(self, call: Call) -> int:
        return self.out(self.make(call))

    def do_run(self, call: Call) -> int:
        name = self.make(call)
        if call.get("progress") != "none":
            sys.stderr.write("[6/6] Starting container [0s]\n")
        try:
            if call.get("detach"):
                self.start_detached(name)
                return self.out(name)
            return self.start_attached(name, bool(call.get("interactive")))
        except Failed:
            with self.store.change() as db:
                self.store.forget(db, name)
            raise

    def make(self, call: Call) -> str:
        """Writes down a new container; returns its id."""
        name: str = call.get("name") or fresh_id()
        self.check_networks(call)
        environment = given_environment(call, self.warnings)
        with self.store.change() as db:
            if name in db["containers"]:
                raise Failed(f"container with id {name} already exists", "exists")
            image = self.find_image(db, call.positionals[0]) or self.pull(db, call.positionals[0])
            networks = self.wanted_networks(call, db)
            mounts = checked_mounts(call, self.warnings)
            record = self.record(call, name, image, environment, networks, mounts)
            db["containers"][name] = record
        os.makedirs(self.store.path("containers", name, "execs"))
        return name

    def check_networks(self, call: Call) -> None:
        named = {item["name"] for item in call.get("network", [])} - {"default", "none"}
        if named and self.store.config["macos"] < 26:
            raise Failed("non-default network configuration requires macOS 26 or newer", "invalidArgument")

    def wanted_networks(self, call: Call, db: Record) -> list[Record]:
        wanted: list[Record] = call.get("network", [{"name": "default"}])
        wanted = [item for item in wanted if item["name"] != "none"]
        for item in wanted:
            if item["name"] not in db["networks"]:
                raise not_found(f"network {item['name']} not found")
        return wanted

    def record(
        self, call: Call, name: str, image: Record, given: list[str], networks: list[Record], mounts: list[Record]
    ) -> Record:
        config = image["config"]
        entrypoint = [call.get("entrypoint")] if call.get("entrypoint") else config["Entrypoint"]
        words = call.process or ([] if call.get("entrypoint") else config["Cmd"])
        argv = [*entrypoint, *words]
        if not argv:
            raise Failed("Command/Entrypoint not specified for container process", "invalidArgument")
        user = user_text(call, config["User"] or "root")
        uid, gid, _ = find_user(user, image["users"])
        environment = [*config["Env"], *given] if self.level < (0, 10) else merge(config["Env"], given)
        process = {
            "argv": argv,
            "env": environment,
            "cwd": call.get("workdir") or config["WorkingDir"] or "/",
            "user": user,
            "rlimits": call.get("ulimit", []),
            "capabilities": bounding_set(call),
        }
        record = {
            "id": name,
            "rm": bool(call.get("rm")),
            "status": "stopped",
            "networks": [],
            "pid": None,
            "process": process,
            "image": {key: image[key] for key in ("name", "users", "contents", "links", "folders")},
            "mounts": mounts,
            "nets": networks,
            "dns": None if not call.get("no-dns") else [],
            "readOnly": bool(call.get("read-only")),
            "init": bool(call.get("init")),
            "stopSignal": config.get("StopSignal"),
        }
        record["dns"] = call.get("dns", record["dns"])
        user_json = {"raw": {"userString": user}} if not user[:1].isdigit() else {"id": {"uid": uid, "gid": gid}}
        record["configuration"] = configuration_json(call, record, image, user_json)
        return record

    # -- starting

    def plan(self, name: str) -> Record:
        """Reserves what a container needs to run and says how it is to be made."""
        from tests.container import jail

        if self.store.config["netns"] != jail.network_namespace():
            raise Failed("stand-in: run this in the network namespace of the tests (rig.namespaces)")
        with self.store.change() as db:
            record = self.existing(db, name)
            if record["status"] == "running" or record.get("starting"):
                raise Failed(f"container {name} is already running", "invalidState")
            if not db["kernel"]:
                raise not_found(NO_KERNEL)
            for item in record["mounts"]:
                if item["kind"] == "bind" and not os.path.exists(item["source"]):
                    raise Failed(f"path '{item['source']}' does not exist", "invalidArgument")
            nets = [self.address(db["networks"][item["name"]], item) for item in record["nets"]]
            record["starting"] = True
            record["networks"] = [self.attachment(name, net) for net in nets]
        folder = self.store.path("containers", name)
        uid, gid, home = find_user(record["process"]["user"], record["image"]["users"])
        process = {**record["process"], "uid": uid, "gid": gid, "env": with_defaults(record["process"]["env"], home)}
        dns = record["dns"] if record["dns"] is not None else [net["gateway"] for net in nets[:1]]
        plan = {
            "id": name,
            "state": self.store.folder,
            "owner": self.store.config["owner"],
            "root": os.path.join(folder, "root"),
            "log": os.path.join(folder, "log"),
            "keeperLog": os.path.join(folder, "keeper.log"),
            "process": process,
            "nets": nets,
            "dns": dns,
            "mounts": [{**item, "options": tmpfs_options(item)} for item in record["mounts"]],
            **{key: record[key] for key in ("readOnly", "init")},
            **{key: record["image"][key] for key in ("users", "contents", "links", "folders")},
        }
        if not os.path.isdir(plan["root"]):
            jail.furnish(plan["root"], plan)
        if record["readOnly"]:
            self.check_targets(plan)
        return plan

    def check_targets(self, plan: Record) -> None:
        """Nobody has promised that a folder to mount on can still be made when the root cannot be written to."""
        targets = [os.path.normpath(item["target"]) for item in plan["mounts"]]
        for target in targets:
            above = any(target.startswith(f"{other}/") for other in targets)
            if not above and not os.path.isdir(plan["root"] + target):
                self.warnings.append(f"the image has no {target} and its root is read-only")

    def address(self, network: Record, item: Record) -> Record:
        """The next free address of a network: never the one that was used last, as the real ones change too."""
        base, prefix = network["subnet"]
        network["last"] = 2 if network["last"] >= (1 << (32 - prefix)) - 2 else network["last"] + 1
        return {
            "network": network["name"],
            "bridge": f"ct{self.store.config['tag']}{network['number']}",
            "gateway": gateway(network),
            "address": dotted(base + network["last"]),
            "prefix": prefix,
            "internal": network["mode"] == "hostOnly",
            "mac": item.get("mac"),
            "mtu": item.get("mtu"),
        }

    def attachment(self, name: str, net: Record) -> Record:
        address = f"{net['address']}/{net['prefix']}"
        found = {"network": net["network"], "hostname": name, "ipv4Address": address, "ipv4Gateway": net["gateway"]}
        if self.level < (1,):
            found.update(address=address, gateway=net["gateway"])
        return found

    def changed(self, name: str) -> Callable[..., None]:
        """For the keeper: writes down that the container runs or has ended."""

        def change(pid: int | None = None, exit: int = 0, failed: bool = False) -> None:
            with self.store.change() as db:
                record = db["containers"].get(name)
                if record is None:
                    return
                record.pop("starting", None)
                if pid is not None:
                    record.update(status="running", pid=pid, keeper=os.getpid(), startedDate=stamp())
                else:
                    self.store.ended(db, name)

        return change

    def start_detached(self, name: str) -> None:
        from tests.container import jail

        sys.stdout.flush()
        control = jail.start(self.plan(name), self.changed(name))
        self.expect_started(control)

    def expect_started(self, control: socket.socket) -> Any:
        lines = control.makefile("rb")
        line = lines.readline()
        answer = json.loads(line) if line else {"error": f"the runtime is gone\n{self.helper_trouble()}"}
        if "error" in answer:
            raise Failed(f"failed to start container: {answer['error']}")
        return lines

    def helper_trouble(self) -> str:
        """What the keepers and relays had to complain about; always a fault of the stand-in or of this machine."""
        import glob

        texts = []
        for path in glob.glob(self.store.path("containers", "*", "keeper.log")):
            with open(path, encoding="utf-8") as file:
                texts.append(file.read())
        return "".join(texts)

    def start_attached(self, name: str, interactive: bool) -> int:
        from tests.container import jail

        sys.stdout.flush()
        plan = self.plan(name)
        incoming: Any = os.pipe() if interactive else (None, None)
        outgoing, errors = os.pipe(), os.pipe()
        attached = (incoming[0], outgoing[1], errors[1])
        control = jail.start(plan, self.changed(name), attached)
        return self.attend(control, incoming[1], outgoing[0], errors[0])

    def do_start(self, call: Call) -> int:
        name = call.positionals[0]
        if self.existing(self.store.read(), name)["status"] != "running":
            self.start_detached(name)
        return self.out(name)

    # -- a process that the CLI stays with

    def attend(self, control: socket.socket, stdin: int | None, stdout: int, stderr: int) -> int:
        """Passes the streams on until the process has ended; its exit code."""
        import threading

        lines = self.expect_started(control)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: self.signalled(number, control))
        if stdin is not None:
            threading.Thread(target=self.feed, args=(stdin, control), daemon=True).start()
        outputs = [
            threading.Thread(target=self.pass_on, args=(stdout, 1, control), daemon=True),
            threading.Thread(target=self.pass_on, args=(stderr, 2, control), daemon=True),
        ]
        for thread in outputs:
            thread.start()
        line = lines.readline()
        answer = json.loads(line) if line else {"error": "connection to the runtime was lost"}
        deadline = time.monotonic() + OUTPUT_GRACE
        for thread in outputs:
            thread.join(max(0.0, deadline - time.monotonic()))
        if "error" in answer:
            sys.stderr.write(f"Error: {answer['error']}\n")
            return 1
        rule = self.faults.rule if self.faults else {}
        return int(rule["exit"]) if "bytes" in rule and "exit" in rule else int(answer["exit"])

    def signalled(self, number: int, control: socket.socket) -> None:
        """From 1.0 to 1.2.2 signals are not passed on, and the third one ends the CLI but not the process."""
        if self.level < (1,):
            control.sendall(json.dumps({"kill": number}).encode() + b"\n")
            return
        self.signals += 1
        os.write(2, b"failed to send signal: missing signal in xpc message\n")
        if self.signals == 3:
            self.end(1)

    def end(self, code: int) -> NoReturn:
        self.finish(code)
        os._exit(code)

    def feed(self, target: int, control: socket.socket) -> None:
        """Own stdin to the process; its end is passed on."""
        with contextlib.suppress(OSError):
            while True:
                data = memoryview(os.read(0, 65536))
                if not data:
                    break
                while data:
                    data = data[os.write(target, data) :]
        os.close(target)
        with contextlib.suppress(OSError):
            control.sendall(b'{"eof": true}\n')

    def pass_on(self, source: int, target: int, control: socket.socket) -> None:
        """Output of the process to the own one, up to where a test wants it to break."""
        rule = self.faults.rule if self.faults else {}
        left = rule.get("bytes", -1) if target == 1 else -1
        while True:
            data = os.read(source, 65536)
            if not data:
                return
            shown = memoryview(data if left < 0 else data[:left])
            try:
                while shown:
                    shown = shown[os.write(target, shown) :]
            except OSError:
                self.end(1)  # whoever called is gone
            if left >= 0:
                left -= min(left, len(data))
                if left == 0:
                    break
        if rule.get("abandon"):
            self.end(rule.get("exit", 1))
        control.sendall(json.dumps({"kill": signal.SIGKILL}).encode() + b"\n")

    def do_exec(self, call: Call) -> int:
        from tests.container import jail

        name = call.positionals[0]
        record = self.existing(self.store.read(), name)
        if record["status"] != "running" or record.get("lost") or record.get("stopping") or not record.get("pid"):
            raise Failed(f"container {name} is not running", "invalidState")
        first = record["process"]
        uid, gid, home = find_user(user_text(call, first["user"]), record["image"]["users"])
        environment = [*first["env"], *given_environment(call, self.warnings)]
        process = {
            "argv": call.process,
            "env": with_defaults(environment, home),
            "cwd": call.get("workdir") or first["cwd"],
            "uid": uid,
            "gid": gid,
            "rlimits": call.get("ulimit", first["rlimits"]),
            "capabilities": first["capabilities"],
        }
        folder = self.store.path("containers", name)
        held = {
            "hold": self.store.config["hold"],
            "folder": os.path.join(folder, "execs"),
            "log": os.path.join(folder, "keeper.log"),
        }
        sys.stdout.flush()
        interactive = bool(call.get("interactive")) and not call.get("detach")
        ends = jail.exec_in(record["pid"], process, interactive, held)
        if call.get("detach"):
            self.expect_started(ends[0])
            return self.out(name)
        return self.attend(*ends)

    # -- ending containers

    def existing(self, db: Record, name: str) -> Record:
        record: Record | None = db["containers"].get(name)
        if record is None:
            raise not_found(f"container with ID {name} not found")
        return record

    def do_stop(self, call: Call) -> int:
        db = self.store.read()
        running = [name for name, record in db["containers"].items() if record["status"] == "running"]

        def stop(name: str) -> str | None:
            if name not in db["containers"] and self.level < (0, 11):
                return None
            self.existing(db, name)
            self.stop_one(name, call.get("signal"), call.get("time", STOP_GRACE))
            return name

        return self.each(self.ids(call, running), "stop container", stop)

    def stop_one(self, name: str, signal_text: str | None, grace: int) -> None:
        """Signals the first process, kills it after the grace, waits until all is cleared up."""
        record = self.existing(self.store.read(), name)
        if record["status"] != "running" or record.get("lost"):
            return
        if not record.get("pid"):  # the container of builds has no processes
            with self.store.change() as db:
                db["containers"][name]["status"] = "stopped"
            return
        with self.store.change() as db:
            if name in db["containers"]:
                db["containers"][name]["stopping"] = db["containers"][name]["status"] == "running"
        self.signal_first(record, signal_text or record["stopSignal"] or "TERM")
        if not self.wait_ended(record, grace):
            self.signal_first(record, "KILL")
            self.wait_ended(record, None)

    def wait_ended(self, record: Record, timeout: float | None) -> bool:
        from tests.container import jail

        if timeout is not None and not jail.wait_gone(record["pid"], timeout):
            return False
        return jail.wait_gone(record["keeper"], None)

    def signal_first(self, record: Record, text: str) -> None:
        text = text[3:] if text.startswith("SIG") else text
        with contextlib.suppress(ProcessLookupError):
            os.kill(record["pid"], int(text) if text.isdigit() else getattr(signal, f"SIG{text}"))

    def do_kill(self, call: Call) -> int:
        db = self.store.read()
        running = [name for name, record in db["containers"].items() if record["status"] == "running"]

        def kill(name: str) -> str:
            record = self.existing(db, name)
            if record["status"] != "running" or record.get("lost"):
                raise Failed(f"container {name} is not running", "invalidState")
            if record.get("pid"):
                self.signal_first(record, call.get("signal", "KILL"))
                if call.get("signal", "KILL") in ("KILL", "9"):
                    self.wait_ended(record, None)
            return name

        return self.each(self.ids(call, running), "kill container", kill)

    def do_delete(self, call: Call) -> int:
        db = self.store.read()

        def delete(name: str) -> str | None:
            if name not in db["containers"] and self.level < (0, 11):
                return None
            record = self.existing(db, name)
            if record["status"] == "running" and not record.get("lost") and not call.get("force"):
                raise Failed(f"container {name} is running and can not be deleted", "invalidState")
            if record["status"] == "running" and record.get("pid"):
                self.signal_first(record, "KILL")
                self.wait_ended(record, None)
            with self.store.change() as changed:
                self.store.forget(changed, name)
            return name

        stopped = [name for name, record in db["containers"].items() if call.get("force") or record["status"] != "running"]
        return self.each(self.ids(call, stopped), "delete container", delete)

    # -- looking at containers

    def do_list(self, call: Call) -> int:
        records = list(self.store.read()["containers"].values())
        everything = call.get("all") or (self.level < (1,) and call.get("format") == "json")
        shown = [r for r in records if everything or (r["status"] == "running" and not r.get("lost"))]
        rows = [["ID", "IMAGE", "OS", "ARCH", "STATE", "IP" if self.level >= (1,) else "ADDR", "CPUS", "MEMORY", "STARTED"]]
        for record in shown:
            value = self.shapes.container(record)
            state, config = value["status"], record["configuration"]
            state = state["state"] if isinstance(state, dict) else state
            address = ",".join(net["ipv4Address"].split("/")[0] for net in record["networks"])
            resources = config["resources"]
            row = [record["id"], config["image"]["reference"], "linux", "arm64", state, address, str(resources["cpus"])]
            rows.append([*row, f"{resources['memoryInBytes'] // MIB} MB", record.get("startedDate") or ""])
        return self.listing(call, [self.shapes.container(record) for record in shown], rows)

    def do_inspect(self, call: Call) -> int:
        containers = self.store.read()["containers"]
        missing = [name for name in call.positionals if name not in containers]
        if missing and self.level >= (1,):
            raise not_found(f"container not found: {', '.join(missing)}")
        found = [self.shapes.container(containers[name]) for name in call.positionals if name in containers]
        return self.out(show_json(found, pretty=True))

    def do_logs(self, call: Call) -> int:
        name = call.positionals[0]
        self.existing(self.store.read(), name)
        with contextlib.suppress(FileNotFoundError), open(self.store.path("containers", name, "log"), errors="replace") as file:
            lines = file.readlines()
            sys.stdout.write("".join(lines[max(0, len(lines) - call.get("n", len(lines))) :]))
        return 0

    # -- networks

    def do_network_create(self, call: Call) -> int:
        name = call.positionals[0]
        with self.store.change() as db:
            if name in db["networks"]:
                raise Failed(f"network {name} already exists", "exists")
            subnet = call.get("subnet") or free_subnet(db)
            for other in db["networks"].values():
                if overlap(subnet, other["subnet"]):
                    mine = f"{dotted(subnet[0])}/{subnet[1]}"
                    raise Failed(f"IPv4 subnet {mine} overlaps an existing network with subnet {cidr_text(other)}", "exists")
            db["networks"][name] = network_record(
                name,
                subnet,
                db["bridges"],
                mode="hostOnly" if call.get("internal") else "nat",
                chosen=bool(call.get("subnet")),
                labels=dict(call.get("label", [])),
                options=dict(call.get("option", [])),
            )
            db["bridges"] += 1
        return self.out(name)

    def do_network_list(self, call: Call) -> int:
        networks = list(self.store.read()["networks"].values())
        if self.level < (1,):
            rows = [["NETWORK", "STATE", "SUBNET"], *([n["name"], "running", cidr_text(n)] for n in networks)]
        else:
            rows = [["NETWORK", "SUBNET"], *([n["name"], cidr_text(n)] for n in networks)]
        return self.listing(call, [self.shapes.network(network) for network in networks], rows)

    def do_network_inspect(self, call: Call) -> int:
        networks = self.store.read()["networks"]
        missing = [name for name in call.positionals if name not in networks]
        if missing and self.level >= (1,):
            raise not_found(f"network not found: {', '.join(missing)}")
        found = [self.shapes.network(networks[name]) for name in call.positionals if name in networks]
        return self.out(show_json(found, pretty=True))

    def do_network_delete(self, call: Call) -> int:
        def delete(name: str) -> str:
            with self.store.change() as db:
                if name not in db["networks"]:
                    raise not_found(f"network {name} not found")
                if name == "default":
                    raise Failed("cannot delete a builtin network: default", "invalidArgument")
                users = [
                    record["id"]
                    for record in db["containers"].values()
                    if name in [net["network"] for net in record["configuration"]["networks"]]
                ]
                if users:
                    raise Failed(f"cannot delete subnet {name} with referring containers: {', '.join(users)}", "invalidState")
                del db["networks"][name]
            return name

        names = [name for name in self.store.read()["networks"] if name != "default"]
        return self.each(self.ids(call, names), "delete network", delete)


def tmpfs_options(item: Record) -> str:
    return ",".join(f"{key}={item[key]}" for key in ("size", "mode") if item.get(key))


def overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    shift = 32 - min(one[1], other[1])
    return one[0] >> shift == other[0] >> shift


def free_subnet(db: Record) -> tuple[int, int]:
    for third in range(65, 255):
        subnet = (192 << 24 | 168 << 16 | third << 8, 24)
        if not any(overlap(subnet, other["subnet"]) for other in db["networks"].values()):
            return subnet
    raise Failed("no free subnet")


def builder_record() -> Record:
    """The container of builds as the lists show it; it has no processes here."""
    call = Call(("run",), {"cpus": 2, "memory": 2048 * MIB}, [], [])
    process = {"argv": ["buildkitd"], "env": [], "cwd": "/", "user": "root", "rlimits": [], "capabilities": []}
    image = {"name": "ghcr.io/apple/container-builder-shim/builder:0.9.0", "digest": "sha256:" + "0" * 64}
    record: Record = {
        "id": CONTAINER_OF_BUILDS,
        "rm": False,
        "status": "running",
        "networks": [],
        "pid": None,
        "process": process,
        "mounts": [],
        "nets": [],
        "dns": None,
        "readOnly": False,
        "init": False,
        "stopSignal": None,
    }
    return {**record, "configuration": configuration_json(call, record, image, {"id": {"uid": 0, "gid": 0}})}


# -- the program -------------------------------------------------------------------------------------------------------


def raw_environment() -> dict[str, str]:
    """The environment as it was given, before this Python changed any of it."""
    with open("/proc/self/environ", "rb") as file:
        entries = file.read().decode("utf-8", "replace").split("\0")
    return dict(entry.partition("=")[::2] for entry in entries if entry)


def answer(cli: Cli, argv: list[str]) -> int:
    try:
        return cli.run(argv)
    except Usage as error:
        sys.stderr.write(f"Error: {error}\n{usage(error.words)}\n")
        return 64
    except Failed as error:
        sys.stderr.write(cli.error_text(error) + "\n")
        return 1
    except Exception as error:  # a fault of the stand-in itself must not look like one of the tool's answers
        sys.stderr.write("".join(traceback_of(error)))
        return FAULT


def traceback_of(error: Exception) -> list[str]:
    import traceback

    return ["stand-in: ", *traceback.format_exception(type(error), error, error.__traceback__)]


def main(argv: list[str], folder: str) -> NoReturn:
    """Carries out one command line with the state of a folder and ends the process."""
    store = Store(folder)
    name = f"{os.getpid()}.{time.time_ns()}"
    cli = Cli(store)
    store.note(call=name, argv=argv, env=raw_environment(), cwd=os.getcwd(), pid=os.getpid(), at=time.time())
    cli.finish = lambda code: store.note(call=name, exit=code, at=time.time(), warnings=cli.warnings)
    cli.faults = faults = Faults(store, argv)
    faults.before()
    if "exit" in faults.rule and "bytes" not in faults.rule and not faults.rule.get("act"):
        code = faults.answer()
    elif faults.rule.get("act"):
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
            answer(cli, argv)
        code = faults.answer()
    else:
        code = answer(cli, argv)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    cli.finish(code or 0)
    os._exit(code or 0)
