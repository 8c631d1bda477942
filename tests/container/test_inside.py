"""What a container is made with, what can be seen and changed from inside, and what an agent there may try."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.container.boxed import Boxed, boxed_with, eventually, together
from tests.support.phone import quote

CANARY = "canary-4711-never-inside"


def write_skill(boxed: Boxed, name: str, **files: str) -> Path:
    folder = boxed.server.agent_dir / "skills" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "SKILL.md").write_text(f"---\nname: {name}\ndescription: What {name} is for\n---\n# {name}\n")
    for path, text in files.items():
        target = folder / path.replace("__", "/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(0o755)
    return folder


def write_extension(boxed: Boxed, name: str, text: str = "export default () => {}\n") -> Path:
    folder = boxed.server.agent_dir / "extensions" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.ts").write_text(text)
    return folder


@pytest.fixture(scope="module")
def module_boxed(own_network: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Boxed]:
    secrets = {"ANTHROPIC_API_KEY": CANARY, "OPENROUTER_API_KEY": CANARY, "GITHUB_TOKEN": CANARY}
    with boxed_with(tmp_path_factory.mktemp("inside"), env=secrets) as rig:
        (rig.server.agent_dir / "auth.json").write_text(json.dumps({"anthropic": {"type": "api_key", "key": CANARY}}))
        (rig.server.agent_dir / "settings.json").write_text(json.dumps({"defaultThinkingLevel": "low", "shellPath": CANARY}))
        write_skill(rig, "search", scripts__search="#!/bin/sh\necho searched\n")
        write_skill(rig, "fetch", scripts__fetch="#!/bin/sh\necho fetched\n")
        write_skill(rig, "plain", deep__er__notes="first")
        write_skill(rig, "unchosen")
        write_extension(rig, "helper")
        yield rig


# -- the container -----------------------------------------------------------------------------------------------------


def test_a_container_has_only_what_it_needs(boxed: Boxed) -> None:
    wid, _ = boxed.started()
    found = boxed.configuration(wid)
    assert found["readOnly"] and found["useInit"] and found["capDrop"] == ["ALL"] and not found["capAdd"]
    assert found["initProcess"]["user"] == {"id": {"uid": 1001, "gid": 1001}}
    limits = {limit["limit"]: (limit["soft"], limit["hard"]) for limit in found["initProcess"]["rlimits"]}
    assert sorted(kind.rpartition("_")[2].lower() for kind in limits) == ["nofile", "nproc"]
    assert found["resources"]["cpus"] == 4 and found["resources"]["memoryInBytes"] == 2048 * 2**20
    assert not found["ssh"] and not found["publishedPorts"] and not found["publishedSockets"] and not found["virtualization"]
    mounts = {mount["destination"]: mount for mount in found["mounts"]}
    assert sorted(path for path, mount in mounts.items() if "tmpfs" in mount["type"]) == ["/home/pi", "/run", "/tmp"]
    shared = {path: (mount["source"], mount["options"]) for path, mount in mounts.items() if "virtiofs" in mount["type"]}
    own = boxed.folder(wid)
    assert shared == {
        "/work": (str(own / "workspace"), []),
        "/oppi/sessions": (str(own / "sessions"), []),
        "/cache": (str(own / "cache"), []),
        "/oppi/guard": (str(own / "guard"), ["ro"]),
    }
    assert found["labels"]["oppi.workspace"] == wid and found["labels"]["oppi.owner"]
    assert [net["network"] for net in found["networks"]] == [f"oppi-{found['labels']['oppi.owner']}"]
    assert re.fullmatch(r"oppi-[0-9a-f]{10}-" + re.escape(wid), boxed.name(wid))
    for folder in (own, own / "workspace", own / "sessions", own / "guard"):
        assert folder.stat().st_mode & 0o777 == 0o700, folder


def test_nothing_of_the_servers_environment_is_spoken_or_inside(boxed: Boxed) -> None:
    wid, _ = boxed.started()
    assert CANARY not in boxed.apple.spoken()
    for entry in boxed.apple.log():
        assert set(entry["env"]) - {"OPPI_SESSION", "OPPI_OWNER", "OPPI_EPOCH", "LC_CTYPE", "PWD"} <= {"HOME", "PATH"}, entry
    everything = "cat /proc/*/environ /proc/*/cmdline; find / -xdev -type f -size -100k 2>/dev/null | head -0; "
    everything += "find /oppi /work /cache /tmp /home /run -type f -exec cat {} + 2>/dev/null"
    assert CANARY not in boxed.inside(wid, everything).stdout
    assert all("warnings" not in entry or not entry["warnings"] for entry in boxed.apple.log()), "the tool has warned"


def test_sessions_started_at_once_share_one_container_and_workspaces_do_not(boxed: Boxed) -> None:
    first, second = boxed.workspace("once"), boxed.workspace("twice")
    sessions = [boxed.session("once"), boxed.session("once"), boxed.session("twice")]
    answers = together(*(lambda wid=wid, sid=sid: boxed.resume(wid, sid) for wid, sid in sessions))
    assert [status for status, _ in answers] == [200, 200, 200], answers
    assert len(boxed.names(first)) == len(boxed.names(second)) == 1
    assert len(boxed.pis(first)) == 2 and len(boxed.pis(second)) == 1
    assert len([c for c in boxed.apple.calls("run") if f"oppi.workspace={first}" in c]) == 1
    boxed.read(first, "echo mine > /work/only-first; echo secret > /oppi/sessions/private")
    assert boxed.inside(second, "cat /work/only-first /oppi/sessions/private /cache/*").returncode != 0
    assert sessions[0][1] not in boxed.read(second, "ls -R /oppi /work /cache; cat /proc/[0-9]*/environ | tr '\\0' '\\n'")


def test_what_guards_an_agent_cannot_be_changed_by_it(boxed: Boxed) -> None:
    wid = boxed.workspace("guarded", skills=["plain"], extensions=["helper"])
    _, sid = boxed.started("guarded")
    own = f"/oppi/guard/sessions/{sid}"
    files = ("/oppi/guard/oppi-gate.js", "/oppi/guard/skills/plain/SKILL.md", "/oppi/guard/extensions/helper/index.ts")
    files += (f"{own}/prompt.md", f"{own}/auth.json", f"{own}/models.json", "/usr/local/bin/pi", "/etc/passwd")
    for path in files:
        assert boxed.read(wid, f"test -r {path} && echo there") == "there"
        for attempt in (f"echo x >> {path}", f"rm -f {path}", f"mv {path} {path}.old", f"ln -sf /work/x {path}"):
            assert boxed.inside(wid, attempt).returncode != 0, attempt
    for folder in ("/oppi/guard", "/oppi", "/", "/usr/local/bin", "/etc", own):
        assert boxed.inside(wid, f"echo x > {folder}/planted").returncode != 0, folder
    for attempt in ("mount -o remount,rw /oppi/guard", "mount -o remount,rw /", "umount /oppi/guard", "su -c true", "sudo true"):
        assert boxed.inside(wid, attempt).returncode != 0, attempt
    for folder in ("/work", "/oppi/sessions", "/cache", "/tmp", "/home/pi"):
        assert boxed.inside(wid, f"echo x > {folder}/mine && rm {folder}/mine").returncode == 0, folder
    assert boxed.read(wid, "id -u") == "1001"
    assert boxed.read(wid, "grep -h Cap /proc/self/status | cut -f2 | sort -u") == "0" * 16
    (argv,) = boxed.pis(wid)
    assert argv[argv.index("--append-system-prompt") + 1] == f"{own}/prompt.md"
    extensions = [argv[at + 1] for at, word in enumerate(argv) if word == "--extension"]
    assert extensions == ["/oppi/guard/extensions/helper", "/oppi/guard/oppi-gate.js"], "the gate must be the last"
    assert {"--no-extensions", "--no-skills"} <= set(argv)


def test_the_environment_of_pi_is_what_was_meant(boxed: Boxed) -> None:
    wid, sid = boxed.started()
    (pid,) = [pid for pid, argv in boxed.apple.execs(boxed.name(wid)).items() if "rpc" in argv and f"OPPI_SESSION={sid}" in argv]
    pairs = [item.partition("=")[::2] for item in Path(f"/proc/{pid}/environ").read_text().split("\0") if item]
    values = dict(pairs)
    assert len(values) == len(pairs), "a variable that is given twice has its first value for some, its last for others"
    assert values["HOME"] == "/home/pi" and values["OPPI_SESSION"] == sid and values["OPPI_WORKSPACE"] == wid
    assert values["PI_SANDBOX"] == "1" and values["PATH"].startswith("/oppi/guard/bin:")
    assert values["UV_CACHE_DIR"].startswith("/cache/")
    agent = values["PI_CODING_AGENT_DIR"]
    assert json.loads(boxed.read(wid, f"cat {agent}/settings.json")) == {"defaultThinkingLevel": "low"}
    assert boxed.inside(wid, f"echo x >> {agent}/auth.json").returncode != 0


# -- what is brought there ---------------------------------------------------------------------------------------------


def test_chosen_skills_follow_into_a_running_container_and_nothing_else_does(boxed: Boxed) -> None:
    skill = boxed.server.agent_dir / "skills" / "plain"
    (skill / "leak").symlink_to(boxed.server.agent_dir / "auth.json")
    (skill / "folder").symlink_to(boxed.server.agent_dir)
    wid = boxed.workspace("skilled", skills=["plain", "search"])
    boxed.started("skilled")
    assert boxed.read(wid, "ls /oppi/guard/skills").split() == ["plain", "search"]
    assert boxed.read(wid, "ls /oppi/guard/skills/plain").split() == ["SKILL.md", "deep"]
    assert boxed.read(wid, "PATH=/oppi/guard/bin:$PATH search") == "searched"
    assert boxed.inside(wid, "PATH=/oppi/guard/bin:$PATH fetch").returncode != 0
    (argv,) = boxed.pis(wid)
    chosen = [argv[at + 1] for at, word in enumerate(argv) if word == "--skill"]
    assert chosen == ["/oppi/guard/skills/plain", "/oppi/guard/skills/search"]
    (skill / "deep" / "er" / "notes").write_text("second")
    eventually(lambda: boxed.read(wid, "cat /oppi/guard/skills/plain/deep/er/notes") == "second", 15)
    assert "docs.python.org" in boxed.read(wid, "cat ~/.config/fetch/allowed_domains.txt")
    shim = os.lstat(boxed.folder(wid, "guard", "bin", "search")).st_ino
    boxed.change(wid, skills=["fetch", "search"])
    eventually(lambda: boxed.read(wid, "ls /oppi/guard/skills").split() == ["fetch", "search"], 15)
    assert boxed.read(wid, "PATH=/oppi/guard/bin:$PATH fetch") == "fetched"
    assert os.lstat(boxed.folder(wid, "guard", "bin", "search")).st_ino == shim, "what has not changed is left alone"
    left = [path.name for path in boxed.folder(wid, "guard").rglob(".*")]
    assert not left, "half made or old copies"


def test_the_fetch_list_of_this_machine_is_what_counts(boxed: Boxed) -> None:
    own = boxed.server.home / ".config" / "fetch" / "allowed_domains.txt"
    own.parent.mkdir(parents=True)
    own.write_text("only.example\n")
    wid = boxed.workspace("fetching", memoryEnabled=True)
    boxed.started("fetching")
    assert boxed.read(wid, "cat ~/.config/fetch/allowed_domains.txt") == "only.example"
    own.unlink()


def test_the_prompt_says_where_it_is(boxed: Boxed) -> None:
    fields = {"description": "the shop", "systemPrompt": "Speak French.", "memoryEnabled": True, "memoryNamespace": "Shop"}
    wid = boxed.workspace("told", skills=["search", "plain"], **fields)
    _, sid = boxed.started("told")
    text = boxed.read(wid, f"cat /oppi/guard/sessions/{sid}/prompt.md")
    gateway = boxed.apple.json("inspect", boxed.name(wid))[0]["status"]["networks"][0]["ipv4Gateway"].partition("/")[0]
    for part in (
        "sandbox container", "phone", "the user", "**told** — the shop", "`/work`", "Alpine", "Node 22", "Python 3", "Chromium",
        gateway, '`search "query"`', "SearXNG web search", "**plain**: What plain is for", "**search**", "SKILL.md",
        "# Workspace Instructions", "Speak French.", "# Memory", "shop", "recall", "remember", "Security contract",
        "Mobile output contract", "Permission gate", "git", "rg", "fd", "jq", "make", "tree", "sqlite", "uv",
    ):  # fmt: skip
        assert part in text, part
    assert "fetch" not in text.replace("prefetch", "") and "/home/pi/.pi" not in text
    assert "Memory extension not available" in " ".join(boxed.record(sid)["warnings"])
    _, bare = boxed.started("container")
    plain = boxed.read(boxed.workspace(), f"cat /oppi/guard/sessions/{bare}/prompt.md")
    assert "Workspace Instructions" not in plain and "# Memory" not in plain and "search" not in plain


def test_memory_is_shared_by_its_name_and_stays_where_it_belongs(boxed: Boxed) -> None:
    one = boxed.workspace("one", memoryEnabled=True, memoryNamespace="Common")
    two = boxed.workspace("two", memoryEnabled=True, memoryNamespace="common")
    memory = "/home/pi/.config/dotfiles/shared/memory"
    boxed.started("one")
    boxed.started("two")
    assert "no credentials" in boxed.read(one, f"cat {memory}/MEMORY.md")
    boxed.read(one, f"echo noted > {memory}/journal/today && mkdir ~/.config/other")
    assert boxed.read(two, f"cat {memory}/journal/today") == "noted"
    assert (boxed.server.data / "sandboxes" / "_memory" / "common" / "MEMORY.md").exists()
    boxed.workspace("plain")
    boxed.started("plain")
    assert boxed.inside(boxed.workspace("plain"), f"ls {memory}").returncode != 0


@pytest.mark.parametrize("namespace", ["..", "../../../../escape", "a/../../b", "/etc", ".", "x" * 300, "\u2025", "", " "])
def test_no_name_of_a_memory_leads_out_of_its_folder(namespace: str) -> None:
    import oppi

    name = oppi.memory_name({"id": "abc", "memoryNamespace": namespace})
    assert re.fullmatch(r"[a-z0-9_]([a-z0-9._-]{0,62}[a-z0-9._-])?", name) and name not in (".", ".."), name


# -- mounts that a person asks for -------------------------------------------------------------------------------------


def test_folders_with_credentials_are_not_mounted(boxed: Boxed) -> None:
    home = boxed.server.home
    for name in (".ssh", ".aws/sso", "project", "Project:2", "agent-link"):
        if name != "agent-link":
            (home / name).mkdir(parents=True, exist_ok=True)
    (home / "agent-link").symlink_to(boxed.server.agent_dir)
    (home / "project" / "there.txt").write_text("there")
    refused = {
        str(home): "holds credentials", "~": "holds credentials", "/": "holds credentials", str(home.parent): "holds credentials",
        "~/.ssh": "holds credentials", "~/.SSH": "not found|holds credentials", "~/.aws/sso": "holds credentials",
        "~/.pi/agent": "holds credentials", "~/agent-link": "holds credentials", "~/.config": "holds|not found",
        str(boxed.server.data): "holds credentials", str(boxed.server.data / "sandboxes"): "holds credentials",
        "~/nowhere": "not found", "~/Project:2": "colon",
    }  # fmt: skip
    wid, sid = boxed.session("mounting")
    runs = len(boxed.apple.calls("run"))
    for mount, reason in refused.items():
        boxed.change(wid, hostMount=mount)
        status, text = boxed.resume(wid, sid)
        assert status == 500 and re.search(reason, text), (mount, text)
    assert len(boxed.apple.calls("run")) == runs
    boxed.change(wid, hostMount="~/project")
    assert boxed.resume(wid, sid)[0] == 200
    assert boxed.read(wid, "cat /work/there.txt; echo back > /work/back.txt") == "there"
    assert (home / "project" / "back.txt").read_text() == "back\n"


def test_a_folder_that_an_earlier_agent_made_a_link_is_not_followed(boxed: Boxed) -> None:
    wid, sid = boxed.session("planted")
    boxed.folder(wid).mkdir(parents=True)
    boxed.folder(wid, "workspace").symlink_to(boxed.server.home)
    status, text = boxed.resume(wid, sid)
    assert status == 500 and "link" in text
    assert not boxed.names(wid)
    boxed.folder(wid, "workspace").unlink()
    assert boxed.resume(wid, sid)[0] == 200


# -- conversations -----------------------------------------------------------------------------------------------------


def test_a_session_goes_on_with_its_own_file(boxed: Boxed) -> None:
    chat = boxed.chat()
    chat.play("first")
    file = str(boxed.file(chat.sid))
    assert file.startswith(str(boxed.folder(chat.wid, "sessions", chat.sid)) + "/")
    chat.stop()
    chat.phone.subscribe(chat.sid)
    (argv,) = [argv for argv in boxed.pis(chat.wid) if f"OPPI_SESSION={chat.sid}" in argv]
    assert argv[argv.index("--session") + 1] == f"/oppi/sessions/{chat.sid}/{os.path.basename(file)}"
    chat.play("second")
    assert boxed.users(chat.wid, chat.sid) == ["first", "second"]
    assert boxed.record(chat.sid)["piSessionFiles"] == [file]


def test_forks_have_what_was_before_and_show_where_they_come_from(boxed: Boxed) -> None:
    chat = boxed.chat(preset="forked")
    chat.play("one")
    chat.play("two")
    entry = chat.phone.command("get_fork_messages", chat.sid, check=True)["data"]["messages"][1]["entryId"]
    fork = boxed.phone().fork(chat.wid, chat.sid, entry)
    boxed.made.append((chat.wid, fork["id"]))
    assert boxed.users(chat.wid, fork["id"]) == ["one"]
    other = boxed.join(chat.wid, fork["id"])
    other.play("three")
    assert boxed.users(chat.wid, fork["id"]) == ["one", "three"]
    assert boxed.users(chat.wid, chat.sid) == ["one", "two"]
    files = boxed.record(fork["id"])["piSessionFiles"]
    assert all(file.startswith(str(boxed.folder(chat.wid, "sessions", fork["id"]))) for file in files)
    chat.phone.command("fork", chat.sid, entryId=entry, check=True)
    chat.play("four")
    graph = boxed.phone().call("GET", f"/workspaces/{quote(chat.wid)}/graph?sessionId={chat.sid}&includePaths=true")
    assert graph["sessionGraph"]["edges"], graph
    old = next(f for f in boxed.record(chat.sid)["piSessionFiles"] if f != str(boxed.file(chat.sid)))
    chat.phone.command("switch_session", chat.sid, sessionPath=old, check=True)
    chat.play("five")
    assert str(boxed.file(chat.sid)) == old
    wrong = chat.phone.command("switch_session", chat.sid, sessionPath="/etc/passwd")
    assert not wrong["success"]


def test_a_conversation_moves_between_this_machine_and_a_container(boxed: Boxed) -> None:
    wid = boxed.workspace("moving", hostMount=str(boxed.server.workspace), runtime="host")
    chat = boxed.chat(preset="moving")
    chat.play("on the host")
    host_file = boxed.file(chat.sid)
    chat.stop()
    boxed.change(wid, runtime="container")
    chat.phone.subscribe(chat.sid)
    chat.play("in a container")
    inside = eventually(lambda: boxed.file(chat.sid) != host_file and boxed.file(chat.sid))
    assert boxed.folder(wid, "sessions") in inside.parents and "in a container" not in host_file.read_text()
    assert boxed.users(wid, chat.sid) == ["on the host", "in a container"]
    chat.stop()
    boxed.change(wid, runtime="host")
    chat.phone.subscribe(chat.sid)
    chat.play("back again")
    assert boxed.users(wid, chat.sid) == ["on the host", "in a container", "back again"]
    assert "back again" not in inside.read_text(), "a pi on this machine must not use what an agent inside can exchange"


def test_files_and_changes_are_found_by_the_names_pi_uses(boxed: Boxed) -> None:
    chat = boxed.chat()
    boxed.read(chat.wid, "mkdir -p /work/src && printf 'one\\ntwo\\n' > /work/src/a.txt")
    edit = {"path": "/work/src/a.txt", "oldText": "zwei", "newText": "two"}
    chat.play("!tool edit " + json.dumps(edit))
    for path in ("/work/src/a.txt", "src/a.txt", "./src/a.txt"):
        answer = boxed.phone().raw("GET", f"{chat.path}/files?path={quote(path)}")
        assert (answer.status, answer.body) == (200, b"one\ntwo\n"), path
    for path in ("/work/../../auth.json", "../guard/oppi-gate.js", "/etc/passwd", "/work/nothing", "/oppi/guard/oppi-gate.js"):
        assert boxed.phone().raw("GET", f"{chat.path}/files?path={quote(path)}").status in (400, 403, 404), path
    for path in ("/work/src/a.txt", "src/a.txt"):
        found = boxed.phone().call("GET", f"{chat.path}/overall-diff?path={quote(path)}")
        assert (found["revisionCount"], found["baselineText"]) == (1, "one\nzwei\n")


def test_sessions_of_the_original_open_and_go_on(boxed: Boxed) -> None:
    wid, sid = boxed.session("inherited")
    folder = boxed.folder(wid, "sessions", sid, "agent", "sessions", "--work--")
    folder.mkdir(parents=True)
    path = folder / "2026-01-02_old.jsonl"
    head = {"type": "session", "version": 3, "id": "old", "timestamp": "2026-01-02T03:04:05.678Z", "cwd": "/work"}
    user = {"role": "user", "content": [{"type": "text", "text": "long ago"}], "timestamp": 1}
    answer = {**user, "role": "assistant", "provider": "mock", "model": "m"}
    common = {"type": "message", "timestamp": head["timestamp"]}
    lines = [head, {**common, "id": "aaaaaaaa", "parentId": None, "message": user}]
    lines.append({**common, "id": "bbbbbbbb", "parentId": "aaaaaaaa", "message": answer})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    boxed.server.stop()
    stored = boxed.server.data / "sessions" / f"{sid}.json"
    record = json.loads(stored.read_text())
    record["session"].update(piSessionFile=str(path), piSessionFiles=[str(path)], runtime="container", status="stopped")
    stored.write_text(json.dumps(record))
    boxed.server.start()
    assert boxed.users(wid, sid) == ["long ago"]
    chat = boxed.join(wid, sid)
    chat.play("today")
    assert boxed.users(wid, sid) == ["long ago", "today"]
    assert "today" in path.read_text()


# -- an agent that means harm ------------------------------------------------------------------------------------------

OUTSIDE = '{"type":"session","version":3,"id":"host","timestamp":"2026-01-02T03:04:05Z","cwd":"/work"}\n' + json.dumps(
    {"type": "message", "id": "aaaaaaaa", "parentId": None, "timestamp": "2026-01-02T03:04:05Z",
     "message": {"role": "user", "content": [{"type": "text", "text": CANARY}], "timestamp": 1}}
) + "\n"  # fmt: skip


@pytest.fixture
def outside(boxed: Boxed) -> Path:
    """A conversation of this machine that is none of a container's business."""
    path = boxed.server.home / "outside.jsonl"
    path.write_text(OUTSIDE)
    return path


