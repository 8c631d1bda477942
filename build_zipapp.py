#!/usr/bin/env python3
"""Builds `oppi.pyz`: oppi.py, the three packages it needs and their native code in one file that Python runs.

    python3 build_zipapp.py [-o oppi.pyz] [--platform linux-x86_64]...
    python3 build_zipapp.py --update

The archive is meant to be checked by people who do not trust whoever built it:

- Every wheel is pinned below by name, version and sha256; a file with another hash is never opened.
- Files are packed as they are in the wheels, under a folder named after the wheel, beside the identical oppi.py.
- `manifest.json` inside lists the wheels and the sha256 of every file; the build id is a hash over all of them.
- The same inputs give the same bytes, whatever the umask, time zone, locale, hash seed or folder.
  (Deflate differs between zlib releases: compare builds made with one Python, or compare build ids.)

The first half of this file is the archive's `__main__.py` and `oppi_unpack.py`: its source is copied there, so it is
plain Python that also parses on 2.7, where it says what is missing.  The second half is the builder.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import inspect
import io
import json
import os
import re
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

# ======================================================================================================================
#  The bootstrap: what happens before oppi.py runs
#
#  Python cannot load native code from inside an archive, and compiles zipped source anew at every start.  So the
#  parts that fit this interpreter are unpacked once into a private folder and imported from there.
#  Rules: a folder appears whole or not at all; nothing in it is ever overwritten; none is removed while a process
#  holds it by a lock; native code is hashed in each process that loads it; whatever goes wrong is said on one line,
#  and the exit status is 1.
#  Python compiles `__main__.py` at every start, so that what only a first start needs is in `oppi_unpack.py`.
#  Annotations stand in comments, because Python 2.7 has to read this.
# ======================================================================================================================


def choose_target(targets, supported):
    # type: (dict[str, str], str) -> list[str]
    """Returns the words on what fits this interpreter, known by the suffix of its extension modules and the machine."""
    version = ".".join([str(number) for number in sys.version_info[:3]])
    if sys.version_info < (3, 9, 2):
        sys.exit("oppi needs Python 3.9.2 or newer; this is Python %s (%s)" % (version, sys.executable))
    import _imp

    machine = os.uname().machine if hasattr(os, "uname") else "unknown machine"
    for suffix in _imp.extension_suffixes():
        if suffix + " " + machine in targets:
            return targets[suffix + " " + machine].split()
    this = "%s %s on %s %s" % (sys.implementation.cache_tag, version, sys.platform, machine)
    sys.exit("oppi: this archive does not run with %s; it runs with %s" % (this, supported))


def cache_root():
    # type: () -> str
    """Returns the folder that holds unpacked archives; a relative XDG_CACHE_HOME is ignored, as its spec demands."""
    chosen = os.environ.get("OPPI_CACHE_DIR")
    if chosen:
        return os.path.realpath(chosen)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/Library/Caches" if sys.platform == "darwin" else "~/.cache")
    return os.path.realpath(os.path.join(base, "oppi"))


def require_private(folder, forbidden):
    # type: (str, int) -> None
    """Refuses a folder that somebody else owns or (by the mode bits `forbidden`) could fill: code comes from it."""
    info = os.lstat(folder)
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & forbidden:
        advice = "run chmod 700 on it, delete it, or set OPPI_CACHE_DIR to another folder"
        sys.exit("oppi: %s is open to other users of this machine; %s" % (folder, advice))


class Natives:
    """Finds the native modules, and hashes them before the first is loaded: unlike source, nobody can read what they do.

    Their folder is not on sys.path, so that no import can get around this.
    """

    def __init__(self, folder, files, hashes):
        # type: (str, list[str], list[str]) -> None
        self.folder = folder
        self.unchecked = list(zip(files, hashes))
        self.files = {file.split(".")[0].replace("/", "."): file for file in files}

    def find_spec(self, name, path=None, target=None):
        # type: (str, object, object) -> object
        """Answers Python's search for a module (PEP 451); ends the process if a native file is not as it was built."""
        if name not in self.files:
            return None
        import importlib.util

        for file, expected in self.unchecked:
            if file_sha256(os.path.join(self.folder, "native", file)) != expected:
                where = os.path.join(self.folder, "native", file)
                advice = "delete the folder %s and start again" % self.folder
                sys.stderr.write("oppi: %s is missing or was changed; %s\n" % (where, advice))
                sys.exit(1)  # a number: commands take an exit with a text for their own
        self.unchecked = []
        return importlib.util.spec_from_file_location(name, os.path.join(self.folder, "native", self.files[name]))


