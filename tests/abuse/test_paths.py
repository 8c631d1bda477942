"""Whatever a path is made of, and whatever it is exchanged for meanwhile: nothing outside of its folder is sent."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oppi
from tests.support.phone import THEME_CORE
from tests.wire.rig import Rig

CANARY = "canary-c0ffee"
GOOD = "inside"
COLORS = dict.fromkeys(THEME_CORE.split(), "#123456")
RACE_S = 1.5
EXAMPLES = settings(
    derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def theme(name: str) -> str:
    return json.dumps({"name": name, "colors": COLORS})


@dataclass
class Place:
    """A folder the server reads from, in another one full of secrets."""

    rig: Rig
    outer: Path
    sid: str
    routes: dict[str, str] = field(default_factory=dict)  # name -> path of the request up to where the path is appended

    @property
    def root(self) -> Path:
        return self.outer / "root"


def fill(root: Path, outer: Path, ending: str, good: str, bad: str) -> None:
    """Files of the same names inside and outside, and links of every kind from inside to outside."""
    for folder in (root, root / "sub", root / "sub" / "deep"):
        put(folder / f"a{ending}", good)
        put(folder / f"ä ö{ending}", good)
    for folder in (outer, outer / "sub", outer / f"{root.name}-two", outer / "vault"):
        put(folder / f"a{ending}", bad)
        put(folder / f"secret{ending}", bad)
    links = {
        f"file{ending}": "../vault/a" + ending, f"abs{ending}": str(outer / f"secret{ending}"), "up": "..", "dir": "../vault",
        "top": "/", "good": "sub", "self": ".", f"loop{ending}": f"loop{ending}", f"broken{ending}": "../nowhere",
        f"chain0{ending}": f"chain1{ending}", f"chain1{ending}": f"self/chain2{ending}", f"chain2{ending}": f"up/secret{ending}",
        "sub/out": "../../vault", "sub/back": "../sub",
    }  # fmt: skip
    for name, target in links.items():
        with contextlib.suppress(FileExistsError):
            (root / name).symlink_to(target)


@pytest.fixture(scope="module")
def module_place(module_rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    rig, outer = module_rig, tmp_path_factory.mktemp("outer")
    fill(outer / "root", outer, "", GOOD, CANARY)
    put(outer / "root" / ".env", CANARY)
    put(outer / "root" / ".git" / "config", CANARY)
    os.mkfifo(outer / "root" / "pipe")
    skills = rig.server.agent_dir / "skills"
    fill(skills / "skill", skills, "", GOOD, CANARY)
    put(skills / "skill" / "SKILL.md", "---\ndescription: A skill\n---\n")
    themes = rig.server.data / "themes"
    fill(themes, rig.server.data, ".json", theme(GOOD), theme(CANARY))
    wid = rig.phone("1.0").create_workspace("Paths", hostMount=str(outer / "root"), policyPreset="host")["id"]
    sid = rig.phone().create_session(wid)["id"]
    base = f"/workspaces/{wid}/sessions/{sid}"
    yield Place(rig, outer, sid, {"files": f"{base}/files?path=", "skill": "/skills/skill/file?path=", "theme": "/themes/"})
    rig.phone().delete(wid, sid)
    shutil.rmtree(outer, ignore_errors=True)


@pytest.fixture
def place(rig: Rig, module_place: Place) -> Place:
    return module_place


NAMES = [
    "a",
    "ä ö",
    "sub",
    "deep",
    "secret",
    "file",
    "abs",
    "up",
    "dir",
    "top",
    "good",
    "self",
    "loop",
    "broken",
    "chain0",
    "out",
]
PARTS = (
    st.sampled_from([*NAMES, "..", "..", "..", ".", "", "root-two", "skill-two", "root", "skill", "themes", "config", "pipe"])
    | st.sampled_from([".env", ".git", "etc", "passwd", "data", "~", "...", ".. ", "..\0", "a\0", "a" * 300, "\\..\\", "\u2025"])
    | st.text(max_size=5)
)
ENCODINGS: tuple[Callable[[str], str], ...] = (
    lambda text: urllib.parse.quote(text, safe="/"),
    lambda text: urllib.parse.quote(text, safe=""),
    lambda text: "".join(f"%{byte:02x}" for byte in text.encode("utf-8", "replace")),
    lambda text: urllib.parse.quote(urllib.parse.quote(text, safe=""), safe=""),
    lambda text: urllib.parse.quote(text, safe="/").replace("..", "%2e%2E"),
    lambda text: urllib.parse.quote(text, safe="").replace("%2F", "%c0%af"),
    lambda text: urllib.parse.quote(text, safe="/").replace("%20", "+"),
)


@st.composite
def paths(draw: st.DrawFn) -> tuple[str, Callable[[str], str]]:
    """(path with {root} or {outer} as its beginning or neither, how it is written in the URL)."""
    begin = draw(st.sampled_from(["", "", "", "{root}/", "{outer}/", "{root}-two/", "/", "//", "{root}/../", "/proc/self/root/"]))
    parts = draw(st.lists(PARTS, min_size=1, max_size=6))
    if draw(st.integers(0, 30)) == 0:
        parts *= 400
    return begin + "/".join(parts).encode("utf-8", "replace").decode(), draw(st.sampled_from(ENCODINGS))


def harmless(status: int, body: bytes) -> None:
    """What was answered is either what stands inside, or that it is not to be had."""
    assert CANARY.encode() not in body and b"root:" not in body and b"sk_" not in body
    if status == 200:
        text = body.decode()
        assert GOOD in text or "A skill" in text or text in ("", '{"content":""}'), text[:200]
    else:
        assert status in (400, 403, 404, 413, 414, 431) or json.loads(body) == {"error": "Failed to read theme"}, (status, body)


@EXAMPLES
@given(case=paths())
def test_no_path_leads_outside(place: Place, case: tuple[str, Callable[[str], str]]) -> None:
    path, write = case
    phone = place.rig.phone()
    roots = {
        "files": place.root,
        "skill": place.rig.server.agent_dir / "skills" / "skill",
        "theme": place.rig.server.data / "themes",
    }
    for name, route in place.routes.items():
        text = path.replace("{root}", str(roots[name])).replace("{outer}", str(roots[name].parent))
        written = write(text) if name != "theme" else write(text).replace("/", "%2F")
        answer = phone.raw("GET", route + written)
        harmless(answer.status, answer.body)
    place.rig.phones.clear()


def test_the_good_ones_are_there_all_the_same(place: Place) -> None:
    phone = place.rig.phone()
    for path in ("a", "sub/a", "good/deep/a", "self/self/a", "sub/back/deep/../a", "%C3%A4%20%C3%B6", "sub/../a"):
        assert phone.raw("GET", place.routes["files"] + path).body == GOOD.encode()
        assert phone.call("GET", place.routes["skill"] + path) == {"content": GOOD}
    for name in ("a", "%C3%A4%20%C3%B6"):
        assert phone.call("GET", place.routes["theme"] + name)["theme"]["name"] == GOOD


# ---- while it is exchanged -------------------------------------------------------------------------------------------


def swap_file(path: Path, secret: Path) -> None:
    """A file becomes a link to a secret, and a file again; it is always one of both."""
    good, link = path.with_name("swap-good"), path.with_name("swap-link")
    shutil.copyfile(path, good)
    link.symlink_to(secret)
    os.replace(link, path)
    os.replace(good, path)


def swap_folder(path: Path, secret: Path) -> None:
    """The same for a folder; for moments there is none."""
    aside = path.with_name("swap-aside")
    os.rename(path, aside)
    path.symlink_to(secret)
    path.unlink()
    os.rename(aside, path)


class Swapping:
    """Exchanges them as fast as it can, in threads, until the block ends."""

    def __init__(self, *works: tuple[Callable[[Path, Path], None], Path, Path]) -> None:
        self.count, self.over = 0, threading.Event()
        self.threads = [threading.Thread(target=self.run, args=work) for work in works]

    def run(self, swap: Callable[[Path, Path], None], path: Path, secret: Path) -> None:
        while not self.over.is_set():
            swap(path, secret)
            self.count += 1

    def __enter__(self) -> Swapping:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()


def keep_asking(rig: Rig, method: str, targets: list[str], enough: Callable[[], bool]) -> Iterator[tuple[int, bytes]]:
    """Answers to these requests by turns, on one connection, for RACE_S, and on a busy machine until it is enough."""
    connection = http.client.HTTPConnection("127.0.0.1", rig.server.port, timeout=10)
    headers = {"Authorization": "Bearer " + rig.phone().token}
    rig.phones.clear()
    begin = time.monotonic()
    while time.monotonic() < begin + RACE_S or (time.monotonic() < begin + 20 * RACE_S and not enough()):
        for target in targets:
            connection.request(method, target, headers=headers)
            answer = connection.getresponse()
            yield answer.status, answer.read()
    connection.close()


@pytest.mark.parametrize("name", ["files", "skill", "theme"])
def test_what_is_exchanged_for_a_link_is_not_followed(place: Place, name: str) -> None:
    server, ending = place.rig.server, ".json" if name == "theme" else ""
    root = {"files": place.root, "skill": server.agent_dir / "skills" / "skill", "theme": server.data / "themes"}[name]
    secrets, text = place.outer / "race" / name, theme if name == "theme" else str
    put(secrets / f"x{ending}", text(CANARY))
    put(root / f"swapped{ending}", text(GOOD))
    put(root / "moved" / "way" / f"x{ending}", text(GOOD))
    works = [(swap_file, root / f"swapped{ending}", secrets / f"x{ending}")]
    targets = [place.routes[name] + "swapped"]
    if name != "theme":
        works.append((swap_folder, root / "moved" / "way", secrets))
        targets.append(place.routes[name] + "moved/way/x")
    seen: dict[str, Counter[int]] = {target: Counter() for target in targets}

    def enough() -> bool:
        often = swapping.count > 50 and sum(sum(statuses.values()) for statuses in seen.values()) > 50
        return often and all(statuses[200] and len(statuses) > 1 for statuses in seen.values())

    with Swapping(*works) as swapping:
        for number, (status, body) in enumerate(keep_asking(place.rig, "GET", targets, enough)):
            harmless(status, body)
            seen[targets[number % len(targets)]][status] += 1
    assert enough(), (swapping.count, seen)


def test_a_skill_that_is_copied_meanwhile_holds_nothing_from_outside(tmp_path: Path) -> None:
    """Reading the files of a folder that is to become a skill, without the disk's time for writing them."""
    source, made = tmp_path / "root" / "tool", 0
    put(source / "SKILL.md", "A skill")
    put(source / "swapped", GOOD)
    put(source / "way" / "x", GOOD)
    put(tmp_path / "vault" / "x", CANARY)
    works = [(swap_file, source / "swapped", tmp_path / "vault" / "x"), (swap_folder, source / "way", tmp_path / "vault")]
    begin = time.monotonic()
    with Swapping(*works):
        while time.monotonic() < begin + RACE_S or (time.monotonic() < begin + 20 * RACE_S and not made):
            with contextlib.suppress(oppi.OppiError, OSError):  # something was not there at a bad moment
                files = oppi.gather(str(tmp_path / "root"), "tool")
                assert CANARY.encode() not in files.values()
                made += GOOD.encode() in files.values()
    assert made