PLANTS = {
    "a link": "rm {0} && ln -s {1} {0}",
    "a relative link": "rm {0} && ln -s ../../../../../home/outside.jsonl {0}",
    "a fifo": "rm {0} && mkfifo {0}",
    "a folder": "rm {0} && mkdir {0}",
    "a huge file": "truncate -s 40G {0}",
    "a link for its folder": "mv $(dirname {0}) /oppi/sessions/moved-$$ && ln -s {2} $(dirname {0})",
    "nothing": "rm {0}",
}


@pytest.mark.parametrize("plant", PLANTS)
def test_what_is_planted_for_a_conversation_leads_nowhere(boxed: Boxed, outside: Path, plant: str) -> None:
    chat = boxed.chat(preset="hostile")
    chat.play("harmless")
    file = boxed.file(chat.sid)
    chat.stop()
    inside = f"/oppi/sessions/{chat.sid}/{file.name}"
    boxed.read(chat.wid, PLANTS[plant].format(inside, outside, boxed.server.home))
    (boxed.server.home / file.name).write_text(OUTSIDE)
    before = sorted(path.name for path in boxed.server.home.iterdir())
    phone = boxed.phone()
    graph = f"/workspaces/{quote(chat.wid)}/graph?sessionId={chat.sid}&includePaths=true&include=entry"
    for path in (f"{chat.path}?view=full", f"{chat.path}/tool-output/x", graph):
        answer = phone.raw("GET", path, timeout=20)
        assert answer.status in (200, 404) and CANARY.encode() not in answer.body and b'"host"' not in answer.body, (path, answer)
    status, text = boxed.resume(chat.wid, chat.sid)
    assert status in (200, 409, 500), text
    assert CANARY not in "".join(boxed.users(chat.wid, chat.sid))
    assert outside.read_text() == OUTSIDE and (boxed.server.home / file.name).read_text() == OUTSIDE
    assert sorted(path.name for path in boxed.server.home.iterdir()) == before
    assert CANARY not in boxed.inside(chat.wid, "grep -r canary /oppi/sessions /work").stdout
    (boxed.server.home / file.name).unlink()
    boxed.read(chat.wid, "rm -rf /oppi/sessions/*")
    assert phone.health()["ok"]