def file_sha256(path):
    # type: (str) -> str
    """Returns the hex digest of a file; empty if it cannot be read."""
    import hashlib

    digest = hashlib.sha256()
    try:
        with open(path, "rb", 0) as file:
            for chunk in iter(lambda: file.read(262144), b""):
                digest.update(chunk)
    except OSError:
        return ""
    return digest.hexdigest()


def hold(folder):
    # type: (str) -> int
    """Returns a descriptor that keeps a folder from being removed until it is closed; -1 if there is no such folder."""
    import fcntl

    try:
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return -1
    try:
        fcntl.flock(held, fcntl.LOCK_SH)
    except OSError:
        pass  # this file system knows no locks, so that nothing on it is removed either
    try:
        if os.path.samestat(os.fstat(held), os.lstat(folder)):
            return held
    except FileNotFoundError:
        pass
    os.close(held)  # it was removed between the two
    return -1


def enter(archive, root, folder, tag):
    # type: (str, str, str, str) -> None
    """Holds the private `folder` with the parts for `tag` until this process ends; unpacks them if they are not yet."""
    try:
        if hold(folder) < 0:
            import oppi_unpack  # type: ignore[import-not-found]

            oppi_unpack.first_start(archive, root, folder, tag)
        require_private(root, 0o022)
        require_private(folder, 0o077)
    except OSError as error:
        advice = "free or repair it, or set OPPI_CACHE_DIR to a folder that can be written"
        sys.exit("oppi: cannot unpack into %s: %s; %s" % (root, error.strerror or error, advice))


def bootstrap(archive, build, targets, supported):
    # type: (str, str, dict[str, str], str) -> int
    """Runs oppi from its private folder, which takes the archive's place on sys.path; sys.argv stays as it is.

    `verify` runs from the archive itself, since the folder is what it doubts.
    """
    import gc

    target = choose_target(targets, supported)
    root = cache_root()
    folder = os.path.join(root, build[:20] + "-" + target[0])
    if sys.argv[1:2] == ["verify"]:
        folder = folder if os.path.lexists(folder) else ""
    else:
        enter(archive, root, folder, target[0])
        sys.path[0] = folder
        sys.meta_path.insert(0, Natives(folder, target[1::2], target[2::2]))  # type: ignore[arg-type]
        sys.dont_write_bytecode = False  # the folder is ours alone, and compiling costs more than everything else
    gc.disable()
    import oppi

    gc.freeze()  # modules stay until the end: looking through them for garbage, most of all then, took 7 ms
    gc.enable()
    setattr(oppi, "ARCHIVE", archive)  # noqa: B010
    setattr(oppi, "UNPACKED", folder)  # noqa: B010
    return oppi.main()


# What only a first start needs: `oppi_unpack.py`


