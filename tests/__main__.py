"""The whole gate: `python3 tests`, or only some of its steps: `python3 tests lint unit`.

Everything is installed into a private virtual environment outside the work tree, in which the steps then run.
A step passes or fails; a step of pytest counts each of its tests.  The last line is `N passed, N failed`.
"""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not tests/, whose modules would then have two names

from tests.support.tools import apt_install, cache_folder, fetch_pythons, find_pythons, locked, run  # noqa: E402

BANNER = "I/O starts here"  # above this line of oppi.py every line and branch has to be covered
FLOOR = "websockets==15.0.1"  # what Python 3.9 gets: types are checked against the oldest release in use
SUITES = ("unit", "wire", "real", "container", "abuse", "archive")
SPREAD = ("wire", "real", "container", "archive")  # they wait more than they work
STEPS = ("lint", "types", *SUITES, "build", "start")
STEP_LIMIT = 900  # seconds; a suite that hangs fails and does not hold up the rest
MUST = {(3, 9), (3, 11), (3, 13)}  # Pythons without which the archive is not proven
FEWEST = (3, 11)  # the Python that the tools below need; oppi itself is started with all of them


class Gate:
    """Runs steps and counts what they say."""

    def __init__(self, python: str, work: Path) -> None:
        self.python, self.work = python, work
        self.passed = self.failed = self.skipped = 0
        self.environment = {
            **os.environ,
            "PYTHONPYCACHEPREFIX": str(work / "pycache"),  # keeps the work tree clean
            "HYPOTHESIS_STORAGE_DIRECTORY": str(cache_folder() / "hypothesis"),
            "MYPYPATH": str(Path(python).parent.parent / "floor"),
            "MYPY_CACHE_DIR": str(cache_folder() / "mypy"),
            "COVERAGE_FILE": str(work / "coverage"),
        }

    def call(self, *command: str, limit: float = STEP_LIMIT, **environment: str) -> bool:
        """Runs a command in the root folder; kills its whole group if it takes too long."""
        sys.stdout.flush()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            env={**self.environment, **environment},
            start_new_session=True,
        )
        try:
            return process.wait(limit) == 0
        except subprocess.TimeoutExpired:
            print(f"stopped after {limit:.0f} s: {' '.join(command)}")
            return False
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def step(self, name: str) -> None:
        """Runs one step by its name and prints how long it took."""
        print(f"\n=== {name}", flush=True)
        begin, failed = time.monotonic(), self.failed
        if name in SUITES:
            self.suite(name)
        else:
            self.count(getattr(self, name)())
        result = "FAILED" if self.failed > failed else "ok"
        print(f"=== {name}: {result}, {time.monotonic() - begin:.1f} s", flush=True)

    def count(self, good: bool) -> None:
        """Counts a check that is one thing."""
        self.passed += good
        self.failed += not good

    # -- steps ---------------------------------------------------------------------------------------------------------

    def lint(self) -> bool:
        """Style, of everything there is."""
        return self.call(self.python, "-m", "ruff", "check", "--no-cache", "--config", "tests/ruff.toml", ".")

    def types(self) -> bool:
        """Strict types of what people run."""
        return self.call(self.python, "-m", "mypy", "--config-file", "tests/mypy.ini", "oppi.py", "build_zipapp.py")

    def suite(self, name: str) -> None:
        """Runs one folder of tests, if it exists, and adds its counts; `unit` also has to cover the pure half."""
        if not list((ROOT / "tests" / name).glob("**/test_*.py")):
            return
        report = self.work / f"{name}.xml"
        pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=120"]
        pytest += [f"--basetemp={self.work / name}", f"--junitxml={report}", "--durations=5", f"tests/{name}"]
        if name in SPREAD:
            pytest += ["-n", "2", "--dist", "loadfile"]
        if name == "unit":
            pytest = ["-m", "coverage", "run", "--branch", "--include=oppi.py", *pytest]
        good = self.call(self.python, *pytest)
        failed = self.count_report(report)
        if not good and not failed:  # it broke before any test could fail
            self.count(False)
        if name == "unit":
            self.count(self.pure_half_covered())

    def count_report(self, report: Path) -> int:
        """Adds the counts of a pytest report; returns how many failed."""
        if not report.exists():
            return 0
        suite = ElementTree.parse(report).getroot().find("testsuite")
        if suite is None:
            return 0
        tests, failures, errors, skipped = (
            int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")
        )
        self.failed += failures + errors
        self.skipped += skipped
        self.passed += tests - failures - errors - skipped
        return failures + errors

    def pure_half_covered(self) -> bool:
        """Tells whether every line and branch of oppi.py above the banner was run, and prints those that were not."""
        report = self.work / "coverage.json"
        if not self.call(self.python, "-m", "coverage", "json", "-q", "-o", str(report)):
            return False
        lines = (ROOT / "oppi.py").read_text(encoding="utf-8").split("\n")
        banners = [number for number, line in enumerate(lines, 1) if line.startswith("#") and BANNER in line]
        if len(banners) != 1:
            print(f"oppi.py has {len(banners)} comment lines with {BANNER!r}, not one")
            return False
        measured = json.loads(report.read_text())["files"]["oppi.py"]
        missing = [line for line in measured["missing_lines"] if line < banners[0]]
        branches = [f"{start}->{end}" for start, end in measured["missing_branches"] if start < banners[0]]
        if missing or branches:
            print(f"not covered in the pure half (to line {banners[0]}): lines {missing}, branches {branches}")
        return not missing and not branches

    def build(self) -> bool:
        """Builds the archive twice, the second time with everything different that must not matter."""
        first, second = self.work / "oppi.pyz", self.work / "elsewhere" / "other.pyz"
        second.parent.mkdir()
        one = {"TZ": "UTC", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "1"}
        other = {"TZ": "Pacific/Kiritimati", "LC_ALL": "C", "PYTHONHASHSEED": "7"}
        umask = os.umask(0o022)
        good = self.call(self.python, "build_zipapp.py", "-o", str(first), **one)
        os.umask(0o077)
        copy = shutil.copytree(ROOT, second.parent / "copy", ignore=shutil.ignore_patterns(".*", "tests"))
        good &= self.call(self.python, str(copy / "build_zipapp.py"), "-o", str(second), **other)
        os.umask(umask)
        equal = good and filecmp.cmp(first, second, shallow=False)
        print("both builds have the same bytes" if equal else "the two builds differ")
        return equal

    def start(self) -> bool:
        """Starts the archive with every Python that may run it, on an empty home, without site-packages."""
        archive, good, started_by = self.work / "oppi.pyz", True, set()
        if not archive.exists() and not self.call(self.python, "build_zipapp.py", "-o", str(archive)):
            return False
        for python, version in find_pythons().items():
            if version >= (3, 9, 2):
                home = tempfile.mkdtemp(dir=self.work)
                empty = {"HOME": home, "XDG_CACHE_HOME": "", "OPPI_CACHE_DIR": "", "OPPI_DATA_DIR": ""}
                begin = time.monotonic()
                started = self.call(python, "-I", "-S", str(archive), "--version", limit=60, **empty)
                took = time.monotonic() - begin
                number = ".".join(map(str, version))
                print(f"{python}: Python {number} {'starts' if started else 'FAILS'}, {took:.2f} s")
                good &= started
                started_by.add(version[:2])
        if missing := MUST - started_by:
            print(f"it has to be started with Python {', '.join(f'{a}.{b}' for a, b in sorted(missing))} too: not found")
        return good and not missing