LIES = (
    "{outside}",
    "/oppi/sessions/../../../../home/outside.jsonl",
    "/oppi/sessions/{sid}/sandboxes/x/sessions/outside.jsonl",
    "/oppi/sessions/{sid}/new\\\\nline.jsonl",
)


@pytest.mark.parametrize("lie", LIES)
def test_a_pi_that_lies_about_its_file_gains_nothing(boxed: Boxed, outside: Path, lie: str) -> None:
    wid, sid = boxed.session("lying")
    assert boxed.resume(wid, sid)[0] == 200
    told = lie.format(outside=outside, sid=sid)
    boxed.read(wid, f"mkdir -p /oppi/sessions/{sid}/sandboxes/x")
    boxed.read(wid, f"ln -sfn {boxed.server.home} /oppi/sessions/{sid}/sandboxes/x/sessions")
    boxed.read(wid, f"cd /oppi/sessions/{sid} && ln -s {outside} \"$(printf 'new\\nline.jsonl')\"")
    boxed.phone().stop(wid, sid)
    boxed.folder(wid, "workspace", ".lie").write_text(told)
    try:
        assert boxed.resume(wid, sid)[0] == 200
        assert CANARY not in "".join(boxed.users(wid, sid))
        boxed.phone().stop(wid, sid)
    finally:
        boxed.folder(wid, "workspace", ".lie").unlink()
    status, text = boxed.resume(wid, sid)
    assert CANARY not in boxed.inside(wid, "grep -rs canary /oppi/sessions /work").stdout
    assert CANARY not in "".join(boxed.users(wid, sid))
    boxed.phone().stop(wid, sid)
    boxed.change(wid, runtime="host")
    boxed.resume(wid, sid)
    assert CANARY not in "".join(boxed.users(wid, sid)) and outside.read_text() == OUTSIDE
    boxed.phone().stop(wid, sid)
    boxed.change(wid, runtime="container")