def write_synced(path, data):
    # type: (str, bytes) -> None
    """Writes a new file, on disk when this returns."""
    if not os.path.isdir(os.path.dirname(path)):
        os.makedirs(os.path.dirname(path))
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def publish(temporary, folder):
    # type: (str, str) -> bool
    """Gives a complete folder its final name; no if another first start was faster: its result is as good."""
    try:
        os.rename(temporary, folder)
    except OSError:
        if not os.path.isdir(folder):
            raise
        return False
    descriptor = os.open(os.path.dirname(folder), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return True


def unpack(archive, folder, tag):
    # type: (str, str, str) -> int
    """Creates `folder` as the manifest says for `tag`, from the archive's files, each checked against its hash there.

    Returns what `hold` returns of it: the lock comes along when a held folder gets its final name.
    """
    import hashlib
    import json
    import shutil
    import zipfile
    import zlib

    if sys.stderr and sys.stderr.isatty():
        sys.stderr.write("oppi: unpacking for the first start...\n")
    temporary = "%s.%s.tmp" % (folder, os.urandom(8).hex())
    os.mkdir(temporary)
    held = hold(temporary)
    try:
        with zipfile.ZipFile(archive) as pack:
            manifest = json.loads(pack.read("manifest.json").decode())
            for name, expected in manifest["files"].items():
                for prefix, place in manifest["unpacked"][tag].items():
                    if name.startswith(prefix):
                        data = pack.read(name)
                        if hashlib.sha256(data).hexdigest() != expected:
                            raise ValueError(name)
                        write_synced(os.path.join(temporary, place + name[len(prefix) :]), data)
        if held >= 0 and publish(temporary, folder):
            return held
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError, NotImplementedError):
        sys.exit("oppi: %s is damaged; download or build it again" % archive)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if held >= 0:
        os.close(held)
    return hold(folder)


def prune(root, build):
    # type: (str, str) -> None
    """Removes what other builds unpacked, and what a crashed start left, unless a process holds it.

    Renamed first: a folder with its final name is whole.  The parts of this build for other interpreters stay.
    """
    import fcntl
    import re
    import shutil

    for name in os.listdir(root):
        ours = re.match(r"([0-9a-f]{20}-cp3\d+-[a-z]+-\w+)(\.[0-9a-f]{16}\.tmp)?$", name)
        if not ours or (name.startswith(build) and not ours.group(2)):
            continue
        path = os.path.join(root, name)
        try:
            held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(held), os.lstat(path)):
                doomed = os.path.join(root, "%s.%s.tmp" % (ours.group(1), os.urandom(8).hex()))
                os.rename(path, doomed)
                shutil.rmtree(doomed, ignore_errors=True)
        except OSError:
            pass  # in use, or somebody else removes it
        finally:
            os.close(held)


def first_start(archive, root, folder, tag):
    # type: (str, str, str, str) -> None
    """Makes `folder`, below `root`, with the parts for `tag`, and holds it.  OSError if that cannot be done."""
    import importlib.util
    import py_compile

    umask = os.umask(0o077)
    try:
        if not os.path.isdir(root):
            os.makedirs(root)
        require_private(root, 0o022)
        held = hold(folder)
        for _ in range(9):  # another start may remove what this one made before it is held, but not forever
            if held < 0:
                held = unpack(archive, folder, tag)
        if held < 0:
            raise OSError("other starts remove it again and again")
        prune(root, os.path.basename(folder)[:20])
        if sys.argv[1:2] == ["serve"]:  # the next process need not compile it, and gives back what that takes (15 MB)
            path = os.path.join(folder, "oppi.py")
            py_compile.compile(path, cfile=importlib.util.cache_from_source(path))
            os.execv(sys.executable, [sys.executable, archive] + sys.argv[1:])
    finally:
        os.umask(umask)


MAIN_PY = (choose_target, cache_root, require_private, Natives, file_sha256, hold, enter, bootstrap)
UNPACK_PY = (require_private, hold, write_synced, publish, unpack, prune, first_start)

# ======================================================================================================================
#  The pinned wheels
#
#  `websockets` is the newest release for each Python, as its pure wheel: the C part saves nothing that matters here.
#  `cryptography` has one wheel per platform for every Python (stable ABI).  Its Rust part asks for `_cffi_backend` and
#  for nothing else of cffi, so that one file is taken, once per Python and platform.
#  typing_extensions, which cryptography also names for Python 3.9 and 3.10, is only imported by its ASN.1 module.
# ======================================================================================================================

