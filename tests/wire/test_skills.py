"""Skills, extensions and project folders: what is found, what is shown, and what a phone may change."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.phone import Phone, quote

from .rig import Rig, rig_with

SKILL404 = (404, {"error": "Skill not found"})
FILE404 = (404, {"error": "File not found"})
PATH400 = (400, {"error": "path parameter required"})
NAMES = "^[a-z][a-z0-9-]{0,63}$"
HARD_NAMES = ["my skill", "100%", "50%25", "größe", "a+b", "x|y", "日本", "a&b=c", "it's", "a%2Fb", "#1"]
SENTINEL = "outside of every skill"


@pytest.fixture(autouse=True)
def no_skills(rig: Rig) -> Iterator[None]:
    """Each test begins without any."""
    for folder in (pis(rig), agents(rig), own(rig), rig.server.agent_dir / "extensions"):
        shutil.rmtree(folder, ignore_errors=True)
    rig.phone().call("POST", "/skills/rescan")
    yield


@pytest.fixture(params=["1.0", "1.1"])
def phone(rig: Rig, request: pytest.FixtureRequest) -> Phone:
    return rig.phone(request.param)


def pis(rig: Rig) -> Path:
    return rig.server.agent_dir / "skills"


def agents(rig: Rig) -> Path:
    return rig.server.home / ".agents" / "skills"


def own(rig: Rig) -> Path:
    return rig.server.data / "skills"


def skill_text(description: str = "Does things", *, more: str = "", body: str = "") -> str:
    return f"---\ndescription: {description}\n{more}---\n{body}"


def add(folder: Path, name: str, text: str = "", **files: str | bytes) -> Path:
    """A skill on the disk; `files` by path with __ for / and _dot_ for a point."""
    place = folder / name
    place.mkdir(parents=True)
    (place / "SKILL.md").write_text(text or skill_text())
    for path, content in files.items():
        put(place / path.replace("__", "/").replace("_dot_", "."), content)
    return place


def put(path: Path, content: str | bytes = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def listed(phone: Phone) -> dict[str, Any]:
    return {skill["name"]: skill for skill in phone.call("GET", "/skills")["skills"]}


def content_of(phone: Phone, name: str, path: str = "SKILL.md") -> str:
    return str(phone.call("GET", f"/skills/{quote(name)}/file?path={path}")["content"])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestDiscovery:
    def test_a_skill_as_both_apps_decode_it(self, rig: Rig, phone: Phone) -> None:
        place = add(pis(rig), "tidy", skill_text("Tidies up"), scripts__run_dot_sh="echo")
        assert listed(phone) == {
            "tidy": {
                "name": "tidy", "description": "Tidies up", "path": str(place), "builtIn": True,
                "containerSafe": True, "hasScripts": True,
            }
        }  # fmt: skip

    def test_sorted_by_name(self, rig: Rig, phone: Phone) -> None:
        for folder, name in ((pis(rig), "zoo"), (own(rig), "middle"), (agents(rig), "ant"), (pis(rig), "bee")):
            add(folder, name)
        assert list(listed(phone)) == ["ant", "bee", "middle", "zoo"]

    def test_the_persons_own_hides_pis_which_hides_that_of_other_agents(self, rig: Rig) -> None:
        for folder, text in ((own(rig), "mine"), (pis(rig), "pi's"), (agents(rig), "other")):
            add(folder, "same", skill_text(text))
        for folder, text, built_in in ((own(rig), "mine", False), (pis(rig), "pi's", True), (agents(rig), "other", True)):
            found = listed(rig.phone())["same"]
            assert (found["description"], found["builtIn"]) == (text, built_in)
            shutil.rmtree(folder)
        assert listed(rig.phone()) == {}

    def test_subfolders_are_searched_but_not_those_of_a_skill(self, rig: Rig) -> None:
        add(pis(rig) / "group" / "more", "deep")
        add(pis(rig), "outer")
        add(pis(rig) / "outer", "inner")
        add(pis(rig) / ".hidden", "secret")
        add(pis(rig), ".dotted")
        add(add(pis(rig), "node_modules"), "package")
        add(own(rig), ".half-written.new")
        put(pis(rig) / "plain" / "README.md")
        assert set(listed(rig.phone())) == {"deep", "outer"}

    def test_links_are_followed_and_broken_ones_skipped(self, rig: Rig, tmp_path: Path) -> None:
        add(tmp_path, "elsewhere")
        pis(rig).mkdir(parents=True)
        (pis(rig) / "linked").symlink_to(tmp_path / "elsewhere")
        (pis(rig) / "broken").symlink_to(tmp_path / "nowhere")
        (pis(rig) / "loop").symlink_to(pis(rig))
        assert set(listed(rig.phone())) == {"linked"}

    @pytest.mark.parametrize(
        ("front", "name", "description"),
        [
            ("name: renamed\ndescription: plain", "renamed", "plain"),
            ("name: No Good\ndescription: kept", "folder", "kept"),
            ("name: -bad\ndescription: kept", "folder", "kept"),
            ("name: double--bad\ndescription: kept", "folder", "kept"),
            ('description: "double quoted"', "folder", "double quoted"),
            ("description: 'single quoted'", "folder", "single quoted"),
            ('description: Use "x" now', "folder", 'Use "x" now'),
            ("description: >\n  folded\n  lines", "folder", "folded lines"),
            ("description: |\n  kept\n  lines", "folder", "kept lines"),
            ("license: MIT\ndescription:   spaces   \nunknown: [1]", "folder", "spaces"),
        ],
    )
    def test_front_matter(self, rig: Rig, front: str, name: str, description: str) -> None:
        add(pis(rig), "folder", f"---\n{front}\n---\ntext\n")
        found = {key: " ".join(value["description"].split()) for key, value in listed(rig.phone()).items()}
        assert found == {name: description}

    @pytest.mark.parametrize(
        "text", ["", "no front matter\n", "---\nname: x\n---\n", "---\ndescription:\n---\n", "\n---\ndescription: late\n---\n"]
    )
    def test_without_a_description_there_is_no_skill(self, rig: Rig, text: str) -> None:
        add(pis(rig), "silent", text or " ")
        put(pis(rig) / "empty" / "other.md")
        (pis(rig) / "folder" / "SKILL.md").mkdir(parents=True)
        assert listed(rig.phone()) == {}

    @pytest.mark.parametrize(
        ("more", "body", "safe"),
        [
            ("", "", True),
            ("container: true\n", "tmux send-keys", True),
            ("container: false\n", "", False),
            ("container: yes\n", "", True),
            ("container: yes\n", "uses MLX", False),
            *(("", f"say {marker} here", False) for marker in ("MLX", "mlx", "lmstudio", "LM Studio", "/Users/", "homebrew")),
            *(("", f"say {marker} here", False) for marker in ("my-mac", "mac-mini", "tmux send-keys", "tmux new-window")),
            ("", "Homebrew tmux users/", True),
        ],
    )
    def test_what_works_in_a_container(self, rig: Rig, more: str, body: str, safe: bool) -> None:
        add(pis(rig), "skill", skill_text(more=more, body=body), other_dot_md="MLX homebrew")
        assert listed(rig.phone("1.0"))["skill"]["containerSafe"] is safe

    def test_scripts(self, rig: Rig) -> None:
        add(pis(rig), "full", scripts__a_dot_sh="x")
        add(pis(rig), "bare")
        (add(pis(rig), "empty") / "scripts").mkdir()
        add(pis(rig), "file", scripts="x")
        assert {name: s["hasScripts"] for name, s in listed(rig.phone()).items()} == {
            "full": True, "bare": False, "empty": False, "file": False,
        }  # fmt: skip

    def test_what_changes_is_seen_at_once(self, rig: Rig) -> None:
        phone = rig.phone()
        place = add(pis(rig), "living")
        assert "living" in listed(phone)
        (place / "SKILL.md").write_text(skill_text("Another description"))
        assert listed(phone)["living"]["description"] == "Another description"
        put(place / "scripts" / "new.sh")
        assert listed(phone)["living"]["hasScripts"] is True
        put(place / "a" / "deep" / "file.txt", "one")
        assert phone.call("GET", "/skills/living")["files"] == ["SKILL.md", "a/deep/file.txt", "scripts/new.sh"]
        put(place / "a" / "deep" / "file.txt", "two")
        assert content_of(phone, "living", "a/deep/file.txt") == "two"
        shutil.rmtree(place)
        assert listed(phone) == {} and phone.request("GET", "/skills/living") == SKILL404

    def test_a_rescan_tells_what_changed_since_the_last(self, rig: Rig) -> None:
        phone = rig.phone()
        for name in ("same", "deep", "gone"):
            add(pis(rig), name, a__b__c_dot_txt="old")
        assert phone.call("POST", "/skills/rescan")["changed"] == {
            "added": ["deep", "gone", "same"], "removed": [], "modified": [],
        }  # fmt: skip
        put(pis(rig) / "deep" / "a" / "b" / "c.txt", "new text")
        shutil.rmtree(pis(rig) / "gone")
        add(pis(rig), "fresh")
        answer = phone.call("POST", "/skills/rescan")
        assert answer["changed"] == {"added": ["fresh"], "removed": ["gone"], "modified": ["deep"]}
        assert [skill["name"] for skill in answer["skills"]] == ["deep", "fresh", "same"]
        assert phone.call("POST", "/skills/rescan")["changed"] == {"added": [], "removed": [], "modified": []}

    def test_no_method_but_post_rescans(self, rig: Rig) -> None:
        assert rig.phone().request("GET", "/skills/rescan") == SKILL404
        assert rig.phone().request("PUT", "/skills/rescan")[0] == 404

    def test_the_original_kept_them_in_another_folder(self, rig: Rig) -> None:
        """Whatever its data directory was."""
        old = rig.server.home / ".config" / "oppi" / "skills"
        place = add(old, "of-before", skill_text("Made with the original"))
        found = listed(rig.phone())["of-before"]
        assert (found["builtIn"], found["path"]) == (False, str(place))
        rig.phone().call("PUT", "/me/skills/of-before", {"files": {"new.txt": "x"}})
        assert "new.txt" in tree(own(rig) / "of-before") and "new.txt" not in tree(place)
        shutil.rmtree(old)

    def test_a_workspace_may_name_any_of_them_and_no_other(self, rig: Rig, phone: Phone) -> None:
        for folder, name in ((pis(rig), "pis-skill"), (own(rig), "own-skill"), (agents(rig), "an-agents")):
            add(folder, name)
        names = ["pis-skill", "own-skill", "an-agents"]
        made = phone.create_workspace("Skilled", skills=names)
        assert made["skills"] == names
        body = {"name": "x", "skills": [*names, "no-such"]}
        assert phone.request("POST", "/workspaces", body) == (400, {"error": "Unknown skills: no-such"})
        phone.call("DELETE", f"/workspaces/{made['id']}")


class TestDetail:
    def test_a_skill_with_its_files(self, rig: Rig, phone: Phone) -> None:
        text = skill_text("With files", body="# Größe\n")
        place = add(pis(rig), "full", text, b_dot_txt="b", a__z_dot_txt="z", a__b__c_dot_md="c")
        for name in (
            "__pycache__",
            "node_modules",
            ".git",
            ".venv",
            ".mypy_cache",
            ".pytest_cache",
            ".ruff_cache",
            "__pypackages__",
        ):
            put(place / name / "junk.txt")
        for name in ("x.pyc", "x.pyo", "x.o", "x.so", "x.dylib"):
            put(place / "a" / name)
        answer = phone.call("GET", "/skills/full")
        assert answer["skill"]["description"] == "With files" and answer["content"] == text
        assert answer["files"] == ["SKILL.md", "a/b/c.md", "a/z.txt", "b.txt"]

    def test_the_list_of_files_is_bounded_and_stays_inside(self, rig: Rig, tmp_path: Path) -> None:
        put(tmp_path / "secret.txt", SENTINEL)
        place = add(pis(rig), "wide")
        (place / "out").symlink_to(tmp_path)
        (place / "out.txt").symlink_to(tmp_path / "secret.txt")
        (place / "self").symlink_to(place)
        (place / "good.txt").symlink_to(place / "SKILL.md")
        os.mkfifo(place / "pipe")
        assert rig.phone().call("GET", "/skills/wide")["files"] == ["SKILL.md", "good.txt"]
        for number in range(1100):
            put(place / "many" / f"{number:04}.txt")
        put(place / "/".join("d" * 40) / "deep.txt")
        files = rig.phone().call("GET", "/skills/wide")["files"]
        assert len(files) == 1000 and not any("deep.txt" in path for path in files)

    @pytest.mark.parametrize("name", HARD_NAMES)
    def test_names_that_have_to_be_escaped(self, rig: Rig, phone: Phone, name: str) -> None:
        if "/" not in name:
            add(pis(rig), name, skill_text(f"This is {len(name)}"), sub__f_dot_txt="hello")
        assert name in listed(phone)
        detail = phone.call("GET", f"/skills/{quote(name)}")
        assert detail["skill"]["name"] == name and detail["files"] == ["SKILL.md", "sub/f.txt"]
        assert content_of(phone, name, "sub/f.txt") == "hello"
        assert phone.call("GET", f"/me/skills/{quote(name)}")["skill"]["name"] == name

    def test_unknown_names(self, rig: Rig, phone: Phone) -> None:
        add(pis(rig), "known")
        for name in ("nope", "KNOWN", "known%20", "..%2Fskills%2Fknown", "..", "%00", "known%00", "x" * 5000):
            assert phone.request("GET", f"/skills/{name}") == SKILL404
            assert phone.request("GET", f"/skills/{name}/file?path=SKILL.md") == SKILL404
            assert phone.request("GET", f"/me/skills/{name}") == SKILL404


class TestFile:
    @pytest.mark.parametrize("query", ["", "?", "?path=", "?path=%20", "?paths=x", "?name=x"])
    def test_a_path_is_required(self, rig: Rig, phone: Phone, query: str) -> None:
        add(pis(rig), "skill")
        assert phone.request("GET", "/skills/skill/file" + query) == PATH400
        assert phone.request("GET", "/me/skills/skill/files" + query) == PATH400

    @pytest.mark.parametrize("path", ["a b.txt", "a+b.txt", "a&b=c.txt", "50%.txt", "größe.txt", "sub/x?.txt", "a=b.txt"])
    def test_names_as_the_app_sends_them(self, rig: Rig, path: str) -> None:
        put(add(pis(rig), "skill") / path, f"this is {path}")
        plain = path.replace("%", "%25").replace(" ", "%20").replace("ö", "%C3%B6").replace("ß", "%C3%9F")
        assert content_of(rig.phone("1.0"), "skill", plain) == f"this is {path}"
        assert content_of(rig.phone("1.1"), "skill", quote(path).replace("+", "%2B")) == f"this is {path}"
        assert rig.phone().call("GET", f"/me/skills/skill/files?path={plain}") == {"content": f"this is {path}"}

    def test_a_plus_is_first_taken_as_it_is_and_then_as_a_space(self, rig: Rig) -> None:
        place = add(pis(rig), "skill")
        put(place / "a b.txt", "space")
        assert content_of(rig.phone(), "skill", "a+b.txt") == "space"
        put(place / "a+b.txt", "plus")
        assert content_of(rig.phone(), "skill", "a+b.txt") == "plus"

    def test_everything_else_is_not_found(self, rig: Rig, phone: Phone, tmp_path: Path) -> None:
        secret = put(tmp_path / "secret.txt", SENTINEL)
        place = add(pis(rig), "skill", sub__x_dot_txt="x", big=b"a" * (1 << 20), bigger=b"a" * ((1 << 20) + 1))
        put(place / "binary", b"ab\0cd")
        put(place / "latin", "gr\xfcn".encode("latin-1"))
        put(pis(rig) / "skill-two" / "x.txt", SENTINEL)
        (place / "link").symlink_to(secret)
        (place / "folder").symlink_to(tmp_path)
        os.mkfifo(place / "pipe")
        assert len(content_of(phone, "skill", "big")) == 1 << 20
        assert content_of(phone, "skill", "latin") == "gr\ufffdn"
        for path in (
            *(
                "nope",
                "sub",
                ".",
                "..",
                "/",
                "bigger",
                "binary",
                "link",
                "folder/secret.txt",
                "pipe",
                "sub/../../skill-two/x.txt",
            ),
            *(str(secret), "../skill-two/x.txt", "..%2Fskill-two%2Fx.txt", "x%00", "%2e%2e/skill-two/x.txt", "sub/x.txt/y"),
            *("a" * 300, "a/" * 3000),
        ):
            assert phone.request("GET", f"/skills/skill/file?path={path}") == FILE404, path

    def test_bytes_that_are_no_utf8_name_no_file(self, rig: Rig) -> None:
        add(pis(rig), "skill")
        assert rig.phone().request("GET", "/skills/skill/file?path=%FF")[0] in (400, 404)


class TestOwn:
    def test_a_new_one_is_stored_privately_and_seen_at_once(self, rig: Rig, phone: Phone) -> None:
        text = skill_text("Made on a phone")
        body = {"content": text, "files": {"scripts/run.sh": "#!/bin/sh\necho hi\n", "notes/größe.md": "groß"}}
        made = phone.call("PUT", "/me/skills/mine", body)["skill"]
        place = own(rig) / "mine"
        assert made == listed(phone)["mine"] and made["builtIn"] is False and made["path"] == str(place)
        assert tree(place) == {
            "SKILL.md": text.encode(), "scripts/run.sh": b"#!/bin/sh\necho hi\n", "notes/größe.md": "groß".encode(),
        }  # fmt: skip
        modes = {str(p.relative_to(place)): stat.S_IMODE(p.stat().st_mode) for p in (place, *place.rglob("*"))}
        assert modes == {
            ".": 0o700, "SKILL.md": 0o600, "scripts": 0o700, "scripts/run.sh": 0o700, "notes": 0o700, "notes/größe.md": 0o600,
        }  # fmt: skip
        assert content_of(phone, "mine", "notes/gr%C3%B6%C3%9Fe.md") == "groß"
        assert os.listdir(own(rig)) == ["mine"]

    def test_one_file_of_it_can_be_saved_alone(self, rig: Rig) -> None:
        phone = rig.phone("1.0")
        phone.call("PUT", "/me/skills/mine", {"content": skill_text(), "files": {"a.txt": "a", "b.txt": "b"}})
        phone.call("PUT", "/me/skills/mine", {"files": {"b.txt": "B", "c.txt": "c"}})
        phone.call("PUT", "/me/skills/mine", {"content": skill_text("New")})
        assert tree(own(rig) / "mine") == {"SKILL.md": skill_text("New").encode(), "a.txt": b"a", "b.txt": b"B", "c.txt": b"c"}
        assert listed(phone)["mine"]["description"] == "New"

    def test_one_of_pis_is_copied_and_never_written(self, rig: Rig, phone: Phone) -> None:
        place = add(pis(rig), "shared", skill_text("pi's"), a_dot_txt="a")
        before = tree(pis(rig))
        made = phone.call("PUT", "/me/skills/shared", {"files": {"b.txt": "b"}})["skill"]
        assert made["builtIn"] is False and made["path"] == str(own(rig) / "shared")
        assert tree(own(rig) / "shared") == {"SKILL.md": skill_text("pi's").encode(), "a.txt": b"a", "b.txt": b"b"}
        assert tree(pis(rig)) == before
        assert phone.request("DELETE", "/me/skills/shared") == (204, None)
        assert listed(phone)["shared"]["path"] == str(place) and tree(pis(rig)) == before

    @pytest.mark.parametrize(
        ("name", "body", "problem"),
        [
            ("fresh", {}, "content (SKILL.md) required"),
            ("fresh", {"content": ""}, "content (SKILL.md) required"),
            ("fresh", {"content": " \n"}, "content (SKILL.md) required"),
            ("fresh", {"content": 7}, "content (SKILL.md) required"),
            ("fresh", {"content": None, "files": {"SKILL.md": skill_text()}}, "content (SKILL.md) required"),
            ("fresh", {"files": {"a.txt": "a"}}, "content (SKILL.md) required"),
            ("old", {"content": ["x"], "files": {"a.txt": "a"}}, "content (SKILL.md) required"),
            ("old", {"files": {}}, "content (SKILL.md) required"),
            ("old", {"files": {"../x": "x"}}, "Invalid file path: ../x"),
            ("old", {"files": {"good.txt": "x", "a/../b": "x"}}, "Invalid file path: a/../b"),
            ("old", {"files": {"/etc/x": "x"}}, "Invalid file path: /etc/x"),
            ("old", {"files": {"": "x"}}, "Invalid file path: "),
            ("old", {"files": {"a//b": "x"}}, "Invalid file path: a//b"),
            ("old", {"files": {"..": "x"}}, "Invalid file path: .."),
            ("Fresh", {"content": skill_text()}, f'Invalid skill name "Fresh" — must match {NAMES}'),
            ("-x", {"content": skill_text()}, f'Invalid skill name "-x" — must match {NAMES}'),
            ("1x", {"content": skill_text()}, f'Invalid skill name "1x" — must match {NAMES}'),
            ("a" * 65, {"content": skill_text()}, f'Invalid skill name "{"a" * 65}" — must match {NAMES}'),
            ("a b", {"content": skill_text()}, f'Invalid skill name "a b" — must match {NAMES}'),
            ("../x", {"content": skill_text()}, f'Invalid skill name "../x" — must match {NAMES}'),
            ("a\n", {"content": skill_text()}, None),
            ("old", {"content": "no front matter"}, None),
            ("old", {"files": {"SKILL.md": "---\nname: x\n---\n"}}, None),
            ("old", {"files": {"a.txt": 7}}, None),
            ("old", {"files": ["a.txt"]}, None),
            ("old", {"files": {"a\u0000b": "x"}}, None),
            ("old", {"files": {"x.txt": "a" * 102_400}}, None),
        ],
    )  # fmt: skip
    def test_what_is_refused_changes_nothing(self, rig: Rig, phone: Phone, name: str, body: Any, problem: str | None) -> None:
        phone.call("PUT", "/me/skills/old", {"content": skill_text(), "files": {"a.txt": "kept"}})
        before = tree(rig.server.data / "skills")
        status, answer = phone.request("PUT", f"/me/skills/{quote(name)}", body)
        assert (status, answer["error"]) == (400, problem or answer["error"])
        assert tree(rig.server.data / "skills") == before and os.listdir(own(rig)) == ["old"]

    def test_size_and_number(self, rig: Rig, phone: Phone) -> None:
        text = skill_text()
        exact = {"content": text, "files": {"x.txt": "a" * (102_400 - len(text))}}
        assert phone.request("PUT", "/me/skills/mine", exact)[0] == 200
        over = {"content": text, "files": {"x.txt": "a" * (102_401 - len(text))}}
        assert phone.request("PUT", "/me/skills/mine", over) == (400, {"error": "Skill too large: 100.0KB (max 100KB)"})
        full = {"content": text, "files": {f"{n}.txt": "x" for n in range(49)}}
        assert phone.request("PUT", "/me/skills/many", full)[0] == 200
        assert phone.request("PUT", "/me/skills/many", {"files": {"one-more.txt": "x"}}) == (
            400, {"error": "Too many files: 51 (max 50)"},
        )  # fmt: skip

    def test_a_file_cannot_be_a_folder_too(self, rig: Rig) -> None:
        phone = rig.phone()
        phone.call("PUT", "/me/skills/mine", {"content": skill_text(), "files": {"a": "kept"}})
        status, answer = phone.request("PUT", "/me/skills/mine", {"files": {"a/b": "x"}})
        assert status == 500 and answer["error"].startswith("Failed to write skill: ")
        assert tree(own(rig)) == {"mine/SKILL.md": skill_text().encode(), "mine/a": b"kept"}
        assert os.listdir(own(rig)) == ["mine"]

    def test_a_link_in_a_skill_leads_no_write_outside(self, rig: Rig, tmp_path: Path) -> None:
        place = add(own(rig), "mine")
        (place / "out").symlink_to(tmp_path)
        put(tmp_path / "target.txt", "before")
        (place / "link.txt").symlink_to(tmp_path / "target.txt")
        rig.phone().call("PUT", "/me/skills/mine", {"files": {"out/new.txt": "x", "link.txt": "x"}})
        assert tree(tmp_path) == {"target.txt": b"before"}
        assert tree(own(rig) / "mine") == {"SKILL.md": skill_text().encode(), "out/new.txt": b"x", "link.txt": b"x"}

    def test_the_list_says_where_a_skill_is_used(self, rig: Rig, phone: Phone) -> None:
        add(pis(rig), "pis-skill")
        phone.call("PUT", "/me/skills/mine", {"content": skill_text(), "files": {"a.txt": "12345"}})
        wid = phone.create_workspace("Uses", skills=["mine"])["id"]
        found = {skill["name"]: skill for skill in phone.call("GET", "/me/skills")["skills"]}
        assert found["pis-skill"] == {**listed(phone)["pis-skill"], "enabledIn": []}
        mine = found["mine"]
        assert mine["enabledIn"] == [wid] and mine["builtIn"] is False and mine["path"] == str(own(rig) / "mine")
        assert mine["sizeBytes"] == len(skill_text()) + 5
        assert isinstance(mine["createdAt"], int)
        assert abs(mine["createdAt"] - (own(rig) / "mine").stat().st_mtime * 1000) < 2
        phone.call("DELETE", f"/workspaces/{wid}")

    def test_deleting(self, rig: Rig, phone: Phone) -> None:
        add(pis(rig), "pis-skill")
        phone.call("PUT", "/me/skills/mine", {"content": skill_text()})
        assert phone.request("DELETE", "/me/skills/pis-skill") == (403, {"error": "Cannot delete built-in skill"})
        assert phone.request("DELETE", "/me/skills/nope") == SKILL404
        assert phone.request("DELETE", "/me/skills/mine") == (204, None)
        assert phone.request("DELETE", "/me/skills/mine") == SKILL404
        assert set(listed(phone)) == {"pis-skill"} and os.listdir(own(rig)) == []

    def test_a_link_to_a_skill_is_removed_and_not_what_it_leads_to(self, rig: Rig, tmp_path: Path) -> None:
        add(tmp_path, "elsewhere", a_dot_txt="kept")
        own(rig).mkdir()
        (own(rig) / "linked").symlink_to(tmp_path / "elsewhere")
        before = tree(tmp_path)
        assert rig.phone().raw("DELETE", "/me/skills/linked").status == 204
        assert tree(tmp_path) == before and not list(own(rig).iterdir())

    def test_those_that_do_not_exist_any_more_leave_the_workspace(self, rig: Rig) -> None:
        phone = rig.phone("1.1")
        phone.call("PUT", "/me/skills/mine", {"content": skill_text()})
        wid = phone.create_workspace("Uses", skills=["mine"])["id"]
        phone.request("DELETE", "/me/skills/mine")
        assert phone.call("GET", f"/workspaces/{wid}")["workspace"]["skills"] == []
        phone.call("DELETE", f"/workspaces/{wid}")


class TestFromSession:
    @pytest.fixture
    def made(self, rig: Rig) -> Iterator[tuple[Path, str]]:
        """(work root, session id)."""
        for path in rig.server.workspace.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        yield rig.server.workspace, rig.session()[1]

    def test_a_folder_becomes_a_skill(self, rig: Rig, phone: Phone, made: tuple[Path, str], tmp_path: Path) -> None:
        root, sid = made
        put(tmp_path / "secret.txt", SENTINEL)
        place = add(root, "tool", skill_text("From work"), scripts__a_dot_sh="#!/bin/sh\n", _dot_git__config="x")
        (place / "out.txt").symlink_to(tmp_path / "secret.txt")
        (place / "out").symlink_to(tmp_path)
        before = tree(root)
        made_skill = phone.call("POST", "/me/skills", {"name": "tool", "sessionId": sid}, expect=201)["skill"]
        assert made_skill == listed(phone)["tool"] and made_skill["hasScripts"] is True
        assert tree(own(rig) / "tool") == {"SKILL.md": skill_text("From work").encode(), "scripts/a.sh": b"#!/bin/sh\n"}
        assert tree(root) == before

    def test_from_another_path_over_what_was_there(self, rig: Rig, made: tuple[Path, str]) -> None:
        root, sid = made
        phone = rig.phone()
        phone.call("PUT", "/me/skills/named", {"content": skill_text("Old"), "files": {"old.txt": "x"}})
        add(root / "deep" / "er", "folder", skill_text("New"))
        for path in ("deep/er/folder", str(root / "deep/er/folder"), "deep/../deep/er/folder"):
            phone.call("POST", "/me/skills", {"name": "named", "sessionId": sid, "path": path}, expect=201)
            assert tree(own(rig)) == {"named/SKILL.md": skill_text("New").encode()}

    def test_refusals(self, rig: Rig, phone: Phone, made: tuple[Path, str], tmp_path: Path) -> None:
        root, sid = made
        add(tmp_path, "outside", skill_text("Outside"))
        add(root, "good")
        put(root / "bare" / "README.md")
        put(root / "file")
        add(root, "silent", "---\nname: x\n---\n")
        add(root, "large", big=b"a" * 102_400)
        for number in range(50):
            put(add(root, "many", str(number)) / "x" if number == 0 else root / "many" / f"{number}.txt")
        (root / "link").symlink_to(tmp_path / "outside")
        size = (102_400 + len(skill_text())) / 1024
        for body, status, problem in (
            ({}, 400, "name required"),
            ({"name": "", "sessionId": sid}, 400, "name required"),
            ({"name": 7, "sessionId": sid}, 400, "name required"),
            ({"name": "good"}, 400, "sessionId required"),
            ({"name": "good", "sessionId": None}, 400, "sessionId required"),
            ({"name": "good", "sessionId": "nothere1"}, 404, "Session not found"),
            ({"name": "nope", "sessionId": sid}, 404, "Source directory not found"),
            ({"name": "file", "sessionId": sid}, 404, "Source directory not found"),
            ({"name": "x", "sessionId": sid, "path": "a\0b"}, 400, "path holds a NUL"),
            ({"name": "outside", "sessionId": sid, "path": ".."}, 403, "Path outside workspace"),
            ({"name": "outside", "sessionId": sid, "path": str(tmp_path / "outside")}, 403, "Path outside workspace"),
            ({"name": "outside", "sessionId": sid, "path": str(root) + "-x"}, 403, "Path outside workspace"),
            ({"name": "link", "sessionId": sid}, 403, "Path outside workspace"),
            ({"name": "No Good", "sessionId": sid, "path": "good"}, 400, f'Invalid skill name "No Good" — must match {NAMES}'),
            ({"name": "bare", "sessionId": sid}, 400, "SKILL.md not found in source directory"),
            ({"name": "large", "sessionId": sid}, 400, f"Skill too large: {size:.1f}KB (max 100KB)"),
            ({"name": "many", "sessionId": sid}, 400, "Too many files: 51 (max 50)"),
            ({"name": "silent", "sessionId": sid}, 400, None),
        ):
            answer = phone.request("POST", "/me/skills", body)
            assert (answer[0], answer[1]["error"]) == (status, problem or answer[1]["error"]), body
        assert not own(rig).exists() or os.listdir(own(rig)) == []

    def test_secrets_of_the_project_do_not_become_part_of_a_skill(self, rig: Rig, made: tuple[Path, str]) -> None:
        root, sid = made
        add(root, "leaky", _dot_env=f"KEY={SENTINEL}")
        rig.phone().request("POST", "/me/skills", {"name": "leaky", "sessionId": sid})
        assert SENTINEL.encode() not in b"".join(tree(rig.server.data / "skills").values())

    def test_a_workspace_whose_folder_is_gone(self, rig: Rig, tmp_path: Path) -> None:
        phone = rig.phone("1.0")
        mount = tmp_path / "mount"
        mount.mkdir()
        wid = phone.create_workspace("Gone", hostMount=str(mount), policyPreset="host")["id"]
        sid = phone.create_session(wid)["id"]
        rig.made.append((wid, sid))
        mount.rmdir()
        body = {"name": "x", "sessionId": sid}
        assert phone.request("POST", "/me/skills", body) == (404, {"error": "No workspace root for session"})


def test_own_skills_survive_a_restart(tmp_path: Path) -> None:
    with rig_with(tmp_path) as rig:
        phone = rig.phone("1.0")
        phone.call("PUT", "/me/skills/mine", {"content": skill_text("Mine")})
        wid = phone.create_workspace("Uses", skills=["mine"])["id"]
        rig.server.stop()
        rig.server.start()
        assert listed(phone)["mine"]["description"] == "Mine"
        assert phone.call("PUT", f"/workspaces/{wid}", {"skills": ["mine"]})["workspace"]["skills"] == ["mine"]


def test_the_command_line_lists_and_shows_them(rig: Rig) -> None:
    add(pis(rig), "my skill", skill_text("pi's \x1b[31mred", body="# Text\n"), scripts__a_dot_sh="x")
    rig.phone().call("PUT", "/me/skills/mine", {"content": skill_text("Own one")})
    done = rig.server.cli("skills", "list")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and "\x1b" not in done.stdout
    assert [line.split()[0] for line in lines] == ["mine", "my"] and "Own one" in lines[0] and "own" in lines[0]
    shown = json.loads(rig.server.cli("skills", "list", "--json").stdout)["skills"]
    assert shown == list(listed(rig.phone()).values())
    detail = rig.server.cli("skills", "show", "my skill")
    assert detail.returncode == 0 and "# Text" in detail.stdout and "scripts/a.sh" in detail.stdout
    assert "\x1b" not in detail.stdout
    assert json.loads(rig.server.cli("skills", "show", "my skill", "--json").stdout) == rig.phone().call(
        "GET", "/skills/my%20skill"
    )
    unknown = rig.server.cli("skills", "show", "nope")
    assert unknown.returncode == 1 and "nope" in unknown.stderr and len(unknown.stderr.splitlines()) == 1
    assert rig.server.cli("skills", "show").returncode == 1


class TestExtensions:
    def test_what_pi_could_load(self, rig: Rig, phone: Phone, tmp_path: Path) -> None:
        folder = rig.server.agent_dir / "extensions"
        assert phone.call("GET", "/extensions") == {"extensions": []}
        for path in ("zeta.ts", "beta.js", "both.ts", "both/index.ts", "dir/package.json", "dir.v2/index.js"):
            put(folder / path, "{}")
        for path in (".hidden.ts", "note.md", "bad name.ts", "-dash.ts", "permission-gate.ts", "permission-gate/index.ts"):
            put(folder / path, "{}")
        put(folder / ("x" * 65 + ".ts"))
        (folder / "empty").mkdir()  # pi ends at its start if it is told to load this
        (folder / "broken.ts").symlink_to(folder / "nowhere.ts")
        found = phone.call("GET", "/extensions")["extensions"]
        assert [(e["name"], e["kind"], Path(e["path"]).name) for e in found] == [
            ("beta", "file", "beta.js"), ("both", "directory", "both"), ("dir", "directory", "dir"),
            ("dir.v2", "directory", "dir.v2"), ("zeta", "file", "zeta.ts"),
        ]  # fmt: skip
        assert all(Path(e["path"]).parent == folder and e["source"] == "pi" for e in found)


class TestHostDirectories:
    def folders(self, phone: Phone, root: Any) -> dict[str, Any]:
        found = phone.call("GET", f"/host/directories?root={quote(str(root))}")["directories"]
        return {entry["name"]: entry for entry in found}

    @pytest.mark.parametrize(
        ("files", "kind", "language"),
        [
            ("package.json tsconfig.json", "node", "TypeScript"), ("package.json", "node", "JavaScript"),
            ("Cargo.toml", "rust", "Rust"), ("pyproject.toml", "python", "Python"), ("go.mod", "go", "Go"),
            ("Gemfile", "ruby", "Ruby"), ("build.gradle", "gradle", "Java"), ("pom.xml", "maven", "Java"),
            ("Package.swift", "swift", "Swift"), ("project.yml", "xcodegen", "Swift"), ("mix.exs", "elixir", "Elixir"),
            ("Makefile", "make", None), ("Makefile go.mod Cargo.toml", "rust", "Rust"), ("AGENTS.md", None, None),
            ("AGENTS.md Makefile", "make", None),
        ],
    )  # fmt: skip
    def test_kinds_of_projects(self, rig: Rig, tmp_path: Path, files: str, kind: Any, language: Any) -> None:
        for name in files.split():
            put(tmp_path / "project" / name)
        entry = self.folders(rig.phone(), tmp_path)["project"]
        assert (entry.get("projectType"), entry.get("language")) == (kind, language)
        assert entry["isGitRepo"] is False and entry["hasAgentsMd"] is ("AGENTS.md" in files)
        assert entry["path"] == str(tmp_path / "project") and "gitRemote" not in entry

    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("https://github.com/one/two.git", "github.com/one/two"),
            ("https://github.com/one/two", "github.com/one/two"),
            ("git@github.com:one/two.git", "github.com/one/two"),
            ("ssh://git@example.org:2222/one/two.git", "example.org/one/two"),
            ("https://user:hunter2@example.org/one.git", "example.org/one"),
        ],
    )
    def test_where_a_repository_comes_from(self, rig: Rig, tmp_path: Path, url: str, shown: str) -> None:
        config = f'[core]\n\tbare = false\n[remote "other"]\n\turl = x\n[remote "origin"]\n\tfetch = +a\n\turl = {url}\n'
        put(tmp_path / "repo" / ".git" / "config", config)
        entry = self.folders(rig.phone(), tmp_path)["repo"]
        assert entry["isGitRepo"] is True and entry["gitRemote"] == shown

    def test_only_visible_folders_with_something_in_them_directly_below(self, rig: Rig, tmp_path: Path) -> None:
        for path in ("good/.git/HEAD", ".hidden/Makefile", "plain/file.txt", "deep/er/Makefile", "Makefile"):
            put(tmp_path / path)
        put(tmp_path / "worktree" / ".git", "gitdir: /elsewhere\n")
        assert set(self.folders(rig.phone(), tmp_path)) == {"good", "worktree"}
        assert self.folders(rig.phone(), tmp_path / "nowhere") == self.folders(rig.phone(), tmp_path / "Makefile") == {}

    def test_the_usual_places_are_searched_without_a_root(self, rig: Rig, phone: Phone) -> None:
        home = rig.server.home
        for name in ("workspace", "projects", "src", "code", "Developer", "elsewhere"):
            put(home / name / f"in-{name}" / "AGENTS.md")
        entries = phone.call("GET", "/host/directories")["directories"]
        names = ["workspace", "projects", "src", "code", "Developer"]
        assert [(e["path"], e["name"]) for e in entries] == [(f"~/{name}/in-{name}", f"in-{name}") for name in names]
        assert [e["name"] for e in phone.call("GET", "/host/directories?root=~/elsewhere")["directories"]] == ["in-elsewhere"]
