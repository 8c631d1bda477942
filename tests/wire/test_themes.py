"""Colour schemes: both apps decode what is sent, and no name leads out of their folder."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.phone import THEME_CORE, THEME_EXTRA, Phone, quote

from .rig import Rig

CORE, EXTRA = THEME_CORE.split(), THEME_EXTRA.split()
PLAIN = {key: f"#{number:06x}" for number, key in enumerate(CORE, 0xABC000)}
FULL = {**PLAIN, **dict.fromkeys(EXTRA, "#FFEE00")}
FAILED = (500, {"error": "Failed to read theme"})


@pytest.fixture(autouse=True)
def no_themes(rig: Rig) -> Iterator[None]:
    shutil.rmtree(folder(rig), ignore_errors=True)
    yield


@pytest.fixture(params=["1.0", "1.1"])
def phone(rig: Rig, request: pytest.FixtureRequest) -> Phone:
    return rig.phone(request.param)


def folder(rig: Rig) -> Path:
    return rig.server.data / "themes"


def add(rig: Rig, name: str, theme: Any) -> Path:
    """A theme as a person puts it there."""
    path = folder(rig) / f"{name}.json"
    path.parent.mkdir(exist_ok=True, mode=0o700)
    path.write_bytes(theme if isinstance(theme, bytes) else json.dumps(theme).encode())
    return path


def unknown(name: str) -> tuple[int, Any]:
    return 404, {"error": f'Theme "{name}" not found'}


def without(*keys: str) -> dict[str, str]:
    return {key: value for key, value in PLAIN.items() if key not in keys}


def test_without_themes_the_list_is_empty(phone: Phone) -> None:
    assert phone.call("GET", "/themes") == {"themes": []}
    assert phone.request("GET", "/themes/night") == unknown("night")
    assert phone.request("DELETE", "/themes/night") == unknown("night")


def test_a_theme_with_thirteen_colors_gets_the_others_empty(rig: Rig, phone: Phone) -> None:
    answer = phone.call("PUT", "/themes/night", {"theme": {"colors": PLAIN}}, expect=201)
    assert answer["saved"] is True and answer["theme"]["colors"] == {**PLAIN, **dict.fromkeys(EXTRA, "")}
    assert answer["theme"]["colorScheme"] == "dark" and answer["theme"]["name"] == "night"
    assert phone.call("GET", "/themes/night")["theme"] == answer["theme"]
    assert phone.call("GET", "/themes")["themes"] == [{"name": "night", "filename": "night", "colorScheme": "dark"}]
    path = folder(rig) / "night.json"
    assert [stat.S_IMODE(p.stat().st_mode) for p in (path.parent, path)] == [0o700, 0o600]
    assert os.listdir(folder(rig)) == ["night.json"]


def test_a_theme_with_all_of_them_and_a_name(rig: Rig, phone: Phone) -> None:
    theme = {"name": "Näht 🌙", "colorScheme": "light", "colors": FULL}
    assert phone.call("PUT", "/themes/n8", {"theme": theme}, expect=201)["theme"] == theme
    assert phone.call("GET", "/themes/n8")["theme"] == theme
    assert phone.call("GET", "/themes")["themes"] == [{"name": "Näht 🌙", "filename": "n8", "colorScheme": "light"}]
    again = {**theme, "colors": {**FULL, "bg": "#000000", "mdLink": ""}}
    assert phone.call("PUT", "/themes/n8", {"theme": again}, expect=201)["theme"] == again
    assert phone.call("GET", "/themes/n8")["theme"] == again


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({}, "Missing theme object in body"),
        ({"theme": None}, "Missing theme object in body"),
        ({"theme": "dark"}, "Missing theme object in body"),
        ({"theme": [PLAIN]}, "Missing theme object in body"),
        ({"theme": {}}, "Missing colors object"),
        ({"theme": {"colors": [PLAIN]}}, "Missing colors object"),
        ({"theme": {"colors": None}}, "Missing colors object"),
        ({"theme": {"colors": {}}}, "Missing color keys: " + ", ".join(CORE)),
        ({"theme": {"colors": without("fg", "yellow")}}, "Missing color keys: fg, yellow"),
        ({"theme": {"colors": {**PLAIN, "bg": "red"}}}, 'Invalid hex color for "bg": red'),
        ({"theme": {"colors": {**PLAIN, "bg": ""}}}, 'Invalid hex color for "bg": '),
        ({"theme": {"colors": {**PLAIN, "fg": "#12345"}}}, 'Invalid hex color for "fg": #12345'),
        ({"theme": {"colors": {**PLAIN, "fg": "#1234567"}}}, 'Invalid hex color for "fg": #1234567'),
        ({"theme": {"colors": {**PLAIN, "fg": "#12345g"}}}, 'Invalid hex color for "fg": #12345g'),
        ({"theme": {"colors": {**PLAIN, "mdLink": "blue"}}}, 'Invalid hex color for "mdLink": blue'),
        ({"theme": {"colors": {**PLAIN, "fg": "#123456\n"}}}, None),
        ({"theme": {"colors": {**PLAIN, "fg": 123456}}}, None),
        ({"theme": {"colors": {**PLAIN, "fg": None}}}, None),
        ({"theme": {"colors": {**PLAIN, "mdLink": None}}}, None),
    ],
)
def test_what_an_app_could_not_show_is_refused(rig: Rig, phone: Phone, body: Any, problem: str | None) -> None:
    status, answer = phone.request("PUT", "/themes/night", body)
    assert (status, answer["error"]) == (400, problem or answer["error"])
    assert not folder(rig).exists() or os.listdir(folder(rig)) == []


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("My Theme!", "MyTheme"), ("..%2Fconfig", "config"), ("..%2F..%2Fx", "x"), ("a.b", "ab"), ("A_b-1", "A_b-1"),
        ("gr%C3%BCn", "grn"), ("x%00y", "xy"), ("%5C..%5Cz", "z"),
    ],
)  # fmt: skip
def test_a_file_gets_a_plain_name(rig: Rig, phone: Phone, name: str, file: str) -> None:
    before = {path: path.read_bytes() for path in rig.server.data.glob("*") if path.is_file()}
    phone.call("PUT", f"/themes/{name.replace(' ', '%20')}", {"theme": {"colors": PLAIN}}, expect=201)
    assert os.listdir(folder(rig)) == [f"{file}.json"]
    assert phone.call("GET", f"/themes/{file}")["theme"]["colors"]["bg"] == PLAIN["bg"]
    assert {path: path.read_bytes() for path in rig.server.data.glob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["..", "...", "%20", "%2F", "%C3%BC", "%00"])
def test_a_name_of_nothing_plain_is_refused(rig: Rig, phone: Phone, name: str) -> None:
    body = {"theme": {"colors": PLAIN}}
    assert phone.request("PUT", f"/themes/{name}", body) == (400, {"error": "Invalid theme name"})


def test_deleting(rig: Rig, phone: Phone) -> None:
    for name in ("one", "two"):
        phone.call("PUT", f"/themes/{name}", {"theme": {"colors": PLAIN}}, expect=201)
    assert phone.call("DELETE", "/themes/one") == {"deleted": True}
    assert phone.request("DELETE", "/themes/one") == unknown("one") == phone.request("GET", "/themes/one")
    assert [theme["filename"] for theme in phone.call("GET", "/themes")["themes"]] == ["two"]


def test_a_name_is_decoded_once(rig: Rig, phone: Phone) -> None:
    for name in ("my theme", "grün", "50%", "a+b", "日本"):
        add(rig, name, {"colors": PLAIN})
        assert phone.call("GET", f"/themes/{quote(name)}")["theme"]["name"] == name
    assert [theme["filename"] for theme in phone.call("GET", "/themes")["themes"]] == ["50%", "a+b", "grün", "my theme", "日本"]
    assert phone.request("GET", "/themes/my%2520theme") == unknown("my%20theme")
    assert phone.request("GET", "/themes/my+theme") == unknown("my+theme")


def test_no_name_leads_out_of_the_folder(rig: Rig, phone: Phone, tmp_path: Path) -> None:
    """config.json holds the owner token: a theme of that name must not be it."""
    add(rig, "night", {"colors": PLAIN})
    token = json.loads((rig.server.data / "config.json").read_text())["token"]
    good = {"colors": PLAIN, "name": "outside"}
    (rig.server.data / "outside.json").write_text(json.dumps(good))
    (rig.server.data / "themes-two").mkdir(exist_ok=True)
    (rig.server.data / "themes-two" / "x.json").write_text(json.dumps(good))
    (tmp_path / "far.json").write_text(json.dumps(good))
    add(rig, ".hidden", good)
    (folder(rig) / "sub").mkdir()
    (folder(rig) / "sub" / "x.json").write_text(json.dumps(good))
    for name in (
        *(
            "..%2Fconfig",
            "..%2Foutside",
            "%2e%2e%2Foutside",
            "..%2Fthemes-two%2Fx",
            "..%5Coutside",
            ".hidden",
            ".%2Fnight",
            "sub%2Fx",
        ),
        *(
            quote(str(tmp_path / "far")).replace("/", "%2F"),
            "night%00",
            "%00",
            "..",
            ".",
            "night%0A",
            "x" * 5000,
            "%2F",
            "..%252Foutside",
        ),
    ):
        for method in ("GET", "DELETE"):
            answer = phone.raw(method, f"/themes/{name}")
            assert answer.status == 404 and token.encode() not in answer.body and b"outside" not in answer.body[40:], name
    assert (tmp_path / "far.json").exists() and (rig.server.data / "outside.json").exists()
    assert phone.request("GET", "/themes/../config")[0] == 404
    assert [theme["filename"] for theme in phone.call("GET", "/themes")["themes"]] == ["night"]


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff\xfe", b"[]", b"7", b"{}", b'{"colors": 7}', b'{"colors": {"bg": "#000000"}}', b"[" * 50_000,
        json.dumps({"colors": {**PLAIN, "bg": "red"}}).encode(), json.dumps({"colors": PLAIN, "x": "y" * 70_000}).encode(),
    ],
)  # fmt: skip
def test_a_file_that_is_no_theme_harms_no_other(rig: Rig, phone: Phone, content: bytes) -> None:
    add(rig, "good", {"colors": PLAIN})
    path = add(rig, "broken", content)
    assert [theme["filename"] for theme in phone.call("GET", "/themes")["themes"]] == ["good"]
    assert phone.request("GET", "/themes/broken") == FAILED
    assert phone.call("DELETE", "/themes/broken") == {"deleted": True} and not path.exists()


def test_what_is_no_plain_file_is_no_theme(rig: Rig, phone: Phone, tmp_path: Path) -> None:
    (tmp_path / "far.json").write_text(json.dumps({"name": "outside", "colors": PLAIN}))
    add(rig, "good", {"colors": PLAIN})
    (folder(rig) / "link.json").symlink_to(tmp_path / "far.json")
    (folder(rig) / "config.json").symlink_to(rig.server.data / "config.json")
    (folder(rig) / "broken.json").symlink_to("nowhere.json")
    (folder(rig) / "dir.json").mkdir()
    (folder(rig) / "readme.txt").write_text("x")
    os.mkfifo(folder(rig) / "pipe.json")
    assert [theme["filename"] for theme in phone.call("GET", "/themes")["themes"]] == ["good"]
    for name in ("link", "config", "broken", "dir", "pipe", "readme", "readme.txt"):
        answer = phone.raw("GET", f"/themes/{name}")
        assert (
            (answer.status, answer.json()) in (FAILED, unknown(name))
            and b"outside" not in answer.body
            and b"sk_" not in answer.body
        ), name
    assert phone.request("DELETE", "/themes/dir") == unknown("dir")
    for name in ("link", "config", "broken", "pipe"):
        assert phone.call("DELETE", f"/themes/{name}") == {"deleted": True}
    assert (tmp_path / "far.json").exists() and (rig.server.data / "config.json").exists()
    assert sorted(os.listdir(folder(rig))) == ["dir.json", "good.json", "readme.txt"]