PLATFORMS = {  # our name: (platform tag of its wheels, what os.uname() calls the machine)
    "linux-x86_64": ("manylinux2014_x86_64.manylinux_2_17_x86_64", "x86_64"),
    "linux-aarch64": ("manylinux2014_aarch64.manylinux_2_17_aarch64", "aarch64"),
    "macos-arm64": ("macosx_11_0_arm64", "arm64"),
}
PACKAGES = ("cffi", "cryptography", "qrcode", "websockets")
PYTHONS = ("cp39", "cp310", "cp311", "cp312", "cp313", "cp314")
WEBSOCKETS = {"cp39": "15.0.1", "cp310": "16.1.1"}  # the others take the last pure wheel of the table
ANY = "py3-none-any"


@dataclass(frozen=True)
class Wheel:
    """A wheel as its index publishes it; `tag` is python-abi-platform."""

    name: str
    version: str
    tag: str
    sha256: str

    @property
    def stem(self) -> str:
        """The file's name without `.whl`."""
        return f"{self.name}-{self.version}-{self.tag}"

    @property
    def release(self) -> str:
        """Name and version: the folder of what is the same on every platform."""
        return f"{self.name}-{self.version}"


def pinned(name: str, version: str, platform: str, hashes: dict[str, str]) -> list[Wheel]:
    """Makes the wheels of one release for one platform from a table of python-abi tag to sha256."""
    suffix = "-" + PLATFORMS[platform][0] if platform else ""
    return [Wheel(name, version, tag + suffix, sha256) for tag, sha256 in hashes.items()]


WHEELS: list[Wheel] = [
    *pinned("websockets", "15.0.1", "", {ANY: "f7a866fbc1e97b5c617ee4116daaa09b722101d4a3c170c787450ba409f9736f"}),
    *pinned("websockets", "16.1.1", "", {ANY: "6abbd3e82c731c8e531714466acd5d87b5e88ac3243465337ba71d68e23ae7e3"}),
    *pinned("websockets", "17.4", "", {ANY: "c6bd2c9781915592b209160d0f017d4c7c82ad53075e6b0c24d2a89299e7f9e9"}),
    *pinned("qrcode", "8.2", "", {ANY: "16e64e0716c14960108e85d853062c9e8bba5ca8252c0b4d0231b9df4060ff4f"}),
    *pinned("cryptography", "50.0.2", "linux-x86_64", {
        "cp39-abi3": "ee247f5c245c9a2fe7c8e2214e295918838e44e00a45a6718451e4004219e767",
    }),
    *pinned("cryptography", "50.0.2", "linux-aarch64", {
        "cp39-abi3": "c5e67125c7dca78d199ec4e116aa93dbb83494808ecbb8211a2cb09b1bf41dbd",
    }),
    *pinned("cryptography", "50.0.2", "macos-arm64", {
        "cp39-abi3": "0ec5f09541743261e66e291b4a0cbf0fb2997aeaab6d9e9c740b9dba1b58d1c2",
    }),
    *pinned("cffi", "2.0.0", "linux-x86_64", {
        "cp39-cp39": "61d028e90346df14fedc3d1e5441df818d095f3b87d286825dfcbd6459b7ef63",
    }),
    *pinned("cffi", "2.1.1", "linux-x86_64", {
        "cp310-cp310": "194cffa889098ced9976c3fc6340305e43f6303657d298da55366907c05c22d6",
        "cp311-cp311": "34e261f78cb6ceaaa36f42f2613f4380d94d9c759a9c73c769ee6e0247364632",
        "cp312-cp312": "c1453022f490d2459a11819d83ad1d586e9ff65a12ac3e705ffebd46d3685dcf",
        "cp313-cp313": "a931079504ecc49efed7744c476a5c343a92fabf66dec2db95edb1b2fdc770e2",
        "cp314-cp314": "b0431303acaea1089ad4b3e9ce4e6518193def1118d4073ca848635ee4ea2e96",
    }),
    *pinned("cffi", "2.0.0", "linux-aarch64", {
        "cp39-cp39": "3f4d46d8b35698056ec29bca21546e1551a205058ae1a181d871e278b0b28165",
    }),
    *pinned("cffi", "2.1.1", "linux-aarch64", {
        "cp310-cp310": "5a59cc1c4442bc3d5c703bf720b51138d0bfc173618807c9ee2490a7541dd3d9",
        "cp311-cp311": "3311ed60d36f83378794e1009ac6258bafbf81f7888b4caa7b35a521e3f95813",
        "cp312-cp312": "68e62fe11f30d5ca8289242866f0a5291402d8529ca2178ab8afc5c9694ae890",
        "cp313-cp313": "f16c709686a78c727bbbf059f92b0bf41c6fc60deec706d2dc19f529175a6125",
        "cp314-cp314": "58acb8ab8e295e6c5ea12f888cbb13cf21511ef2a3303a23f4325c29d17fe5c1",
    }),
    *pinned("cffi", "2.0.0", "macos-arm64", {
        "cp39-cp39": "de8dad4425a6ca6e4e5e297b27b5c824ecc7581910bf9aee86cb6835e6812aa7",
    }),
    *pinned("cffi", "2.1.1", "macos-arm64", {
        "cp310-cp310": "ca82be1a1d406ecfe1d25dc16cb33488e5a16bf4438c9fb590484ea29d92478b",
        "cp311-cp311": "398aff33cee2767e3e781d2554c54bd0dff386bb437581e0d8011fde1a942ec1",
        "cp312-cp312": "f81b3b8f3d4e343550fa4baa0e479bba9f2d29ce9c2e9b51d1ce1718d7442fcf",
        "cp313-cp313": "19ee6127ee34de7d83ce3d371ebc5ed91addbdcc39f9ab15ce4eb35a4e534971",
        "cp314-cp314": "661c298b4821edebead0c91edd2b00374d67ad7c5a1f7a91d4442633b79d6a72",
    }),
]

