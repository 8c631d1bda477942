"""A real terminal: a command inside tmux, what its screen shows, and the QR codes a phone would see there."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import zxingcpp

from .tools import apt_install, locked

PIXELS = 6  # of the screen for one module
HALVES = {" ": 0, "▀": 1, "▄": 2, "█": 3}
# Unicode 13, "Symbols for Legacy Computing": BLOCK SEXTANT-1 is U+1FB00, and so on without the four shapes it had before
SEXTANTS = {" ": 0, "▌": 21, "▐": 42, "█": 63}
SEXTANTS.update({chr(0x1FB00 + at): n for at, n in enumerate(n for n in range(1, 63) if n not in (21, 42))})


class Screen:
    """A window of tmux; it stays when its command has ended."""

    def __init__(self, folder: Path, columns: int, lines: int) -> None:
        self.socket = str(folder / "tmux")
        self.size = ["-x", str(columns), "-y", str(lines)]

    def tmux(self, *words: str) -> str:
        command = ["tmux", "-S", self.socket, "-f", os.devnull, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout

    def open(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        names = [f"{name}={value}" for name, value in env.items()]
        line = f"env -i {shlex.join(names)} {shlex.join(command)}; echo \"ended with $?\"; exec cat"
        self.tmux("new-session", "-d", *self.size, line)

    def text(self, *how: str) -> str:
        """What the window shows now."""
        return self.tmux("capture-pane", "-p", *how)

    def shows(self, *words: str, limit: float = 30) -> str:
        """The window, once it shows all of these."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            text = self.text()
            if all(word in text for word in words):
                return text
            time.sleep(0.02)
        raise AssertionError(f"{words} not shown within {limit} s:\n{self.text()}")

    def keys(self, *keys: str) -> None:
        self.tmux("send-keys", *keys)


@contextlib.contextmanager
def screen(command: Sequence[str], env: Mapping[str, str], columns: int = 80, lines: int = 24) -> Iterator[Screen]:
    """Runs a command in a window of a terminal of its own."""
    if not shutil.which("tmux"):
        with locked("tmux"):
            apt_install("tmux")
    with tempfile.TemporaryDirectory() as folder:
        shown = Screen(Path(folder), columns, lines)
        utf8 = {"TERM": "screen-256color", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}
        try:
            shown.open(command, {**env, **utf8})
            yield shown
        finally:
            with contextlib.suppress(subprocess.CalledProcessError):
                shown.tmux("kill-server")


def codes(text: str) -> list[str]:
    """The texts of the QR codes drawn in a screen."""
    found: list[str] = []
    for glyphs, wide, high in ((HALVES, 1, 2), (SEXTANTS, 2, 3)):
        found += read_codes(pixels(text.splitlines(), glyphs, wide, high))
    return sorted(set(found))


def pixels(lines: list[str], glyphs: Mapping[str, int], wide: int, high: int) -> memoryview:
    """A picture of the screen, black where a character is; any other character is light."""
    columns = max(map(len, lines), default=1)
    rows: list[bytes] = []
    for line in lines:
        cells = [glyphs.get(character, 0) for character in line.ljust(columns)]
        for y in range(high):
            dark = [cell >> (y * wide + x) & 1 for cell in cells for x in range(wide)]
            rows += [b"".join((b"\xff", b"\0")[bit] * PIXELS for bit in dark)] * PIXELS
    light = [b"\xff" * len(rows[0])] * (4 * PIXELS)
    picture = [*light, *rows, *light]
    return memoryview(b"".join(picture)).cast("B", (len(picture), len(picture[0])))


def read_codes(picture: memoryview) -> list[str]:
    """What a QR reader finds in a grey picture of (rows, columns)."""
    return [code.text for code in zxingcpp.read_barcodes(picture) if str(code.format).endswith(("QRCode", "QR Code"))]