def environment_folder(python: str) -> Path:
    """Names the virtual environment after what determines it, so that a change of pins makes a new one."""
    text = python + FLOOR + (ROOT / "tests" / "requirements.txt").read_text(encoding="utf-8")
    return cache_folder() / ("venv-" + hashlib.sha256(text.encode()).hexdigest()[:12])


def make_environment(python: str) -> str:
    """Returns the Python of the private virtual environment, made and filled if it is not there yet."""
    folder = environment_folder(python)
    inside = str(folder / "bin" / "python")
    with locked("venv"):
        if (folder / "complete").exists():
            return inside
        print(f"installing the tools into {folder}", flush=True)
        try:
            run([python, "-m", "venv", "--clear", str(folder)])
        except RuntimeError:  # Debian's python3 comes without venv and ensurepip
            apt_install("python3-venv")
            run([python, "-m", "venv", "--clear", str(folder)])
        pip = [inside, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        run([*pip, "-r", str(ROOT / "tests" / "requirements.txt")])
        run([*pip, "--no-deps", "--target", str(folder / "floor"), FLOOR])
        (folder / "complete").touch()
    return inside


def tool_python() -> str:
    """Returns the Python for the tools: this one, or the newest of this machine if this one is too old for them."""
    if sys.version_info >= FEWEST:
        return sys.executable
    python, version = list(find_pythons().items())[-1]
    if version < FEWEST:
        sys.exit("python3 tests needs a Python 3.11 or newer on this machine for its tools")
    return python


def main(names: list[str]) -> int:
    """Runs the named steps, or all; 1 if anything failed."""
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        sys.exit(f"unknown step {unknown[0]}; the steps are {', '.join(STEPS)}")
    begin = time.monotonic()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever starts this beside ignores it, and so would the tests
    with tempfile.TemporaryDirectory(prefix="oppi-tests-") as work:
        python = make_environment(tool_python())
        if not names or {"archive", "start"} & set(names):
            try:
                fetch_pythons([python, "-m", "pip", "install", "-q", "--disable-pip-version-check"])
            except (RuntimeError, OSError, ValueError) as error:  # `start` will miss it; the rest can be tried all the same
                print(error, flush=True)
        gate = Gate(python, Path(work))
        for name in STEPS:
            if name in names or not names:
                gate.step(name)
    print(f"\nin {time.monotonic() - begin:.0f} s, {gate.skipped} skipped")
    print(f"{gate.passed} passed, {gate.failed} failed")
    return 1 if gate.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