# ======================================================================================================================
#  The builder
# ======================================================================================================================

HEAD = b"""#!/usr/bin/env python3
# coding: this-archive-is-incomplete--download-it-again
"""  # Python takes a zip without its end for source, and then complains of this encoding on one line
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip can hold; real times would differ between builds


class BuildError(Exception):
    """The archive cannot be built; the text says why and what to do."""


def sha256(data: bytes) -> str:
    """The hex digest used everywhere here."""
    return hashlib.sha256(data).hexdigest()


def progress(text: str) -> None:
    """Says what takes a while, to a person only."""
    if sys.stderr.isatty():
        sys.stderr.write(f"build_zipapp: {text}\n")  # in one piece, since several do it at once


def cache_folder() -> str:
    """Returns the private folder of downloaded wheels, created if need be."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.cache")
    folder = os.path.join(base, "oppi-build")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    return folder


def pip_download(folder: str, tag: str, python: str, *what: str) -> str:
    """Lets pip put one wheel into `folder`, resolved for that interpreter and platform instead of those of the build."""
    implementation, abi, platform = tag.split("-")
    version = "3.9.2" if python == "cp39" else f"3.{python[3:]}"  # cryptography refuses 3.9.0, and so takes pip "3.9"
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--dest", folder]
    command += ["--only-binary", ":all:", "--python-version", version, "--implementation", implementation[:2]]
    command += ["--abi", abi, "--platform", platform.split(".")[0], *what]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    found = [name for name in os.listdir(folder) if name.endswith(".whl")]
    if done.returncode or len(found) != 1:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stdout.strip()}")
    return found[0]


def download(wheel: Wheel, folder: str) -> None:
    """Lets pip fetch one wheel into the cache `folder`; pip itself refuses any other hash."""
    progress(f"downloading {wheel.stem}")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        requirements = os.path.join(temporary, "requirements.txt")
        with open(requirements, "w", encoding="ascii") as file:
            file.write(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
        python = PYTHONS[-1] if wheel.tag == ANY else wheel.tag.split("-")[0]
        found = pip_download(temporary, wheel.tag, python, "--require-hashes", "-r", requirements)
        if found != wheel.stem + ".whl":
            raise BuildError(f"pip found {found} instead of {wheel.stem}.whl")
        os.replace(os.path.join(temporary, found), os.path.join(folder, found))


def fetch(wheel: Wheel) -> bytes:
    """Returns the bytes of a pinned wheel, from the cache or downloaded; never bytes with another hash."""
    folder = cache_folder()
    path = os.path.join(folder, wheel.stem + ".whl")
    for attempt in range(2):
        if attempt:
            download(wheel, folder)
        if os.path.exists(path):
            with open(path, "rb") as file:
                data = file.read()
            if sha256(data) == wheel.sha256:
                return data
    raise BuildError(f"{path} does not have the pinned sha256 {wheel.sha256}")


def place(wheel: Wheel, name: str) -> str:
    """Says where a file of a wheel goes in the archive; empty if nothing at run time needs it."""
    base = name.rsplit("/", 1)[-1]
    if ".dist-info/" in name:
        return f"licenses/{wheel.release}/{base}" if base.startswith(("LICENSE", "COPYING", "NOTICE")) else ""
    if name.endswith(".so"):
        return f"native/{wheel.stem}/{name}"
    if wheel.name == "cffi" or not name.endswith(".py") or "/tests/" in name:
        return ""
    return "" if base in ("__main__.py", "cli.py", "console_scripts.py") else f"lib/{wheel.release}/{name}"


def add_wheel(files: dict[str, bytes], wheel: Wheel, data: bytes) -> None:
    """Adds what is needed of a wheel; what several platforms share must be the same bytes in all of them."""
    with zipfile.ZipFile(io.BytesIO(data)) as pack:
        for name in pack.namelist():
            path = place(wheel, name)
            if path and files.setdefault(path, pack.read(name)) != pack.read(name):
                raise BuildError(f"{path} differs between the wheels of {wheel.release}")


def wheels_for(platforms: list[str]) -> list[Wheel]:
    """Returns the pure wheels and those of the platforms."""
    tags = {PLATFORMS[platform][0] for platform in platforms} | {"any"}
    return [wheel for wheel in WHEELS if wheel.tag.split("-")[2] in tags]


def wheel_for(name: str, python: str, platform: str) -> Wheel:
    """Returns the one wheel of a package that an interpreter on a platform takes."""
    tags = [f"{python}-{python}-{PLATFORMS[platform][0]}", f"cp39-abi3-{PLATFORMS[platform][0]}", ANY]
    found = [wheel for wheel in WHEELS if wheel.name == name and wheel.tag in tags]
    if name == "websockets":
        version = WEBSOCKETS.get(python, found[-1].version)
        found = [wheel for wheel in found if wheel.version == version]
    if len(found) != 1:
        raise BuildError(f"{len(found)} wheels of {name} fit {python} on {platform}")
    return found[0]


def unpacked_places(wheels: list[Wheel]) -> dict[str, str]:
    """Says where the files of a target go: what begins with a key is unpacked under its value, the rest of its name kept."""
    natives = {f"native/{wheel.stem}/": "native/" for wheel in wheels if wheel.tag != ANY}
    return {"oppi.py": "oppi.py", **{f"lib/{wheel.release}/": "" for wheel in wheels if wheel.name != "cffi"}, **natives}


def make_target(files: dict[str, bytes], python: str, platform: str) -> tuple[str, str, dict[str, str]]:
    """Returns for one interpreter on one platform: what it is known by, the bootstrap's words on it, the places.

    The words: tag, then each native file with its sha256.  A string, since the table is compiled at each start.
    """
    places = unpacked_places([wheel_for(name, python, platform) for name in PACKAGES])
    found = [(name, prefix) for prefix in places for name in sorted(files) if name.startswith(prefix)]
    natives = {name[len(prefix) :]: sha256(files[name]) for name, prefix in found if places[prefix] == "native/"}
    suffixes = [name[len("_cffi_backend") :] for name in natives if name.startswith("_cffi_backend")]
    words = [f"{python}-{platform}", *(word for native in natives.items() for word in native)]
    return f"{suffixes[0]} {PLATFORMS[platform][1]}", " ".join(words), places


def module_source(about: str, parts: tuple[object, ...], end: str) -> str:
    """Returns the text of a module of the archive: functions of the first half of this file, then `end`."""
    head = f'"""{about}; made by build_zipapp.py."""\n\nimport os\nimport stat\nimport sys\n'
    return "\n\n".join([head, *(inspect.getsource(part) for part in parts), end])  # type: ignore[arg-type]


def main_source(targets: dict[str, str], supported: str, build: str) -> str:
    """Returns the text of `__main__.py`: the bootstrap's functions and their call."""
    table = "".join(f"    {key!r}: {words!r},\n" for key, words in targets.items())
    call = f"bootstrap(os.path.dirname(os.path.abspath(__file__)), {build!r}, TARGETS, {supported!r})"
    end = f'TARGETS = {{\n{table}}}\n\n\nif __name__ == "__main__":\n    sys.exit({call})\n'
    return module_source("Starts oppi from its archive", MAIN_PY, end)


