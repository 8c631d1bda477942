"""What the stand-in for `container` has in place of a virtual machine: namespaces of Linux.

A container is a process tree in mount, PID, network, UTS and IPC namespaces of its own, on a root folder that shows
the programs of this machine read-only and nothing else of it.  Two kinds of helper processes live outside of it, free
of whoever called the CLI, as the services of the real tool are:

- the *keeper*, one for each running container: starts its first process, waits for its end, clears up;
- the *relay*, one for each exec: starts the process inside and holds the ends of its pipes.

Both talk with the CLI over a socket, one JSON object a line: {"pid"} or {"error"}, later {"exit"}; the CLI may send
{"eof"} and {"kill"}.  Needs root, and folders on a file system whose owners can be mapped (see `rig.namespaces`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from typing import Any, Callable, NoReturn

CLONE = {"mnt": 0x20000, "uts": 0x4000000, "ipc": 0x8000000, "net": 0x40000000, "pid": 0x20000000}
CLONE_NEWUSER = 0x10000000
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 2, 4, 0x4000, 0x40000
AT_FDCWD, AT_RECURSIVE, AT_EMPTY_PATH = -100, 0x8000, 0x1000
OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC, MOVE_FROM_FD = 1, 0x80000, 4
ATTR_RDONLY, ATTR_IDMAP = 1, 0x100000
MNT_DETACH = 2
PR_CAPBSET_DROP = 24
NUMBERS = {"open_tree": 428, "move_mount": 429, "mount_setattr": 442}  # the same on every processor
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
SHOWN = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")  # of the host's / and, but for local, /usr
ETC = ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "ssl", "ca-certificates", "localtime", "services")
FOLDERS = ("dev", "proc", "sys", "run", "var/log", "usr/local/bin", "usr/local/lib", "opt", "srv", "home", "etc")
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CAPABILITIES = (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE "
    "NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN "
    "SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE "
    "MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
).split()
GRANTED = (
    "CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE SYS_CHROOT KILL AUDIT_WRITE"
).split()

GATEWAY_MAC = "02:63:74:00:00:01"  # its own: a bridge without one takes that of a port, and peers lose it with the port

LIBC = ctypes.CDLL(None, use_errno=True)


class JailError(Exception):
    """Something inside could not be set up or found; the text is for the CLI's stderr."""