def test_a_conversation_cannot_name_one_of_this_machine_as_where_it_comes_from(boxed: Boxed, outside: Path) -> None:
    chat = boxed.chat(preset="orphaned")
    chat.play("hello")
    file = boxed.file(chat.sid)
    head, _, rest = file.read_text().partition("\n")
    for parent in (str(outside), "/oppi/sessions/../../../../home/outside.jsonl", f"/oppi/sessions/{chat.sid}/link.jsonl"):
        boxed.inside(chat.wid, f"ln -sfn {outside} /oppi/sessions/{chat.sid}/link.jsonl")
        file.write_text(json.dumps({**json.loads(head), "parentSession": parent}) + "\n" + rest)
        query = "includePaths=true&include=entry&entrySessionId=host"
        answer = boxed.phone().raw("GET", f"/workspaces/{quote(chat.wid)}/graph?{query}")
        assert answer.status == 200 and b'"id":"host"' not in answer.body and CANARY.encode() not in answer.body


def test_what_is_planted_in_the_work_folder_leads_nowhere(boxed: Boxed, outside: Path) -> None:
    chat = boxed.chat()
    links = {"link": outside, "folder": boxed.server.home, "all": "/"}
    boxed.read(chat.wid, "cd /work && mkfifo pipe" + "".join(f" && ln -sfn {target} {name}" for name, target in links.items()))
    write = {"path": "/work/link", "content": "x"}
    chat.play("!tool write " + json.dumps(write))
    for path in ("link", "folder/outside.jsonl", f"all{outside}", "pipe", "/work/link", ".", ""):
        answer = boxed.phone().raw("GET", f"{chat.path}/files?path={quote(path)}", timeout=10)
        assert answer.status in (400, 403, 404) and CANARY.encode() not in answer.body, path
    answer = boxed.phone().raw("GET", f"{chat.path}/overall-diff?path=link", timeout=10)
    assert CANARY.encode() not in answer.body
    assert outside.read_text() == OUTSIDE