def assemble(source: bytes, platforms: list[str]) -> tuple[str, dict[str, bytes]]:
    """Returns the build id and the files of the archive."""
    wheels = wheels_for(platforms)
    files = {"oppi.py": source, "oppi_unpack.py": module_source("Unpacks oppi's archive", UNPACK_PY, "").encode("ascii")}
    licence = os.path.join(os.path.dirname(os.path.abspath(__file__)), "LICENSE")
    with open(licence, "rb") as file:
        files["licenses/LICENSE"] = file.read()
    with ThreadPoolExecutor(4) as pool:
        for wheel, data in zip(wheels, pool.map(fetch, wheels)):
            add_wheel(files, wheel, data)
    made = [make_target(files, python, platform) for platform in platforms for python in PYTHONS]
    targets = {key: words for key, words, _ in made}
    unpacked = {words.split()[0]: places for _, words, places in made}
    supported = f"CPython 3.{PYTHONS[0][3:]} to 3.{PYTHONS[-1][3:]} on {', '.join(platforms)}"
    hashes = {name: sha256(files[name]) for name in sorted(files)}
    pins = [{"name": w.name, "version": w.version, "file": w.stem + ".whl", "sha256": w.sha256} for w in wheels]
    manifest = {"platforms": platforms, "wheels": pins, "unpacked": unpacked, "files": hashes}
    build = sha256((main_source(targets, supported, "") + json.dumps(manifest)).encode())
    manifest = {"build": build, **manifest}
    files["manifest.json"] = (json.dumps(manifest, indent=1) + "\n").encode()
    files["__main__.py"] = main_source(targets, supported, build).encode("ascii")
    return build, files


