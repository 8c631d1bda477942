"""The command line of `container` as tables: which options each command has, since when, and what values they take.

`parse(argv, version, macos)` returns a `Call` or raises `Usage`, which the CLI answers with exit 64.  It is as strict
as Swift's ArgumentParser where that is strict, and stricter where the tool would quietly do something else.  Commands
and options that are nothing for a server with untrusted code inside (--ssh, --publish, volumes, terminals, kernels and
so on) are left out, so that their use is an error.
"""

from __future__ import annotations

import re
from typing import Any, Callable, NamedTuple

MIB = 1 << 20
UNITS = {"": 1, "K": 1 << 10, "M": MIB, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
ULIMITS = "as core cpu data fsize locks memlock msgqueue nice nofile nproc rss rtprio rttime sigpending stack".split()
SIGNALS = "HUP INT QUIT ABRT KILL USR1 USR2 TERM CONT STOP WINCH".split()


class Usage(Exception):
    """The command line is not one of the tool's: exit 64; `words` are those of the command it belongs to."""

    words: tuple[str, ...] = ()


class Option(NamedTuple):
    names: tuple[str, ...]
    kind: str  # a name in KINDS, or "flag"
    many: bool
    since: tuple[int, ...]

    @property
    def key(self) -> str:
        """The longest first name without dashes, by which the value is found."""
        return next((name for name in self.names if name.startswith("--")), self.names[0]).lstrip("-")


class Command(NamedTuple):
    positionals: str
    options: dict[str, Option]
    passes_on: bool  # everything after the first positional belongs to the process


class Call(NamedTuple):
    words: tuple[str, ...]
    options: dict[str, Any]  # flags True, others checked values, repeatable ones lists
    positionals: list[str]
    process: list[str]

    def get(self, key: str, default: Any = None) -> Any:
        return self.options.get(key, default)


# -- values ------------------------------------------------------------------------------------------------------------


def need(good: object, why: str = "") -> None:
    if not good:
        raise ValueError(why)


def pattern(expression: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        need(re.fullmatch(expression, text, re.ASCII))
        return text

    return check


def choice(words: str) -> Callable[[str], str]:
    return pattern("|".join(words.split()))


def integer(text: str) -> int:
    need(re.fullmatch(r"\d{1,18}", text, re.ASCII))
    return int(text)


def cpus(text: str) -> int:
    need(integer(text) >= 1)
    return int(text)


def memory(text: str) -> int:
    found = re.fullmatch(r"(\d{1,12})([KMGTP]?)", text.upper(), re.ASCII)
    need(found)
    size = int(found[1]) * UNITS[found[2]]  # type: ignore[index]
    need(size % MIB == 0 and size >= 200 * MIB, "memory must be whole MiB and at least 200 MiB")
    return size


def absolute(text: str) -> str:
    need(text.startswith("/"))
    return text


def environment(text: str) -> tuple[str, str | None]:
    name, equals, value = text.partition("=")
    need(name and "\0" not in text)
    return name, value if equals else None


def label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    need(key and equals)
    return key, value


def docker_label(text: str) -> tuple[str, str]:
    key, value = label(text)
    need(re.fullmatch(r"[a-z0-9]([a-z0-9./-]*[a-z0-9])?", key))
    return key, value


def volume(text: str) -> dict[str, Any]:
    parts = text.split(":")
    need(2 <= len(parts) <= 3 and all(parts))
    options = parts[2].split(",") if len(parts) == 3 else []
    need(all(option == "ro" for option in options))
    need("/" in parts[0] or parts[0] in (".", ".."), "volumes with a name are not made here")
    return {"kind": "bind", "source": parts[0], "target": absolute(parts[1]), "ro": bool(options)}


MOUNT_KEYS = {"src": "source", "dst": "target", "destination": "target", "readonly": "ro", "ro": "ro"}


def mount(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {"ro": False, "source": None}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        key = MOUNT_KEYS.get(key, key)
        need(key in ("type", "source", "target", "ro", "size", "mode") and bool(equals) == (key != "ro"))
        found[key] = value if equals else True
    kind = found.pop("type", None)
    need(kind in ("bind", "virtiofs", "tmpfs") and found.get("target"))
    need(kind == "tmpfs" or not {"size", "mode"} & set(found))
    need((kind == "tmpfs") == (found["source"] is None))
    absolute(found["target"])
    return {**found, "kind": "bind" if kind == "virtiofs" else kind, "mount": True}


def ulimit(text: str) -> tuple[str, int, int]:
    found = re.fullmatch(r"([a-z]+)=(\d+|unlimited)(?::(\d+|unlimited))?", text, re.ASCII)
    need(found and found[1] in ULIMITS)
    soft, hard = ((-1 if text == "unlimited" else int(text)) for text in (found[2], found[3] or found[2]))  # type: ignore[index]
    need(hard == -1 or (soft != -1 and soft <= hard))
    return found[1], soft, hard  # type: ignore[index]


def network(text: str) -> dict[str, Any]:
    name, *rest = text.split(",")
    found: dict[str, Any] = {"name": name}
    need(name)
    for part in rest:
        key, _, value = part.partition("=")
        need(key in ("mac", "mtu") and key not in found)
        if key == "mtu":
            need(1280 <= integer(value) <= 65535)
        else:
            need(re.fullmatch(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", value))
        found[key] = value
    return found


def cidr(text: str) -> tuple[int, int]:
    """The network as (address, prefix length); host bits are ignored, as the tool does."""
    found = re.fullmatch(r"(\d{1,3})\.(\d{1,3})\.(\d{1,3})\.(\d{1,3})/(\d{1,2})", text, re.ASCII)
    need(found)
    *parts, prefix = map(int, found.groups())  # type: ignore[union-attr]
    need(max(parts) < 256 and 1 <= prefix <= 30)
    address = int.from_bytes(bytes(parts), "big")
    return address >> (32 - prefix) << (32 - prefix), prefix


def signal_name(text: str) -> str:
    if text.isdigit():
        need(1 <= int(text) <= 64)
        return text
    name = text.upper()
    name = name[3:] if name.startswith("SIG") else name
    need(name in SIGNALS)
    return name


def capability(text: str) -> str:
    from tests.container.jail import CAPABILITIES

    name = text.upper()
    name = name[4:] if name.startswith("CAP_") else name
    need(name == "ALL" or name in CAPABILITIES)
    return name


CONTAINER_NAME = r"[a-zA-Z0-9][a-zA-Z0-9_.-]{1,62}"
NETWORK_NAME = r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?"
REFERENCE = r"(?:[a-z0-9.-]+(?::\d+)?/)?[a-z0-9._/-]+(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?"
KINDS: dict[str, Callable[[str], Any]] = {
    "int": integer,
    "cpus": cpus,
    "memory": memory,
    "path": absolute,
    "word": pattern(r"\S+"),
    "tmpfs": pattern(r"/[^:]*"),
    "file": pattern(r"(?s).+"),
    "env": environment,
    "label": label,
    "docker-label": docker_label,
    "volume": volume,
    "mount": mount,
    "user": pattern(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(:[A-Za-z0-9_][A-Za-z0-9_.-]*)?"),
    "ulimit": ulimit,
    "network": network,
    "cidr": cidr,
    "signal": signal_name,
    "capability": capability,
    "name": pattern(CONTAINER_NAME),
    "reference": pattern(REFERENCE),
    "platform": pattern(r"linux/(arm64|amd64)(/v8)?"),
    "arch": choice("arm64 amd64 aarch64 x86_64"),
    "os": choice("linux"),
    "ip": pattern(r"(\d{1,3}\.){3}\d{1,3}|[0-9a-fA-F:]*:[0-9a-fA-F:]*"),
    "progress": choice("auto none ansi plain color"),
    "build-progress": choice("auto plain tty"),
    "format": choice("json table yaml toml"),
    "key-value": label,
}

# -- options: names, kind, * if repeatable, >= the first release that has it -------------------------------------------

PROCESS = """
-e,--env env *
--env-file file *
--gid int
-i,--interactive flag
-u,--user user
--uid int
-w,--workdir,--cwd path
--ulimit ulimit *
"""
CREATE = """
-c,--cpus cpus
-m,--memory memory
-a,--arch arch
--cap-add capability * >=0.12
--cap-drop capability * >=0.12
-d,--detach flag
--dns ip *
--entrypoint word
--init flag >=0.10
-l,--label label *
--mount mount *
--name name
--network network *
--no-dns flag
--os os
--platform platform
--progress progress
--read-only flag
--rm,--remove flag
--tmpfs tmpfs *
-v,--volume volume *
"""
FORMAT = "--format format"
QUIET = "-q,--quiet flag"
ALL = "-a,--all flag"
BUILD = """
-t,--tag reference *
-f,--file file
--build-arg key-value *
--no-cache flag
--pull flag
--platform platform *
-a,--arch arch *
--os os *
-q,--quiet flag
-c,--cpus cpus
-m,--memory memory
--dns ip *
--progress build-progress
"""
COMMANDS_TEXT: dict[str, tuple[str, str]] = {
    "run": (PROCESS + CREATE, "<image> -- <arguments>"),
    "create": (PROCESS + CREATE, "<image> -- <arguments>"),
    "exec": (PROCESS + "-d,--detach flag", "<container-id> -- <arguments>"),
    "start": ("", "<container-id>"),
    "stop": ("-s,--signal signal\n-t,--time int\n" + ALL, "<container-ids>*"),
    "kill": ("-s,--signal signal\n" + ALL, "<container-ids>*"),
    "delete": ("-f,--force flag\n" + ALL, "<container-ids>*"),
    "list": (f"{ALL}\n{QUIET}\n{FORMAT}", ""),
    "inspect": ("", "<container-ids>+"),
    "logs": ("-n int", "<container-id>"),
    "build": (BUILD, "<context-dir>?"),
    "image list": (f"{QUIET}\n-v,--verbose flag\n{FORMAT}", ""),
    "image inspect": ("", "<images>+"),
    "image delete": (f"{ALL}\n-f,--force flag", "<images>*"),
    "network create": (
        "--internal flag\n--subnet cidr\n--label docker-label *\n--option key-value * >=1.0\n--plugin word >=0.10",
        "<name>",
    ),
    "network list": (f"{QUIET}\n{FORMAT}", ""),
    "network inspect": ("", "<networks>+"),
    "network delete": (ALL, "<networks>*"),
    "system start": ("--enable-kernel-install flag\n--disable-kernel-install flag\n--timeout int >=0.10", ""),
    "system status": ("-p,--prefix word\n--format format >=0.10", ""),
    "system stop": ("-p,--prefix word", ""),
    "system version": (FORMAT, ""),
}
ALIASES = {"i": "image", "n": "network", "s": "system"}
VERBS = {"rm": "delete", "ls": "list"}
GROUPS = {key.split()[0] for key in COMMANDS_TEXT if " " in key}


def version_tuple(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def option_of(line: str) -> Option:
    names, kind, *rest = line.split()
    since = next((version_tuple(word[2:]) for word in rest if word.startswith(">=")), ())
    return Option(tuple(names.split(",")), kind, "*" in rest, since)


def command_of(key: str, version: tuple[int, ...]) -> Command:
    lines, positionals = COMMANDS_TEXT[key]
    listed = [option_of(line) for line in f"{lines}\n--debug flag\n-h,--help flag".split("\n") if line]
    names = {name: option for option in listed if option.since <= version for name in option.names}
    first, passes_on, _ = positionals.partition(" -- ")
    return Command(first, names, bool(passes_on))


# -- parsing -----------------------------------------------------------------------------------------------------------


def find_command(argv: list[str], macos: int) -> tuple[tuple[str, ...], list[str]]:
    """The words of the command, with aliases replaced, and what follows them."""
    words = [word for word in argv[:2] if not word.startswith("-")] if argv else []
    if not words or argv[0].startswith("-"):
        raise Usage(f"Unknown option '{argv[0]}'" if argv else "Missing expected argument '<subcommand>'")
    group = ALIASES.get(argv[0], argv[0])
    if group in GROUPS and not (group == "network" and macos < 26):
        if len(words) < 2:
            raise Usage("Missing expected subcommand")
        key = f"{group} {VERBS.get(words[1], words[1])}"
        if key not in COMMANDS_TEXT:
            raise Usage(f"Unexpected argument '{words[1]}'")
        return tuple(key.split()), argv[2:]
    key = VERBS.get(argv[0], argv[0])
    if key not in COMMANDS_TEXT:
        raise Usage(f"Plugin 'container-{argv[0]}' not found.")
    return (key,), argv[1:]


class Parser:
    """Goes through the words after the command."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.options: dict[str, Any] = {}
        self.positionals: list[str] = []

    def run(self, rest: list[str]) -> list[str]:
        """Returns what belongs to the process."""
        words, only_positionals = list(rest), False
        while words:
            word = words.pop(0)
            if word == "--" and not only_positionals:
                only_positionals = True
            elif only_positionals or not word.startswith("-") or word == "-":
                self.positionals.append(word)
                if self.command.passes_on:
                    return words
            elif word.startswith("--"):
                self.long(word, words)
            else:
                self.short(word, words)
        return []

    def find(self, name: str, word: str) -> Option:
        option = self.command.options.get(name)
        if option is None:
            raise Usage(f"Unknown option '{word}'")
        return option

    def long(self, word: str, words: list[str]) -> None:
        name, equals, value = word.partition("=")
        option = self.find(name, name)
        if option.kind == "flag":
            if equals:
                raise Usage(f"The option '{name}' does not take any value, but '{value}' was specified.")
            self.options[option.key] = True
        else:
            self.value(option, name, value if equals else self.following(option, name, words))

    def short(self, word: str, words: list[str]) -> None:
        letters = [f"-{letter}" for letter in word[1:]]
        options = [self.find(letter, word) for letter in letters]
        if len(options) > 1 and any(option.kind != "flag" for option in options):
            raise Usage(f"Unknown option '{word}'")
        for letter, option in zip(letters, options):
            if option.kind == "flag":
                self.options[option.key] = True
            else:
                self.value(option, letter, self.following(option, letter, words))

    def following(self, option: Option, name: str, words: list[str]) -> str:
        if not words or (words[0].startswith("-") and words[0] != "-"):
            raise Usage(f"Missing value for '{name} <{option.key}>'")
        return words.pop(0)

    def value(self, option: Option, name: str, text: str) -> None:
        try:
            value = KINDS[option.kind](text)
        except ValueError as error:
            why = f": {error}" if str(error) else ""
            raise Usage(f"The value '{text}' is invalid for '{name} <{option.key}>'{why}") from None
        if option.many:
            self.options.setdefault(option.key, []).append(value)
        else:
            self.options[option.key] = value


def check_count(positionals: str, given: list[str]) -> None:
    """`<a> <b>` wants two, `<a>?` at most one, `<a>*` any number, `<a>+` at least one."""
    names = positionals.split()
    last = names[-1][-1] if names else ""
    least = len(names) - (last in "?*") if names else 0
    if len(given) < least:
        raise Usage(f"Missing expected argument '{names[len(given)].rstrip('+')}'")
    if not (names and last in "*+") and len(given) > len(names):
        extra = ", ".join(f"'{word}'" for word in given[len(names) :])
        several = len(given) - len(names) > 1
        raise Usage(f"{len(given) - len(names)} unexpected arguments: {extra}" if several else f"Unexpected argument {extra}")


def conflicts(key: str, call: Call) -> None:
    """Combinations that the tool refuses before it does anything."""
    networks = [net["name"] for net in call.get("network", [])]
    if "none" in networks and len(networks) > 1:
        raise Usage("no other networks may be created along with network none")
    if call.get("no-dns") and call.get("dns"):
        raise Usage("`--no-dns` cannot be used with other DNS configuration flags")
    if call.get("enable-kernel-install") and call.get("disable-kernel-install"):
        raise Usage("--enable-kernel-install and --disable-kernel-install exclude each other")
    if key == "exec" and not call.process:
        raise Usage("Missing expected argument '<arguments>'")
    if key == "network create" and not re.fullmatch(NETWORK_NAME, call.positionals[0]):
        raise Usage(f"invalid name '{call.positionals[0]}'")


def parse(argv: list[str], version: str, macos: int = 26) -> Call:
    """Reads a whole command line (without the program's name); raises `Usage`."""
    argv = argv[1:] if argv[:1] == ["--debug"] else argv
    words, rest = find_command(argv, macos)
    command = command_of(" ".join(words), version_tuple(version))
    try:
        parser = Parser(command)
        process = parser.run(rest)
        options = parser.options
        if version_tuple(version) < (1,) and options.get("format") in ("yaml", "toml"):
            raise Usage(f"The value '{options['format']}' is invalid for '--format <format>'")
        call = Call(words, options, parser.positionals, process)
        if not options.get("help"):
            check_count(command.positionals, parser.positionals)
            conflicts(" ".join(words), call)
        return call
    except Usage as error:
        error.words = words
        raise


def usage(words: tuple[str, ...]) -> str:
    """The line that follows an error of usage."""
    name = " ".join(("container", *words))
    positionals = COMMANDS_TEXT[" ".join(words)][1] if words else "<subcommand>"
    shown = positionals.replace(" -- <arguments>", " [<arguments> ...]").replace("*", " ...").replace("+", " ...")
    return f"Usage: {name} [<options>] {shown}".rstrip() + f"\n  See '{name} --help' for more information."
