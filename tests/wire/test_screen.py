"""What a person sees in a real terminal of 80 × 24, and what a phone's camera reads from it."""

from __future__ import annotations

import base64
import json
import os
import re
import stat
import xml.etree.ElementTree as ElementTree
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.support.phone import Phone, bootstrap_10
from tests.support.screen import Screen, codes, read_codes, screen

from .test_cli import Shell, oppi, running  # noqa: F401

CODE_CHARACTERS = re.compile("[▀▄█▌▐\U0001fb00-\U0001fb3b]")


def env_of(shell: Shell, **more: str) -> dict[str, str]:
    return {**shell.server.env, "OPPI_DATA_DIR": str(shell.data), **more}


def show(shell: Shell, *words: str, columns: int = 80, lines: int = 24, **env: str) -> Any:
    return screen(shell.server.command(*words), env_of(shell, **env), columns, lines)


def picture_of_png(data: bytes) -> memoryview:
    """An 8-bit grey picture without filters, as (rows, columns)."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data[12:16] == b"IHDR"
    wide, high = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    assert (data[24], data[25]) == (8, 0)
    at, body = 8, b""
    while at < len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        content = data[at + 8 : at + 8 + size]
        assert int.from_bytes(data[at + 8 + size : at + 12 + size], "big") == zlib.crc32(kind + content)
        body += content if kind == b"IDAT" else b""
        at += 12 + size
    raw = zlib.decompress(body)
    rows = [raw[y * (wide + 1) : (y + 1) * (wide + 1)] for y in range(high)]
    assert all(row[0] == 0 for row in rows)
    return memoryview(b"".join(row[1:] for row in rows)).cast("B", (high, wide))


def picture_of_svg(data: bytes) -> memoryview:
    """A drawing of dark squares on white, as (rows, columns) of 4 pixels a module."""
    root = ElementTree.fromstring(data)
    side = int(float(root.attrib["viewBox"].split()[2]))
    light = [[255] * side for _ in range(side)]
    assert any(node.tag.endswith("rect") and node.get("fill") == "white" for node in root)
    path = next(node for node in root if node.tag.endswith("path")).attrib["d"]
    for x, y in re.findall(r"M(\d+),(\d+)H", path):
        light[int(y)][int(x)] = 0
    rows = [bytes(grey for grey in row for _ in range(4)) for row in light for _ in range(4)]
    return memoryview(b"".join(rows)).cast("B", (side * 4, side * 4))


class TestPair:
    def test_a_small_window_shows_a_whole_code_that_pairs(self, running: Shell) -> None:  # noqa: F811
        with show(running, "pair", "--host", "127.0.0.1", "--port", str(running.server.port)) as shown:
            text = shown.shows("ended with 0")
        (code,) = codes(text)
        invite = json.loads(code)
        assert invite["v"] == 3 and "app 1.1 or newer: scan within 90 seconds" in text
        assert "App 1.0: pair --app 1.0" in text and "--open" in text
        phone = Phone(running.server.base_url)
        phone.pair(invite["pairingToken"])
        assert phone.me()

    def test_a_large_window_shows_both_codes(self, running: Shell) -> None:  # noqa: F811
        with show(running, "pair", "--host", "127.0.0.1", columns=120, lines=110) as shown:
            text = shown.shows("ended with 0")
        assert sorted(json.loads(code)["v"] for code in codes(text)) == [2, 3]
        assert "connect?v=3" in text.replace("\n", "") and "connect?v=2" in text.replace("\n", "")

    def test_the_code_of_app_10_pairs(self, running: Shell) -> None:  # noqa: F811
        port = str(running.server.port)
        with show(running, "pair", "--app", "1.0", "--host", "127.0.0.1", "--port", port, columns=90, lines=50) as shown:
            (code,) = codes(shown.shows("ended with 0"))
        link = "oppi://connect?v=2&invite=" + base64.urlsafe_b64encode(code.encode()).decode().rstrip("=")
        assert bootstrap_10(link).me()

    def test_what_does_not_fit_says_how_large_the_window_must_be(self, running: Shell) -> None:  # noqa: F811
        with show(running, "pair", "--app", "1.0", "--host", "127.0.0.1") as shown:
            text = shown.shows("ended with 0")
        assert not codes(text)
        need = re.search(r"it needs (\d+) columns and (\d+) lines", " ".join(text.split()))
        assert need and "oppi.pypair--app1.0--open" in "".join(text.split())  # where the window breaks it depends on the path
        columns, lines = map(int, need.groups())
        with show(running, "pair", "--app", "1.0", "--host", "127.0.0.1", columns=columns, lines=lines) as shown:
            assert len(codes(shown.shows("ended with 0"))) == 1

    @pytest.mark.parametrize("window", [(80, 24), (120, 110)])
    def test_a_code_is_dark_on_light_whatever_the_colours_of_the_terminal(self, running: Shell, window: tuple[int, int]) -> None:  # noqa: F811
        with show(running, "pair", "--host", "127.0.0.1", columns=window[0], lines=window[1]) as shown:
            shown.shows("ended with 0")
            drawn = [line for line in shown.text("-e").splitlines() if len(CODE_CHARACTERS.findall(line)) > 10]
        assert len(drawn) > 15
        for line in drawn:
            before = line[: CODE_CHARACTERS.search(line).start()]  # type: ignore[union-attr]
            assert "\033[30m\033[107m" in before or "\033[30;107m" in before


class TestPicture:
    @pytest.mark.parametrize("kind", ["png", "svg"])
    @pytest.mark.parametrize("app", ["1.1", "1.0"])
    def test_a_file_holds_a_code_that_only_its_owner_can_read(self, oppi: Shell, kind: str, app: str, tmp_path: Path) -> None:  # noqa: F811
        path = tmp_path / f"code.{kind}"
        text = oppi("pair", "--host", "h.local", "--app", app, f"--{kind}", str(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert str(path) in text and not CODE_CHARACTERS.search(text) and "connect?" not in text
        read = picture_of_png if kind == "png" else picture_of_svg
        (code,) = read_codes(read(path.read_bytes()))
        assert json.loads(code)["v"] == {"1.1": 3, "1.0": 2}[app]

    @pytest.mark.parametrize("key", ["Enter", "C-c"])
    def test_a_picture_is_shown_and_leaves_nothing_behind(self, oppi: Shell, key: str, tmp_path: Path) -> None:  # noqa: F811
        kept, programs, temporary = tmp_path / "kept.png", tmp_path / "bin", tmp_path / "tmp"
        programs.mkdir()
        temporary.mkdir()
        viewer = programs / "xdg-open"
        viewer.write_text(f'#!/bin/sh\ncp "$1" {kept}.part && mv {kept}.part {kept}\n')
        viewer.chmod(0o755)
        path = f"{programs}:{oppi.server.env['PATH']}"
        with show(oppi, "pair", "--host", "h.local", "--open", PATH=path, TMPDIR=str(temporary)) as shown:
            shown.shows("press Enter")
            assert len(list(temporary.glob("*/*.png"))) == 1
            shown.keys(key)
            shown.shows("ended with 0" if key == "Enter" else "ended with 1")
        assert json.loads(read_codes(picture_of_png(kept.read_bytes()))[0])["v"] == 3
        assert list(temporary.iterdir()) == []

    def test_without_a_viewer_there_is_another_way(self, oppi: Shell, tmp_path: Path) -> None:  # noqa: F811
        os.symlink("/bin/sh", tmp_path / "sh")
        line = oppi.refuses("pair", "--host", "h.local", "--open", env={"PATH": str(tmp_path)})
        assert "xdg-open is not installed" in line and "--png FILE" in line


def fits(shown: Screen, text: str) -> None:
    """No line of the screen was broken in two, and nothing has scrolled away."""
    assert shown.text("-S", "-200").rstrip() == text.rstrip()
    whole = [line.rstrip() for line in shown.text("-J").splitlines()]  # -J joins broken lines and keeps blanks at the end
    assert "\n".join(whole).rstrip() == text.rstrip()


class TestScreens:
    def test_status_fits_a_small_window(self, running: Shell) -> None:  # noqa: F811
        with show(running, "status") as shown:
            text = shown.shows("ended with 0")
            fits(shown, text)
        assert str(running.server.port) in text and "not paired; run: python3" in text

    def test_the_wizard_shows_what_is_set_and_can_be_run_again(self, oppi: Shell) -> None:  # noqa: F811
        for port in ("7801", "7802"):
            with show(oppi, "init") as shown:
                if port == "7802":
                    shown.shows("Continue anyway?")
                    shown.keys("y", "Enter")
                    assert "7801" in shown.shows("Port")
                else:
                    shown.shows("Port")
                shown.keys(port, "Enter")
                shown.shows("Default model")
                shown.keys("Enter")
                shown.shows("Max concurrent")
                shown.keys("Enter")
                fits(shown, shown.shows("ended with 0", "Then: python3"))
            assert oppi.config["port"] == int(port)

    def test_the_wizard_changes_nothing_when_it_is_left(self, oppi: Shell) -> None:  # noqa: F811
        oppi("init", "--yes")
        before = oppi.config_bytes()
        with show(oppi, "init", "--force") as shown:
            shown.shows("Port")
            shown.keys("7803", "Enter")
            shown.shows("Default model")
            shown.keys("C-c")
            shown.shows("ended with 1")
            assert "Traceback" not in shown.text()
        assert oppi.config_bytes() == before

    def test_serve_on_a_new_machine_shows_a_code_in_a_small_window(self, oppi: Shell) -> None:  # noqa: F811
        with show(oppi, "serve", "--host", "127.0.0.1", "--port", "0") as shown:
            text = shown.shows("App 1.0: pair --app 1.0")
            (code,) = codes(text)
            phone = Phone(f"http://127.0.0.1:{json.loads(code)['port']}")
            phone.pair(json.loads(code)["pairingToken"])
            assert phone.me()
            shown.keys("C-c")
            shown.shows("ended with 0")