def pack_files(files: dict[str, bytes]) -> bytes:
    """Returns the archive: lines for whoever does not see a zip, then one in which nothing depends on this machine."""
    buffer = io.BytesIO()
    buffer.write(HEAD)
    with zipfile.ZipFile(buffer, "a") as pack:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, EPOCH)
            info.create_system = 3  # Unix, so that the mode below means something
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            pack.writestr(info, files[name], zipfile.ZIP_DEFLATED, 9)
    return buffer.getvalue()


def replace_file(path: str, data: bytes, mode: int) -> None:
    """Replaces a program at once, so that whoever runs it never sees half of a new one."""
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        file.write(data)
    os.chmod(temporary, mode)
    os.replace(temporary, path)


# Renewing the pins


def newest(name: str, tag: str, python: str) -> Wheel:
    """Returns the newest wheel of a package with exactly this tag that an interpreter can use; it stays in the cache."""
    progress(f"looking for {name} {tag} {python}")
    with tempfile.TemporaryDirectory(dir=cache_folder()) as temporary:
        found = pip_download(temporary, tag, python, name)
        _, version, got = found[: -len(".whl")].split("-", 2)
        if got != tag:
            raise BuildError(f"{found} is tagged otherwise than the table of platforms says: {tag}")
        with open(os.path.join(temporary, found), "rb") as file:
            wheel = Wheel(name, version, tag, sha256(file.read()))
        os.replace(os.path.join(temporary, found), os.path.join(cache_folder(), found))
    return wheel