def checked(name: str, *arguments: Any) -> int:
    """Calls a function of libc, or a system call that libc has no function for; raises OSError."""
    number = NUMBERS.get(name)
    result = LIBC.syscall(number, *arguments) if number else getattr(LIBC, name)(*arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return int(result)


def network_namespace() -> str:
    return os.readlink("/proc/self/ns/net")


def ip(*lines: str, strict: bool = True) -> str:
    """Runs lines of the `ip` program; returns what it printed."""
    program = shutil.which("ip", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if not program:
        raise JailError("the stand-in needs the program ip (Debian: iproute2)")
    command = [program, "-batch", "-"]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, env={}, check=False)
    if done.returncode and strict:
        raise JailError(f"ip: {done.stderr.strip()}")
    return done.stdout


# -- files -------------------------------------------------------------------------------------------------------------


def mount(kind: str, target: str, options: str = "", flags: int = MS_NOSUID | MS_NODEV) -> None:
    checked("mount", kind.encode(), target.encode(), kind.encode(), flags, options.encode() or None)


def bind(source: str, target: str, read_only: bool = False, idmap: int | None = None) -> None:
    """Shows a file or folder at another place; `idmap` is a user namespace that says whose its files are there."""
    clone = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE
    tree = checked("open_tree", AT_FDCWD, source.encode(), clone)
    try:
        flags = ATTR_RDONLY * read_only | ATTR_IDMAP * (idmap is not None)
        attributes = struct.pack("QQQQ", flags, 0, 0, idmap or 0)
        if flags:
            checked("mount_setattr", tree, b"", AT_EMPTY_PATH | AT_RECURSIVE, attributes, len(attributes))
        checked("move_mount", tree, b"", AT_FDCWD, target.encode(), MOVE_FROM_FD)
    finally:
        os.close(tree)


def mountpoint(source: str | None, target: str) -> str:
    """Makes what has to be there before something can be mounted on it."""
    if source is None or os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    elif not os.path.lexists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    return target


def ownership(uid: int, gid: int) -> int | None:
    """A user namespace for `bind`: files of the CLI's user belong to `uid` inside, as shared folders of a VM do."""
    if not uid:
        return None
    ready, started = os.pipe()
    child = os.fork()
    if child == 0:
        checked("unshare", CLONE_NEWUSER)
        os.write(started, b"x")
        signal.pause()
        os._exit(0)
    os.read(ready, 1)
    for name, own, other in (("uid", os.geteuid(), uid), ("gid", os.getegid(), gid)):
        with open(f"/proc/{child}/{name}_map", "w") as file:
            file.write(f"{own} {other} 1\n{other} {own} 1\n" if own != other else f"{own} {own} 1\n")
    found = os.open(f"/proc/{child}/ns/user", os.O_RDONLY)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(ready)
    os.close(started)
    return found


def probe(folder: str) -> None:
    """Raises OSError if files in a folder cannot be shown to a container as another user's."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        idmap = ownership(os.geteuid() + 1000, os.getegid() + 1000)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                checked("unshare", CLONE["mnt"] | CLONE["pid"] | CLONE["ipc"] | CLONE["uts"])
                checked("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
                bind(place, place, idmap=idmap)
                code = 0
            except OSError as error:
                code = error.errno or 1
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.close(idmap or -1)
    if code:
        raise OSError(code, f"mounts with mapped owners: {os.strerror(code)}")


def write(path: str, text: str, mode: int = 0o644) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(path, mode)


def furnish(root: str, plan: dict[str, Any]) -> None:
    """Lays out the root folder of a new container: what its image has, its users, empty folders for the rest."""
    os.makedirs(root)
    os.chmod(root, 0o755)
    for name in ("tmp", "var/tmp"):
        os.makedirs(f"{root}/{name}", exist_ok=True)
        os.chmod(f"{root}/{name}", 0o1777)
    for path in (*FOLDERS, *plan["folders"]):
        os.makedirs(f"{root}/{path}", exist_ok=True)
    users = plan["users"]
    lines = [f"{name}:x:{uid}:{gid}::{home}:{shell}" for name, (uid, gid, home, shell) in users.items()]
    write(f"{root}/etc/passwd", "\n".join(lines) + "\n")
    write(f"{root}/etc/group", "".join(f"{name}:x:{gid}:\n" for name, (_, gid, _, _) in users.items()))
    write(f"{root}/etc/hosts", f"127.0.0.1 localhost\n127.0.1.1 {plan['id']}\n")
    write(f"{root}/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n")
    for uid, gid, home, _ in users.values():
        if home != "/" and not os.path.isdir(root + home):
            os.makedirs(root + home, mode=0o755)
            os.chown(root + home, uid, gid)
    for path, target in plan["links"].items():
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        os.symlink(target, root + path)


def system_folders(root: str) -> Iterator[tuple[str, str]]:
    """Pairs of source and target that show the programs of this machine; links between them are made at once."""
    for name in SHOWN:
        if os.path.islink(f"/{name}"):
            with contextlib.suppress(FileExistsError):
                os.symlink(os.readlink(f"/{name}"), f"{root}/{name}")
        elif os.path.isdir(f"/{name}"):
            yield f"/{name}", f"{root}/{name}"
    for name in os.listdir("/usr"):
        if name not in ("local", "src", "games") and os.path.isdir(f"/usr/{name}"):
            yield f"/usr/{name}", f"{root}/usr/{name}"
    for name in ETC:
        if os.path.exists(f"/etc/{name}"):
            yield f"/etc/{name}", f"{root}/etc/{name}"
    for name in DEVICES:
        yield f"/dev/{name}", f"{root}/dev/{name}"


def build_root(plan: dict[str, Any], idmap: int | None) -> None:
    """Makes the mounts of a container in this mount namespace and takes its root folder as root."""
    root = plan["root"]
    checked("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    bind(root, root)
    for source, target in system_folders(root):
        bind(source, mountpoint(source, target), read_only=not target.startswith(f"{root}/dev/"))
    for target, source in plan["contents"].items():
        bind(source, mountpoint(source, root + target), read_only=True)
    mount("proc", f"{root}/proc")
    mount("tmpfs", mountpoint(None, f"{root}/dev/shm"), "mode=1777")
    for name, target in {"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"}.items():
        with contextlib.suppress(FileExistsError):
            os.symlink(f"/proc/self/fd{target}", f"{root}/dev/{name}")
    write(f"{root}/etc/hostname", plan["id"] + "\n")
    write(f"{root}/etc/resolv.conf", "".join(f"nameserver {server}\n" for server in plan["dns"]))
    # The host's folders can still be had through `old` until the old root, which now lies below this one, goes.
    old = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    os.chdir(root)
    checked("syscall", PIVOT_ROOT[os.uname().machine], b".", b".")
    for item in plan["mounts"]:
        apply_mount(item, old, idmap)
    os.close(old)
    checked("umount2", b".", MNT_DETACH)
    os.chdir("/")
    if plan["readOnly"]:
        read_only_root()


def read_only_root() -> None:
    attributes = struct.pack("QQQQ", ATTR_RDONLY, 0, 0, 0)
    root = os.open("/", os.O_RDONLY)
    checked("mount_setattr", root, b"", AT_EMPTY_PATH, attributes, len(attributes))
    os.close(root)


def apply_mount(item: dict[str, Any], old: int, idmap: int | None) -> None:
    """One mount of the user's; the target is looked up inside, where its links mean what they say there."""
    if item["kind"] == "tmpfs":
        mount("tmpfs", writable_mountpoint(None, item["target"]), item["options"])
        return
    source = f"/proc/self/fd/{old}{item['source']}"
    bind(source, writable_mountpoint(source, item["target"]), item["ro"], idmap)


def writable_mountpoint(source: str | None, target: str) -> str:
    try:
        return mountpoint(source, target)
    except OSError as error:
        raise JailError(f"cannot mount on {target}: {error.strerror}") from None


# -- processes ---------------------------------------------------------------------------------------------------------


def lookup(command: str, environment: list[str]) -> str:
    """The executable that a command names, by the first PATH of an environment."""
    path = next((entry[5:] for entry in environment if entry.startswith("PATH=")), DEFAULT_PATH)
    found = command if "/" in command else shutil.which(command, path=path)
    if not found or not os.path.exists(found):
        raise JailError(f"failed to find target executable {command}")
    return found


def execute(program: str, argv: list[str], environment: list[str]) -> NoReturn:
    """execve with an environment that may name a variable twice, which os.execve cannot give."""
    listed = [(ctypes.c_char_p * (len(words) + 1))(*map(os.fsencode, words), None) for words in (argv, environment)]
    LIBC.execve(os.fsencode(program), *listed)
    raise JailError(f"cannot run {program}: {os.strerror(ctypes.get_errno())}")


def drop_privileges(process: dict[str, Any]) -> None:
    """Takes the limits, capabilities and user of a process."""
    for name, soft, hard in process["rlimits"]:
        resource.setrlimit(getattr(resource, f"RLIMIT_{name.upper()}"), (soft, hard))
    for number, name in enumerate(CAPABILITIES):
        if name not in process["capabilities"]:
            LIBC.prctl(PR_CAPBSET_DROP, number, 0, 0, 0)
    os.setgroups([])
    os.setgid(process["gid"])
    os.setuid(process["uid"])


def become(process: dict[str, Any], stdio: Iterable[int], report: int) -> NoReturn:
    """Turns this forked process into one of the container; what goes wrong is written to `report`."""
    try:
        for number in range(1, 32):
            if number not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.setsid()
        for target, source in enumerate(stdio):
            os.dup2(source, target)
        os.umask(0o022)
        os.makedirs(process["cwd"], exist_ok=True)
        os.chdir(process["cwd"])
        drop_privileges(process)
        execute(lookup(process["argv"][0], process["env"]), process["argv"], process["env"])
    except (OSError, JailError, ValueError) as error:
        os.write(report, str(error).encode())
    os._exit(127)


def exit_code(status: int) -> int:
    """The code of a wait status, 128 + n for a signal."""
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


class Child:
    """A process in another PID namespace than its starter's.

    Between the two is a process whose only work is to have that namespace for its children: a thread cannot be
    started any more by who has changed it, nor can it be changed back by everybody.
    """

    def __init__(self, change: Callable[[], object], child: Callable[[], NoReturn]) -> None:
        self.news, news = os.pipe()
        self.between = os.fork()
        if self.between == 0:
            try:
                change()
                pid = os.fork()
                if pid == 0:
                    child()
                keep_only(news)
                os.write(news, struct.pack("i", pid))
                os.write(news, struct.pack("i", os.waitpid(pid, 0)[1]))
            finally:
                os._exit(1)
        os.close(news)
        self.pid = self.number()

    def number(self) -> int:
        data = os.read(self.news, 4)
        if not data:
            raise JailError("the process between was killed")
        return int(struct.unpack("i", data)[0])

    def wait(self) -> int:
        """The exit code, once the process has ended."""
        code = exit_code(self.number())
        os.waitpid(self.between, 0)
        os.close(self.news)
        return code


def be_init(process: dict[str, Any], stdio: tuple[int, ...], report: int) -> NoReturn:
    """The tiny init of `--init`: forwards every signal to the one process and reaps what it left behind."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    child = os.fork()
    if child == 0:
        become(process, stdio, report)
    keep_only()
    while True:
        number = signal.sigwait(signal.valid_signals())
        if number != signal.SIGCHLD:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
            continue
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                if pid == child:
                    os._exit(exit_code(status))


def keep_only(*kept: int, errors: str | None = None) -> None:
    """Closes every descriptor but these; standard ones become /dev/null, stderr a file."""
    null = os.open(os.devnull, os.O_RDWR)
    log = os.open(errors, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600) if errors else null
    for target, source in enumerate((null, null, log)):
        os.dup2(source, target, inheritable=True)
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2 and number not in kept:
            with contextlib.suppress(OSError):
                os.close(number)


def tell(control: socket.socket, **fields: Any) -> None:
    """A line to the CLI, which may be gone."""
    with contextlib.suppress(OSError):
        control.sendall(json.dumps(fields).encode() + b"\n")


def daemon(work: Callable[[], None]) -> None:
    """Runs something in a process that the caller's death and signals do not reach."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    code = 1
    try:
        os.setsid()
        if os.fork() == 0:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            work()
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def processes(init: int) -> list[int]:
    """The processes of a container, by the PID namespace of its first one."""
    try:
        wanted = os.readlink(f"/proc/{init}/ns/pid")
    except OSError:
        return []
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{name}/ns/pid") == wanted:
                    found.append(int(name))
    return found


# -- the keeper of a container -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def network_lock(folder: str) -> Iterator[None]:
    with open(os.path.join(folder, "network.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def connect(plan: dict[str, Any], init: int) -> None:
    """Joins a container to its networks; the bridge, which has the gateway's address, exists only while it is used."""
    for number, net in enumerate(plan["nets"]):
        bridge, cable = net["bridge"], f"cv{init}n{number}"
        with network_lock(plan["state"]):
            if f" {bridge}:" not in ip("link show type bridge"):
                if f"inet {net['gateway']}/" in ip("addr show type bridge"):
                    raise JailError(f"another stand-in has {net['gateway']}: give their networks different subnets")
                ip(
                    f"link add {bridge} address {GATEWAY_MAC} type bridge",
                    f"addr add {net['gateway']}/{net['prefix']} dev {bridge}",
                    f"link set {bridge} up",
                )
            ip(
                f"link add {cable} type veth peer name eth{number} netns {init}",
                f"link set {cable} master {bridge}",
                f"link set {cable} up",
            )


def configure(plan: dict[str, Any]) -> None:
    """The inner side of `connect`."""
    lines = ["link set lo up"]
    for number, net in enumerate(plan["nets"]):
        device = f"eth{number}"
        mac, mtu = net.get("mac"), net.get("mtu")
        lines += [f"link set {device} address {mac}"] if mac else []
        lines += [f"link set {device} mtu {mtu}"] if mtu else []
        lines += [f"addr add {net['address']}/{net['prefix']} dev {device}", f"link set {device} up"]
        if number == 0 and not net["internal"]:
            lines.append(f"route add default via {net['gateway']}")
    ip(*lines)


def disconnect(plan: dict[str, Any], init: int) -> None:
    for number, net in enumerate(plan["nets"]):
        with network_lock(plan["state"]):
            ip(f"link delete cv{init}n{number}", strict=False)  # gone already if its namespace was faster
            if not ip(f"link show master {net['bridge']}", strict=False).strip():
                ip(f"link delete {net['bridge']}", strict=False)


def first_process(plan: dict[str, Any], stdio: tuple[int, ...], idmap: int | None, report: int, go: int) -> NoReturn:
    """PID 1 of a container: makes its surroundings once the keeper has plugged in the network."""
    try:
        checked("unshare", CLONE["mnt"] | CLONE["uts"] | CLONE["ipc"] | CLONE["net"])
        os.write(report, b"+")
        if os.read(go, 1):
            configure(plan)
            socket.sethostname(plan["id"])
            build_root(plan, idmap)
            (be_init if plan["init"] else become)(plan["process"], stdio, report)
    except (OSError, JailError) as error:
        os.write(report, str(error).encode())
    except BaseException as error:
        os.write(report, f"stand-in: {error!r}".encode())
    os._exit(127)


def drain(descriptor: int) -> bytes:
    """Everything up to the end."""
    parts: list[bytes] = []
    while True:
        data = os.read(descriptor, 65536)
        if not data:
            return b"".join(parts)
        parts.append(data)


def copy(source: int, *targets: int) -> None:
    """Passes a stream on until it ends; a target that is gone is left out."""
    left = list(targets)
    while True:
        data = os.read(source, 65536)
        if not data:
            break
        for target in list(left):
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(target, rest) :]
            except OSError:
                left.remove(target)
    for target in targets:
        with contextlib.suppress(OSError):
            os.close(target)


def first_stdio(log: int, attached: tuple[int | None, int, int] | None) -> tuple[tuple[int, ...], list[Any]]:
    """Descriptors for the first process, and the copying that has to be done between them and the CLI."""
    null = os.open(os.devnull, os.O_RDONLY)
    if attached is None:
        return (null, log, log), []
    outgoing, errors = os.pipe(), os.pipe()
    pairs = [(outgoing[0], os.dup(log), attached[1]), (errors[0], os.dup(log), attached[2])]
    return (attached[0] if attached[0] is not None else null, outgoing[1], errors[1]), pairs


def begin(plan: dict[str, Any], stdio: tuple[int, ...]) -> tuple[Child, str]:
    """Starts the first process; why it failed, if it did."""
    report, reported = os.pipe()
    go, going = os.pipe()
    process = plan["process"]
    idmap = ownership(process["uid"], process["gid"])

    def inside() -> NoReturn:
        os.close(going)
        first_process(plan, stdio, idmap, reported, go)

    init = Child(lambda: checked("unshare", CLONE["pid"]), inside)
    os.close(reported)
    problem = ""
    if os.read(report, 1) == b"+":
        try:
            connect(plan, init.pid)
            os.write(going, b"+")
        except (JailError, OSError) as error:
            problem = str(error)
    os.close(going)
    problem = drain(report).decode("utf-8", "replace") or problem
    return init, problem


def end_with(owner: int, init: int) -> None:
    """Ends a container when the tests that it is for were killed."""
    wait_gone(owner, None)
    with contextlib.suppress(ProcessLookupError):
        os.kill(init, signal.SIGKILL)


def keep(
    plan: dict[str, Any], control: socket.socket, attached: tuple[int | None, int, int] | None, changed: Callable[..., None]
) -> None:
    """The life of a running container; `changed(pid=…)` and `changed(exit=…)` record it."""
    keep_only(control.fileno(), *[fd for fd in attached or () if fd is not None], errors=plan["keeperLog"])
    log = os.open(plan["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    stdio, pairs = first_stdio(log, attached)
    init, problem = begin(plan, stdio)
    for descriptor in {*stdio, *([attached[0]] if attached and attached[0] is not None else [])}:
        os.close(descriptor)
    if not problem:
        changed(pid=init.pid)
        tell(control, pid=init.pid)
    threading.Thread(target=end_with, args=(plan["owner"], init.pid), daemon=True).start()
    threads = [threading.Thread(target=copy, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    code = init.wait()
    for thread in threads:
        thread.join()
    disconnect(plan, init.pid)
    changed(exit=code, failed=bool(problem))
    tell(control, **({"error": problem} if problem else {"exit": code}))


def start(
    plan: dict[str, Any], changed: Callable[..., None], attached: tuple[int | None, int, int] | None = None
) -> socket.socket:
    """Starts a container and returns the CLI's end of the socket to its keeper."""
    ours, theirs = socket.socketpair()
    daemon(lambda: keep(plan, theirs, attached, changed))
    theirs.close()
    for descriptor in attached or ():
        if descriptor is not None:
            os.close(descriptor)
    return ours


# -- the relay of an exec ----------------------------------------------------------------------------------------------


def enter(init: int, process: dict[str, Any], stdio: tuple[int, ...], report: int) -> NoReturn:
    """Goes into the namespaces of a container, of which the PID namespace was taken before the fork."""
    try:
        descriptors = {name: os.open(f"/proc/{init}/ns/{name}", os.O_RDONLY) for name in CLONE if name != "pid"}
        for name, descriptor in descriptors.items():
            checked("setns", descriptor, CLONE[name])
        become(process, stdio, report)
    except OSError as error:
        os.write(report, str(error).encode())
    os._exit(127)


class Relay:
    """Starts one process in a container and stays with it, whatever becomes of the CLI."""

    def __init__(self, init: int, process: dict[str, Any], control: socket.socket, held: dict[str, Any]) -> None:
        self.init, self.process, self.control, self.held = init, process, control, held
        self.pid = 0

    def run(self, stdio: tuple[int, ...], ends: list[int]) -> None:
        """`stdio` are the process's ends of its pipes, `ends` the other ones: stdin (if any), stdout, stderr."""
        keep_only(self.control.fileno(), *stdio, *ends, errors=self.held["log"])
        report, reported = os.pipe()
        space = os.open(f"/proc/{self.init}/ns/pid", os.O_RDONLY)
        child = Child(lambda: checked("setns", space, CLONE["pid"]), lambda: enter(self.init, self.process, stdio, reported))
        self.pid = child.pid
        os.close(reported)
        for descriptor in stdio:
            os.close(descriptor)
        problem = drain(report).decode("utf-8", "replace")
        if problem:
            child.wait()
            tell(self.control, error=problem)
            return
        record = os.path.join(self.held["folder"], f"{self.pid}.json")
        write(record + ".new", json.dumps({"pid": self.pid, "argv": self.process["argv"]}))
        os.replace(record + ".new", record)
        tell(self.control, pid=self.pid)
        watcher = threading.Thread(target=self.obey, args=(ends,), daemon=True)
        watcher.start()
        code = child.wait()
        with contextlib.suppress(OSError):
            os.unlink(record)
        tell(self.control, exit=code)

    def obey(self, ends: list[int]) -> None:
        """Does what the CLI says; when it is gone, the process goes on, with its output thrown away.

        Nobody promises that its stdin ends then: `hold` keeps it open, which is the worse case for the caller.
        """
        stdin = ends[:-2]
        for line in self.control.makefile("rb"):
            order = json.loads(line)
            if "kill" in order:
                os.kill(self.pid, order["kill"])
            if "eof" in order:
                close_all(stdin)
        if not self.held["hold"]:
            close_all(stdin)
        for descriptor in ends[-2:]:
            threading.Thread(target=copy, args=(descriptor,), daemon=True).start()


def close_all(descriptors: list[int]) -> None:
    while descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptors.pop())


def exec_in(
    init: int, process: dict[str, Any], interactive: bool, held: dict[str, Any]
) -> tuple[socket.socket, int | None, int, int]:
    """Starts a process in a container; returns the socket to its relay and the CLI's ends of its three pipes."""
    ours, theirs = socket.socketpair()
    incoming = os.pipe() if interactive else (os.open(os.devnull, os.O_RDONLY), None)
    outgoing, errors = os.pipe(), os.pipe()
    stdio = (incoming[0], outgoing[1], errors[1])
    ends = [fd for fd in (incoming[1], outgoing[0], errors[0]) if fd is not None]
    daemon(lambda: Relay(init, process, theirs, held).run(stdio, ends))
    theirs.close()
    for descriptor in stdio:
        os.close(descriptor)
    return ours, incoming[1], outgoing[0], errors[0]


def wait_gone(pid: int, timeout: float | None) -> bool:
    """Waits until a process has ended, at most `timeout` seconds; tells whether it has."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError as error:
        return error.errno == errno.ESRCH
    try:
        return bool(select.select([descriptor], [], [], timeout)[0])
    finally:
        os.close(descriptor)