def newest_wheels() -> dict[tuple[str, str, str], Wheel]:
    """Returns, by (name, tag, Python), what the table should hold; what all Pythons share has to fit the oldest."""
    wanted = [("websockets", ANY, python) for python in PYTHONS] + [("qrcode", ANY, PYTHONS[0])]
    suffixes = [suffix for suffix, _ in PLATFORMS.values()]
    wanted += [("cryptography", f"cp39-abi3-{suffix}", PYTHONS[0]) for suffix in suffixes]
    wanted += [("cffi", f"{python}-{python}-{suffix}", python) for suffix in suffixes for python in PYTHONS]
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(wanted, pool.map(lambda want: newest(*want), wanted)))


def table_source(wheels: Iterable[Wheel]) -> str:
    """Returns the lines of the table of wheels as they stand in this file."""
    platforms = {suffix: platform for platform, (suffix, _) in PLATFORMS.items()}
    groups: dict[str, dict[str, str]] = {}
    for wheel in wheels:
        python, abi, suffix = wheel.tag.split("-")
        head = f'    *pinned("{wheel.name}", "{wheel.version}", "{platforms.get(suffix, "")}", {{'
        groups.setdefault(head, {})["ANY" if wheel.tag == ANY else f'"{python}-{abi}"'] = wheel.sha256
    text = ""
    for head, hashes in groups.items():
        cells = [f'{tag}: "{digest}"' for tag, digest in hashes.items()]
        lines = "".join(f"\n        {cell}," for cell in cells) + "\n    "
        text += head + (cells[0] if "ANY" in hashes else lines) + "}),\n"
    return text


def update(path: str) -> str:
    """Writes the newest versions and their hashes into the builder at `path`; returns the difference."""
    found = newest_wheels()
    websockets = {python: found["websockets", ANY, python].version for python in PYTHONS}
    older = {python: version for python, version in websockets.items() if version != websockets[PYTHONS[-1]]}
    with open(path, encoding="utf-8") as file:
        old = file.read()
    new = re.sub(r"(?m)^WEBSOCKETS = \{.*?\}", lambda _: f"WEBSOCKETS = {json.dumps(older)}", old, count=1)
    table = f"WHEELS: list[Wheel] = [\n{table_source(found.values())}]\n"
    new = re.sub(r"(?ms)^WHEELS: list\[Wheel\] = \[\n.*?^\]\n", lambda _: table, new, count=1)
    if new != old:
        replace_file(path, new.encode("utf-8"), 0o644)
    names = (os.path.basename(path), os.path.basename(path) + " (updated)")
    return "".join(difflib.unified_diff(old.splitlines(True), new.splitlines(True), *names))


def main(argv: list[str] | None = None) -> int:
    """Builds the archive and prints what identifies it; 1 with a reason if that cannot be done."""
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description="Build oppi.pyz, the whole of oppi in one file.")
    parser.add_argument("-o", "--output", default="oppi.pyz", help="the file to write (default: %(default)s)")
    parser.add_argument("--source", default=os.path.join(here, "oppi.py"), help="the oppi.py to pack")
    parser.add_argument("--platform", action="append", choices=list(PLATFORMS), help="only these (default: all)")
    parser.add_argument("--update", action="store_true", help="instead: pin the newest wheels, in this file, and show how")
    options = parser.parse_args(argv)
    platforms = [name for name in PLATFORMS if name in (options.platform or PLATFORMS)]
    try:
        if options.update:
            print(update(os.path.abspath(__file__)), end="")
            return 0
        with open(options.source, "rb") as file:
            source = file.read()
        build, files = assemble(source, platforms)
        progress("packing")
        data = pack_files(files)
        replace_file(options.output, data, 0o755)
    except (BuildError, OSError) as error:
        print(f"build_zipapp: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: {len(data)} bytes, sha256 {sha256(data)}, build {build}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
