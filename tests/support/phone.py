"""A phone made of tables: decodes and behaves as strictly as the iOS apps 1.0 and 1.1.

The real apps cannot run in these tests, so their decoders are restated here.  A field the app requires must be
there with the exact type, an enum value outside its list rejects the whole object, an integer must be integral,
unknown fields are ignored and null equals absent for optional fields.  What an app would drop silently is an
error here, because a dropped frame is a defect of the server.

Vocabulary of the tables: ``name:type`` is required, ``name?:type`` optional; ``@1.0`` or ``@1.1`` limits a field to
the app that reads it.  Types: ``str int num bool obj any iso hex hex0``, a name of SHAPES or ENUMS, ``[type]`` for a
list, ``[type#key]`` for a list whose members must differ in ``key`` (a duplicate crashes the app), ``{type}`` for an
object with any keys.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import http.client
import ipaddress
import json
import re
import socket
import ssl
import threading
import time
import urllib.parse
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Callable, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

Json = Any
Frame = dict[str, Any]
Predicate = Callable[[Frame], bool]

GENERATIONS = ("1.0", "1.1")
MAX_FRAME = 1 << 20  # bytes: the apps never raise the platform's limit, a larger frame fails their receive
SEND_TIMEOUT = 4.0  # s: how long both apps wait for the acknowledgement of a prompt
REQUEST_TIMEOUT = 15.0  # s without data: the apps' limit per request
INT64 = 1 << 63

# ======================================================================================================================
# Tables: enumerations and objects
# ======================================================================================================================

ENUMS: dict[str, str] = {
    "SessionStatus": "starting ready busy stopping stopped error",
    "Thinking": "off minimal low medium high xhigh",
    "Runtime11": "host sandbox",
    "PromptMode": "append replace",
    "TraceType": "user assistant toolCall toolResult thinking system compaction",
    "Risk": "low medium high critical",
    "Scope": "session workspace global",
    "Decision": "allow ask deny",
    "AuditDecision": "allow deny",
    "Style": "bold muted dim accent success warning error",
    "Stage": "accepted dispatched started",
    "StopSource": "user timeout server",
    "Role": "user assistant",
    "OutputMode": "append replace",
    "QueueKind": "steer follow_up",
    "Profile": "tailscale-permissive strict",
    "DiffKind": "context added removed",
    "FileType": "file directory",
    "Supervision": "standard high",
    "Fork": "fork",
    "Parent": "parent",
    "Changed": "changed",
}

THEME_CORE = "bg bgDark bgHighlight fg fgDim comment blue cyan green orange purple red yellow"
THEME_EXTRA = (
    "thinkingText userMessageBg userMessageText toolPendingBg toolSuccessBg toolErrorBg toolTitle toolOutput "
    "mdHeading mdLink mdLinkUrl mdCode mdCodeBlock mdCodeBlockBorder mdQuote mdQuoteBorder mdHr mdListBullet "
    "toolDiffAdded toolDiffRemoved toolDiffContext syntaxComment syntaxKeyword syntaxFunction syntaxVariable "
    "syntaxString syntaxNumber syntaxType syntaxOperator syntaxPunctuation thinkingOff thinkingMinimal "
    "thinkingLow thinkingMedium thinkingHigh thinkingXhigh"
)

SHAPES: dict[str, str] = {
    "Error": "error:str",
    "Ok": "ok:bool",
    # sessions
    "Session": "id:str workspaceId?:str workspaceName?:str name?:str status:SessionStatus createdAt:num "
    "lastActivity:num model?:str runtime?:str@1.0 messageCount:int tokens:Tokens cost:num "
    "changeStats?:ChangeStats contextTokens?:int contextWindow?:int firstMessage?:str@1.1 lastMessage?:str "
    "thinkingLevel?:Thinking parentSessionId?:str@1.1",
    "Tokens": "input:int output:int cacheRead?:int@1.1 cacheWrite?:int@1.1",
    "ChangeStats": "mutatingToolCalls:int filesChanged:int changedFiles:[str] addedLines:int removedLines:int "
    "changedFilesOverflow?:int@1.1",
    "SessionReply": "session:Session",
    "SessionCreated": "session:Session prompted?:bool@1.1",
    "SessionStopped": "ok:bool session?:Session",
    "SessionDetail": "session:Session trace:[TraceEvent]",
    "SessionList": "sessions:[Session#id] totalCount?:int@1.1 workspace?:Workspace",
    "SearchReply": "query:str totalResults:int results:[SearchHit]",
    "SearchHit": "sessionId:str workspaceId:str title:str snippet?:str rank:num session?:Session",
    "TraceEvent": "id:str type:TraceType timestamp:iso text?:str tool?:str args?:obj output?:str toolCallId?:str "
    "toolName?:str isError?:bool details?:any@1.1 thinking?:str",
    "EventsReply": "events:[Event] currentSeq:int catchUpComplete:bool session:Session",
    "UserEvents": "events:[any] currentSeq:int catchUpComplete:bool",
    "ToolOutput": "toolCallId?:str output:str isError:bool",
    "ToolOutputFull": "toolCallId?:str output:str",
    "LocalSessions": "sessions:[LocalSession]",
    "LocalSession": "path:str piSessionId:str cwd:str messageCount:int createdAt:num lastModified:num name?:str "
    "firstMessage?:str model?:str",
    "Accepted": "ok:bool accepted:int",
    # workspaces
    "Workspace": "id:str name:str description?:str icon?:str systemPrompt?:str hostMount?:str defaultModel?:str "
    "skills:[str] runtime?:str@1.0 runtime?:Runtime11@1.1 policyPreset?:str@1.0 memoryEnabled?:bool@1.0 "
    "memoryNamespace?:str@1.0 extensions?:[str] systemPromptMode?:PromptMode@1.1 gitStatusEnabled?:bool@1.1 "
    "sandboxConfig?:SandboxConfig@1.1 createdAt:num updatedAt:num",
    "SandboxConfig": "allowedHosts?:[str]",
    "WorkspaceList": "workspaces:[Workspace#id]",
    "WorkspaceReply": "workspace:Workspace",
    "BasePrompt": "systemPrompt:str",
    # catalog
    "Model": "id:str name:str provider:str contextWindow:int",
    "ModelList": "models:[Model]",
    "Skill": "name:str description:str path:str containerSafe:bool@1.0 hasScripts:bool@1.0 builtIn?:bool",
    "SkillList": "skills:[Skill]@1.0 skills:[Skill#name]@1.1",
    "SkillReply": "skill:Skill",
    "SkillDetail": "skill:Skill content:str files:[str]",
    "Content": "content:str",
    "Extension": "name:str path:str kind:str source?:str@1.1",
    "ExtensionList": "extensions:[Extension]",
    "User": "user:str name:str",
    "HostDirectory": "path:str name:str isGitRepo:bool hasAgentsMd:bool gitRemote?:str projectType?:str language?:str",
    "HostDirectories": "directories:[HostDirectory]",
    # server
    "Health": "ok:bool protocol?:int",
    "PairReply": "deviceToken:str",
    "ServerInfo": "name:str version:str uptime:int os:str arch:str hostname:str nodeVersion:str piVersion:str "
    "configVersion:int stats:ServerCounts identity?:InfoIdentity runtimeUpdate?:RuntimeUpdate@1.1",
    "ServerCounts": "workspaceCount:int activeSessionCount:int totalSessionCount:int skillCount:int modelCount:int",
    "InfoIdentity": "fingerprint:str keyId:str algorithm:str",
    "RuntimeUpdate": "packageName:str currentVersion:str updateAvailable:bool canUpdate:bool checking:bool "
    "updateInProgress:bool restartRequired:bool latestVersion?:str pendingVersion?:str checkError?:str "
    "lastUpdateError?:str lastCheckedAt?:int lastUpdatedAt?:int",
    "SecurityProfile": "configVersion:int profile:Profile identity:ProfileIdentity invite:ProfileInvite "
    "requireTlsOutsideTailnet?:bool allowInsecureHttpInTailnet?:bool requirePinnedServerIdentity?:bool",
    "ProfileIdentity": "algorithm:str keyId:str fingerprint:str enabled?:bool",
    "ProfileInvite": "format:str maxAgeSeconds:int",
    "AutoTitle": "enabled:bool model?:str",
    # policy
    "Pending": "id:str sessionId:str workspaceId?:str tool:str input:obj displaySummary:str reason:str timeoutAt:num "
    "expires?:bool risk:Risk@1.0 resolutionOptions?:ResolutionOptions@1.0",
    "ResolutionOptions": "allowSession:bool allowAlways:bool alwaysDescription?:str denyAlways:bool",
    "PendingList": "pending:[Pending#id] serverTime?:num",
    "Rule": "id:str scope:Scope effect:str@1.0 description:str@1.0 risk:Risk@1.0 decision:Decision@1.1 label:str@1.1 "
    "source:str@1.0 source?:str@1.1 createdAt:num@1.0 createdAt?:num@1.1 tool?:str workspaceId?:str sessionId?:str "
    "createdBy?:str match?:RuleMatch@1.0 pattern?:str@1.1 executable?:str@1.1 expiresAt?:num",
    "RuleMatch": "executable?:str domain?:str pathPattern?:str commandPattern?:str",
    "RuleList": "rules:[Rule#id]",
    "RuleReply": "rule:Rule",
    "Audit": "id:str timestamp:num sessionId:str workspaceId:str tool:str displaySummary:str decision:AuditDecision "
    "resolvedBy:str layer:str risk:Risk@1.0 ruleId?:str ruleSummary?:str userChoice?:UserChoice",
    "UserChoice": "action:str scope:str learnedRuleId?:str expiresAt?:num",
    "AuditList": "entries:[Audit]",
    "Fallback": "fallback:Decision",
    "PolicyProfileReply": "profile:PolicyProfile",
    "PolicyProfile": "runtime:str policyPreset:str supervisionLevel:Supervision summary:str generatedAt:num "
    "alwaysBlocked:[PolicyItem] needsApproval:[PolicyItem] usuallyAllowed:[str] workspaceId?:str workspaceName?:str",
    "PolicyItem": "id:str title:str risk:Risk description?:str example?:str",
    # graph
    "Graph": "workspaceId:str generatedAt:num current?:GraphCurrent sessionGraph:SessionGraph entryGraph?:EntryGraph",
    "GraphCurrent": "sessionId:str nodeId?:str",
    "SessionGraph": "nodes:[GraphNode#id] edges:[GraphEdge] roots:[str]",
    "GraphNode": "id:str createdAt:num workspaceId:str attachedSessionIds:[str] activeSessionIds:[str] parentId?:str "
    "sessionFile?:str parentSessionFile?:str",
    "GraphEdge": "from:str to:str type:Fork",
    "EntryGraph": "piSessionId:str nodes:[EntryNode#id] edges:[EntryEdge] rootEntryId?:str leafEntryId?:str",
    "EntryNode": "id:str type:str parentId?:str timestamp?:num role?:str preview?:str",
    "EntryEdge": "from:str to:str type:Parent",
    # diffs, git, files
    "OverallDiff": "path:str revisionCount:int@1.0 revisionCount?:int@1.1 baselineText:str currentText:str "
    "diffLines:[FlatDiffLine]@1.0 addedLines:int removedLines:int cacheKey:str@1.0 cacheKey?:str@1.1 "
    "workspaceId:str@1.1 hunks:[Hunk]@1.1",
    "FlatDiffLine": "kind:DiffKind text:str",
    "Diff": "workspaceId:str path:str baselineText:str currentText:str addedLines:int removedLines:int hunks:[Hunk] "
    "revisionCount?:int cacheKey?:str",
    "Hunk": "oldStart:int oldCount:int newStart:int newCount:int lines:[DiffLine]",
    "DiffLine": "kind:DiffKind text:str oldLine?:int newLine?:int spans?:[Span]",
    "Span": "start:int end:int kind:Changed",
    "GitStatus": "isGitRepo:bool dirtyCount:int untrackedCount:int stagedCount:int files:[GitFile#path] totalFiles:int "
    "addedLines:int removedLines:int stashCount:int recentCommits:[Commit] branch?:str headSha?:str ahead?:int "
    "behind?:int lastCommitMessage?:str lastCommitDate?:str",
    "GitFile": "status:str path:str addedLines?:int removedLines?:int",
    "Commit": "sha:str message:str date:str",
    "CommitLog": "commits:[Commit] total:int hasMore:bool",
    "CommitDetail": "sha:str message:str date:str author:str files:[GitFile] addedLines:int removedLines:int",
    "FileEntry": "name:str type:FileType size:int modifiedAt:int path?:str",
    "Listing": "path:str entries:[FileEntry] truncated:bool",
    "FileIndex": "paths:[str] truncated:bool",
    "ReviewSession": "action:str selectedPathCount:int session:Session visiblePrompt:str filePaths:[str]",
    # themes and stats
    "ThemeSummary": "name:str filename:str colorScheme:str",
    "ThemeList": "themes:[ThemeSummary]",
    "ThemeReply": "theme:Theme",
    "Theme": "name:str colorScheme?:str colors:Colors",
    "Colors": " ".join(
        [key + ":hex" for key in THEME_CORE.split()] + [key + ":hex0@1.1" for key in THEME_EXTRA.split()]
    ),
    "Stats": "memory:Memory activeSessions:[ActiveSession#id] daily:[Day] modelBreakdown:[ModelShare] "
    "workspaceBreakdown:[WorkspaceShare] totals:Totals",
    "Memory": "heapUsed:num heapTotal:num rss:num external:num",
    "ActiveSession": "id:str status:str cost:num model?:str name?:str firstMessage?:str workspaceName?:str "
    "thinkingLevel?:str parentSessionId?:str contextTokens?:int contextWindow?:int createdAt?:num",
    "Day": "date:str sessions:int cost:num tokens:int byModel?:{Totals}",
    "ModelShare": "model:str sessions:int cost:num tokens:int share:num cacheRead?:int cacheWrite?:int",
    "WorkspaceShare": "id:str sessions:int cost:num name?:str",
    "Totals": "sessions:int cost:num tokens:int",
    "DailyDetail": "date:str totals:Totals hourly:[Hour] sessions:[DaySession]",
    "Hour": "hour:int sessions:int cost:num tokens:int byModel?:{Totals}",
    "DaySession": "id:str cost:num tokens:int createdAt:num status:str name?:str model?:str workspaceName?:str",
    # socket message parts
    "Segment": "text:str style?:Style",
    "Queue": "version:int steering:[QueueItem] followUp:[QueueItem]",
    "QueueItem": "id:str message:str createdAt:int images?:[Image]",
    "Image": "data:str mimeType:str",
    "Question": "id:str question:str options:[Choice] multiSelect?:bool",
    "Choice": "value:str label:str description?:str",
    # data of command results, where an app reads it
    "SubscribeData": "sessionId:str level?:str currentSeq?:int catchUpComplete?:bool deduplicated?:bool",
    "UnsubscribeData": "sessionId:str",
    "StatsData": "tokens:obj cost?:num",
    "ModelData": "provider:str id:str",
    "CycleModelData": "model:ModelData",
    "LevelData": "level:Thinking",
    "ForkData": "messages:[ForkMessage]",
    "ForkMessage": "entryId:str text:str",
    "CommandsData": "commands:[SlashCommand]",
    "SlashCommand": "name:str description?:str source:str location?:str path?:str",
    "SuggestData": "items:[Suggestion] truncated:bool",
    "Suggestion": "path:str isDirectory:bool",
}

# ======================================================================================================================
# Tables: socket messages
# ======================================================================================================================

ENVELOPE = "seq?:int sessionId?:str streamSeq?:int"
RESULT = "command:str success:bool requestId?:str data?:any error?:str"

MESSAGES: dict[str, str] = {
    "stream_connected": "userName?:str",
    "connected": "session:Session currentSeq?:int",
    "state": "session:Session",
    "agent_start": "",
    "agent_end": "",
    "message_end": "role:Role content:str",
    "text_delta": "delta:str",
    "thinking_delta": "delta:str",
    "tool_start": "tool:str args?:obj toolCallId?:str callSegments?:[Segment]@1.1",
    "tool_output": "output:str isError?:bool toolCallId?:str mode?:OutputMode@1.1 truncated?:bool@1.1 "
    "totalBytes?:int@1.1",
    "tool_end": "tool:str toolCallId?:str details?:any@1.1 isError?:bool@1.1 resultSegments?:[Segment]@1.1",
    "queue_state": "queue:Queue",
    "queue_item_started": "kind:QueueKind item:QueueItem queueVersion:int",
    "turn_ack": "command:str clientTurnId:str stage:Stage requestId?:str duplicate?:bool",
    "rpc_result": RESULT,
    "command_result": RESULT,
    "compaction_start": "reason:str",
    "compaction_end": "aborted?:bool willRetry?:bool summary?:str tokensBefore?:int",
    "retry_start": "attempt:int maxAttempts:int delayMs:int errorMessage:str",
    "retry_end": "success:bool attempt:int finalError?:str",
    "stop_requested": "source:StopSource reason?:str",
    "stop_confirmed": "source:StopSource reason?:str",
    "stop_failed": "source:StopSource reason:str",
    "session_ended": "reason:str",
    "session_deleted": "sessionId:str",
    "error": "error:str code?:str fatal?:bool",
    "permission_request": "id:str sessionId:str tool:str input:obj displaySummary:str reason:str timeoutAt:num "
    "expires?:bool risk:Risk@1.0 resolutionOptions?:ResolutionOptions@1.0",
    "permission_expired": "id:str reason:str",
    "permission_cancelled": "id:str",
    "extension_ui_request": "id:str sessionId:str method:str title?:str options?:[str] message?:str placeholder?:str "
    "prefill?:str timeout?:int questions?:[Question]@1.1 allowCustom?:bool@1.1",
    "extension_ui_notification": "method:str message?:str notifyType?:str statusKey?:str statusText?:str",
    "git_status": "workspaceId:str status:GitStatus",
}

#: Messages an app has no decoder for; it ignores them, and so does this phone.
FOREIGN: dict[str, frozenset[str]] = {
    "1.0": frozenset(
        {"stream_connected", "command_result", "queue_state", "queue_item_started", "git_status", "session_deleted"}
    ),
    "1.1": frozenset({"rpc_result"}),
}

RESULT_TYPE = {"1.0": "rpc_result", "1.1": "command_result"}

#: Data an app decodes from a successful result; null data is accepted, the commands below may have none.
RESULT_DATA: dict[str, str] = {
    "subscribe": "SubscribeData",
    "unsubscribe": "UnsubscribeData",
    "get_queue": "Queue",
    "set_queue": "Queue",
    "get_session_stats": "StatsData",
    "set_model": "ModelData",
    "cycle_model": "CycleModelData",
    "set_thinking_level": "LevelData",
    "cycle_thinking_level": "LevelData",
    "get_fork_messages": "ForkData",
    "get_commands": "CommandsData",
    "get_file_suggestions": "SuggestData",
}

#: Results that app 1.1 finds by requestId alone.
UNBOUND_RESULTS = frozenset({"subscribe", "unsubscribe", "get_queue", "permission_response"})
#: Frames that belong to no session.  A routing `error` without sessionId is legal, though no app shows it.
UNBOUND_TYPES = frozenset({"stream_connected", "error"})

# ======================================================================================================================
# Tables: routes
# ======================================================================================================================

WORKSPACE = "/workspaces/:wid"
SESSION = WORKSPACE + "/sessions/:sid"

ROUTES: tuple[tuple[str, str, str], ...] = (
    ("GET", "/health", "Health"),
    ("POST", "/pair", "PairReply"),
    ("GET", "/me", "User"),
    ("POST", "/me/device-token", "Ok"),
    ("DELETE", "/me/device-token", "Ok"),
    ("GET", "/server/info", "ServerInfo"),
    ("GET", "/server/stats", "Stats"),
    ("GET", "/server/stats/daily/:date", "DailyDetail"),
    ("GET", "/server/auto-title", "AutoTitle"),
    ("PUT", "/server/auto-title", "AutoTitle"),
    ("GET", "/security/profile", "SecurityProfile"),
    ("PUT", "/security/profile", "SecurityProfile"),
    ("GET", "/models", "ModelList"),
    ("GET", "/skills", "SkillList"),
    ("POST", "/skills/rescan", "SkillList"),
    ("GET", "/skills/:name", "SkillDetail"),
    ("GET", "/skills/:name/file", "Content"),
    ("GET", "/me/skills", "SkillList"),
    ("POST", "/me/skills", "SkillReply"),
    ("GET", "/me/skills/:name", "SkillDetail"),
    ("PUT", "/me/skills/:name", "SkillReply"),
    ("GET", "/me/skills/:name/files", "Content"),
    ("GET", "/extensions", "ExtensionList"),
    ("GET", "/host/directories", "HostDirectories"),
    ("GET", "/workspaces", "WorkspaceList"),
    ("POST", "/workspaces", "WorkspaceReply"),
    ("GET", WORKSPACE, "WorkspaceReply"),
    ("PUT", WORKSPACE, "WorkspaceReply"),
    ("DELETE", WORKSPACE, "Ok"),
    ("GET", WORKSPACE + "/graph", "Graph"),
    ("GET", WORKSPACE + "/system-prompt/base", "BasePrompt"),
    ("GET", WORKSPACE + "/file-index", "FileIndex"),
    ("GET", WORKSPACE + "/git-status", "GitStatus"),
    ("GET", WORKSPACE + "/git/commits", "CommitLog"),
    ("GET", WORKSPACE + "/git/commits/:sha", "CommitDetail"),
    ("GET", WORKSPACE + "/git/commits/:sha/diff", "Diff"),
    ("GET", WORKSPACE + "/review/diff", "Diff"),
    ("POST", WORKSPACE + "/review/session", "ReviewSession"),
    ("GET", "/sessions", "SessionList"),
    ("GET", "/sessions/search", "SearchReply"),
    ("GET", WORKSPACE + "/sessions", "SessionList"),
    ("POST", WORKSPACE + "/sessions", "SessionCreated"),
    ("GET", SESSION, "SessionDetail"),
    ("DELETE", SESSION, "Ok"),
    ("GET", SESSION + "/events", "EventsReply"),
    ("POST", SESSION + "/stop", "SessionStopped"),
    ("POST", SESSION + "/resume", "SessionReply"),
    ("POST", SESSION + "/fork", "SessionReply"),
    ("GET", SESSION + "/tool-output/:call", "ToolOutput"),
    ("GET", SESSION + "/tool-output/:call/full", "ToolOutputFull"),
    ("GET", SESSION + "/overall-diff", "OverallDiff"),
    ("POST", SESSION + "/client-logs", "Accepted"),
    ("GET", "/local-sessions", "LocalSessions"),
    ("GET", "/stream/events", "UserEvents"),
    ("GET", "/permissions/pending", "PendingList"),
    ("POST", "/permissions/:id/respond", "Ok"),
    ("GET", "/policy/profile", "PolicyProfileReply"),
    ("GET", "/policy/rules", "RuleList"),
    ("POST", "/policy/rules", "RuleReply"),
    ("PATCH", "/policy/rules/:id", "RuleReply"),
    ("DELETE", "/policy/rules/:id", "Ok"),
    ("GET", "/policy/audit", "AuditList"),
    ("GET", "/policy/fallback", "Fallback"),
    ("PATCH", "/policy/fallback", "Fallback"),
    ("GET", "/themes", "ThemeList"),
    ("GET", "/themes/:name", "ThemeReply"),
    ("PUT", "/themes/:name", "ThemeReply"),
    ("POST", "/telemetry/metrickit", "Accepted"),
    ("POST", "/telemetry/chat-metrics", "Accepted"),
)

# ======================================================================================================================
# Decoder
# ======================================================================================================================


class PhoneError(AssertionError):
    """Base of what this phone complains about; an AssertionError, so that pytest shows it as a failed test."""


class DecodeError(PhoneError):
    """The app could not decode something; `path` says where, `problem` what."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path, self.problem = path, problem


class SequenceError(PhoneError):
    """A sequence number did not increase, so an app would drop the frame or reload its history."""


class CommandFailed(PhoneError):
    """A command that the test expected to succeed was answered with success:false."""


class NoFrame(PhoneError):
    """No frame matched within the time limit."""


class InviteError(PhoneError):
    """An app would refuse this invite or abort pairing."""


_FIELD = re.compile(r"^(\w+)(\?)?:([^@]+)(?:@(1\.[01]))?$")
_ISO = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")
_HEX = re.compile(r"^#[0-9A-Fa-f]{6}$")
_SCALARS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "str": (lambda v: isinstance(v, str), "a string"),
    "int": (lambda v: _is_number(v) and v == int(v) and -INT64 <= v < INT64, "an integer"),
    "num": (lambda v: _is_number(v), "a number"),
    "bool": (lambda v: isinstance(v, bool), "a boolean"),
    "obj": (lambda v: isinstance(v, dict), "an object"),
    "any": (lambda v: True, "anything"),
    "iso": (lambda v: isinstance(v, str) and bool(_ISO.match(v)), "an ISO time with milliseconds and Z"),
    "hex": (lambda v: isinstance(v, str) and bool(_HEX.match(v)), "a colour #RRGGBB"),
    "hex0": (lambda v: v == "" or (isinstance(v, str) and bool(_HEX.match(v))), 'a colour #RRGGBB or ""'),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _reject_constant(name: str) -> Any:
    raise DecodeError("$", f"{name} is not JSON")


def load_json(text: str | bytes, path: str = "$") -> Json:
    """Parse JSON as the platform's decoder does: no NaN or Infinity, valid UTF-8, no lone surrogates."""
    try:
        value = json.loads(text if isinstance(text, str) else text.decode("utf-8"), parse_constant=_reject_constant)
        if "\\ud" in (text if isinstance(text, str) else text.decode("utf-8")).lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        raise DecodeError(path, f"not valid Unicode: {error}") from None
    except ValueError as error:
        raise DecodeError(path, f"not JSON: {error}") from None
    return value


@dataclass(frozen=True)
class FieldSpec:
    """One field of a shape as one generation reads it."""

    name: str
    optional: bool
    type: str


_COMPILED: dict[tuple[str, str], tuple[FieldSpec, ...]] = {}


def fields_of(spec: str, generation: str) -> tuple[FieldSpec, ...]:
    """The fields of a table entry that `generation` reads."""
    key = (spec, generation)
    if key not in _COMPILED:
        found = []
        for word in spec.split():
            match = _FIELD.match(word)
            assert match, f"bad table entry {word!r}"
            if match.group(4) in (None, generation):
                found.append(FieldSpec(match.group(1), bool(match.group(2)), match.group(3)))
        _COMPILED[key] = tuple(found)
    return _COMPILED[key]


class Decoder:
    """Checks values against the tables for one app generation."""

    def __init__(self, generation: str) -> None:
        assert generation in GENERATIONS, generation
        self.generation = generation

    def check(self, kind: str, value: Json, path: str = "$") -> Json:
        """Check `value` against a type of the table language; returns it, raises DecodeError."""
        if kind.startswith("["):
            self._list(kind[1:-1], value, path)
        elif kind.startswith("{"):
            self._map(kind[1:-1], value, path)
        elif kind == "Event":
            self._event(value, path)
        elif kind in SHAPES:
            self.fields(SHAPES[kind], value, path)
        elif kind in ENUMS:
            if not isinstance(value, str) or value not in ENUMS[kind].split():
                raise DecodeError(path, f"{value!r} is not one of {ENUMS[kind]}")
        else:
            accepts, wanted = _SCALARS[kind]
            if not accepts(value):
                raise DecodeError(path, f"{json.dumps(value)[:80]} is not {wanted}")
        return value

    def fields(self, spec: str, value: Json, path: str) -> None:
        """Check the fields of one object."""
        if not isinstance(value, dict):
            raise DecodeError(path, f"{json.dumps(value)[:80]} is not an object")
        for item in fields_of(spec, self.generation):
            content = value.get(item.name)
            if content is not None:
                self.check(item.type, content, f"{path}.{item.name}")
            elif not item.optional:
                raise DecodeError(f"{path}.{item.name}", "required, but missing or null")

    def _list(self, kind: str, value: Json, path: str) -> None:
        if not isinstance(value, list):
            raise DecodeError(path, f"{json.dumps(value)[:80]} is not a list")
        kind, _, key = kind.partition("#")
        for index, item in enumerate(value):
            self.check(kind, item, f"{path}[{index}]")
        if key:
            unique([item[key] for item in value], path)

    def _map(self, kind: str, value: Json, path: str) -> None:
        self.check("obj", value, path)
        for key, item in value.items():
            self.check(kind, item, f"{path}.{key}")

    def _event(self, value: Json, path: str) -> None:
        self.message(value, path)
        if value.get("seq") is None:
            raise DecodeError(path + ".seq", "required in a catch-up event")

    def message(self, value: Json, path: str = "$") -> bool:
        """Check a socket message.  False if the app does not know its type and therefore ignores it."""
        self.fields("type:str", value, path)
        kind = value["type"]
        if kind not in MESSAGES or kind in FOREIGN[self.generation]:
            return False
        where = f"{path}({kind})"
        self.fields(ENVELOPE, value, where)
        self.fields(MESSAGES[kind], value, where)
        if kind == RESULT_TYPE[self.generation] and value["success"] and value.get("data") is not None:
            shape = RESULT_DATA.get(value["command"])
            if shape:
                self.check(shape, value["data"], where + ".data")
        return True

    def response(self, method: str, path: str, status: int, value: Json) -> None:
        """Check the body of a REST answer: the route's shape if 2xx, else the error object."""
        shape = shape_of(method, path) if 200 <= status < 300 else "Error"
        if shape and status != 204:
            self.check(shape, value, f"{method} {path.partition('?')[0]} {status}")


def unique(values: list[Any], path: str) -> None:
    """Duplicates in a list that feeds a list view crash the app."""
    for value in values:
        if values.count(value) > 1:
            raise DecodeError(path, f"duplicate {value!r}")


def shape_of(method: str, path: str) -> str | None:
    """The shape a route answers with; None for routes that answer raw bytes or that no app decodes."""
    parts = path.partition("?")[0].split("/")
    best: tuple[int, str] | None = None
    for verb, pattern, shape in ROUTES:
        names = pattern.split("/")
        fits = len(names) == len(parts) and all(n.startswith(":") or n == part for n, part in zip(names, parts))
        if verb == method and fits:
            literal = sum(not name.startswith(":") for name in names)
            best = max(best or (-1, ""), (literal, shape))
    return best[1] if best else None


# ======================================================================================================================
# HTTP
# ======================================================================================================================


@dataclass
class Response:
    """An HTTP answer as it came, gzip undone; header names are lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Json:
        return load_json(self.body) if self.body else None


def pinned_context() -> ssl.SSLContext:
    """A TLS context that accepts any certificate: the app checks the pinned fingerprint, not the chain."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def certificate_fingerprint(der: bytes) -> str:
    return "sha256:" + b64u(hashlib.sha256(der).digest())


def b64u(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def quote(segment: str) -> str:
    """Percent-encode one path segment the way iOS does."""
    return urllib.parse.quote(segment, safe="!$&'()*+,;=:@-._~")


@dataclass
class Turn:
    """What `Phone.prompt` sent and the frame that settled it."""

    request_id: str
    client_turn_id: str
    frame: Frame | None = None


PhoneT = TypeVar("PhoneT", bound="Phone")


class Phone:
    """One phone of one generation: REST client, socket client and strict decoder."""

    def __init__(
        self, base_url: str, token: str = "", generation: str = "1.1", *, tls_fingerprint: str | None = None
    ) -> None:
        self.base_url, self.token, self.generation = base_url.rstrip("/"), token, generation
        self.tls_fingerprint = tls_fingerprint
        self.send_timeout = SEND_TIMEOUT
        self.decoder = Decoder(generation)
        self.socket: ClientConnection | None = None
        self.session_id: str | None = None  # of the per-session socket
        self.frames: list[Frame] = []  # decoded frames, over all sockets of this phone
        self.arrivals: list[int] = []  # time.monotonic_ns() of each of them
        self.unknown: list[Frame] = []  # frames of a type this app ignores
        self.rejected: list[str] = []  # frames the app would have dropped
        self.errors: list[PhoneError] = []  # not yet raised
        self.last_seq: dict[str, int] = {}
        self.replay_from: dict[str, int] = {}
        self.closed: tuple[int, str] | None = None
        self._cursor = 0
        self._news = threading.Condition()
        self._reading = threading.Event()
        self._reader: threading.Thread | None = None

    def __enter__(self: PhoneT) -> PhoneT:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            with contextlib.suppress(PhoneError):
                self.close()

    # ---- REST --------------------------------------------------------------------------------------------------------

    def raw(
        self,
        method: str,
        path: str,
        body: Json | bytes | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = REQUEST_TIMEOUT,
    ) -> Response:
        """Send a request with the app's headers; nothing is decoded.  `bytes` bodies are sent as they are."""
        sent = {"Accept": "*/*", "Accept-Encoding": "gzip, deflate", "User-Agent": "Oppi/1"}
        if self.token:
            sent["Authorization"] = "Bearer " + self.token
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        if data is not None:
            sent["Content-Type"] = "application/json"
        sent.update(headers or {})
        connection = self._connection(timeout)
        try:
            connection.request(method, path, body=data, headers=sent)
            answer = connection.getresponse()
            content = answer.read()
            names = {name.lower(): value for name, value in answer.getheaders()}
        finally:
            connection.close()
        if names.get("content-encoding") == "gzip":
            content = gzip.decompress(content)
        return Response(answer.status, names, content)

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        parts = urllib.parse.urlsplit(self.base_url)
        assert parts.hostname, self.base_url
        if parts.scheme == "http":
            return http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)
        connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=timeout, context=pinned_context())
        connection.connect()
        self._check_pin(connection.sock)
        return connection

    def _check_pin(self, sock: Any) -> None:
        if self.tls_fingerprint and certificate_fingerprint(sock.getpeercert(True)) != self.tls_fingerprint:
            sock.close()
            raise InviteError("the server's certificate is not the pinned one")

    def request(
        self,
        method: str,
        path: str,
        body: Json | bytes | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = REQUEST_TIMEOUT,
    ) -> tuple[int, Json]:
        """(status, decoded body), the body checked against the route's shape or, if not 2xx, the error shape.

        A body that is not JSON by its content type comes back as bytes, an empty one as None.
        """
        answer = self.raw(method, path, body, headers=headers, timeout=timeout)
        kind = answer.headers.get("content-type", "")
        if not answer.body or not kind.startswith("application/json"):
            if shape_of(method, path) and answer.status not in (204, 304):
                raise DecodeError(f"{method} {path} {answer.status}", f"not JSON but {kind!r}: {answer.body[:80]!r}")
            return answer.status, answer.body or None
        value = answer.json()
        self.decoder.response(method, path, answer.status, value)
        return answer.status, value

    def call(self, method: str, path: str, body: Json = None, *, expect: int = 200, timeout: float = 30.0) -> Json:
        """`request` that must answer with `expect`; returns the decoded body."""
        status, value = self.request(method, path, body, timeout=timeout)
        if status != expect:
            raise PhoneError(f"{method} {path}: {status} instead of {expect}: {value!r}")
        return value

    def health(self) -> Json:
        return self.call("GET", "/health")

    def me(self) -> Json:
        return self.call("GET", "/me")

    def pair(self, pairing_token: str, device_name: str = "Test Phone") -> str:
        """Trade a pairing token for a device token and use that from now on."""
        reply = self.call("POST", "/pair", {"pairingToken": pairing_token, "deviceName": device_name})
        self.token = reply["deviceToken"]
        return self.token

    def workspaces(self) -> list[Json]:
        return list(self.call("GET", "/workspaces")["workspaces"])

    def create_workspace(self, name: str = "Test", **fields: Json) -> Json:
        """Create a workspace with the fields the app of this generation always sends."""
        body: dict[str, Json] = {"name": name, "skills": []}
        body.update({"runtime": "host"} if self.generation == "1.0" else {"gitStatusEnabled": False})
        body.update(fields)
        return self.call("POST", "/workspaces", body, expect=201)["workspace"]

    def sessions(self, workspace_id: str | None = None) -> list[Json]:
        """The session list as the app builds it: app 1.0 asks per workspace and crashes on an id seen twice."""
        if workspace_id:
            return list(self.call("GET", f"/workspaces/{quote(workspace_id)}/sessions")["sessions"])
        if self.generation == "1.1":
            return list(self.call("GET", "/sessions")["sessions"])
        found = [item for workspace in self.workspaces() for item in self.sessions(workspace["id"])]
        unique([item["id"] for item in found], "sessions of all workspaces")
        return found

    def create_session(self, workspace_id: str, **fields: Json) -> Json:
        reply = self.call("POST", f"/workspaces/{quote(workspace_id)}/sessions", fields, expect=201)
        if not reply["session"].get("workspaceId"):
            raise DecodeError("session.workspaceId", "missing: the app cannot open such a session")
        return reply["session"]

    def _session_path(self, wid: str, sid: str, tail: str = "") -> str:
        return f"/workspaces/{quote(wid)}/sessions/{quote(sid)}{tail}"

    def session_detail(self, wid: str, sid: str, view: str = "full") -> Json:
        return self.call("GET", self._session_path(wid, sid, f"?view={view}"))

    def events(self, wid: str, sid: str, since: int) -> Json:
        return self.call("GET", self._session_path(wid, sid, f"/events?since={since}"))

    def stop(self, wid: str, sid: str) -> Json:
        return self.call("POST", self._session_path(wid, sid, "/stop"), {})

    def resume(self, wid: str, sid: str) -> Json:
        return self.call("POST", self._session_path(wid, sid, "/resume"), {})["session"]

    def fork(self, wid: str, sid: str, entry_id: str, **fields: Json) -> Json:
        body = {"entryId": entry_id, **fields}
        return self.call("POST", self._session_path(wid, sid, "/fork"), body, expect=201)["session"]

    def delete(self, wid: str, sid: str) -> Json:
        return self.call("DELETE", self._session_path(wid, sid))

    def models(self) -> list[Json]:
        return list(self.call("GET", "/models")["models"])

    def server_info(self) -> Json:
        return self.call("GET", "/server/info")

    def security_profile(self) -> Json:
        return self.call("GET", "/security/profile")

    def pending(self, **query: str) -> list[Json]:
        tail = "?" + urllib.parse.urlencode(query) if query else ""
        return list(self.call("GET", "/permissions/pending" + tail)["pending"])

    # ---- socket ------------------------------------------------------------------------------------------------------

    def open(self, timeout: float = 20.0) -> Frame:
        """App 1.1: open `/stream`; the first frame must be stream_connected."""
        assert self.generation == "1.1", "app 1.0 never opens /stream"
        self._connect("/stream", None)
        return self._first("stream_connected", timeout)

    def open_session(self, wid: str, sid: str, timeout: float = 20.0) -> Frame:
        """App 1.0: open the session's own socket; the first frame must be connected."""
        assert self.generation == "1.0", "app 1.1 opens only /stream"
        self._connect(self._session_path(wid, sid, "/stream"), sid)
        return self._first("connected", timeout)

    def connect_raw(self, path: str, **options: Any) -> ClientConnection:
        """A bare socket with this phone's token, for tests that speak nonsense.  The caller closes it."""
        headers = {"Authorization": "Bearer " + self.token} if self.token else {}
        options.setdefault("compression", "deflate" if self.generation == "1.1" else None)
        if self.base_url.startswith("https"):
            options.setdefault("ssl", pinned_context())
        url = "ws" + self.base_url[len("http") :] + path
        headers.update(options.pop("additional_headers", {}))
        return connect(
            url, additional_headers=headers, max_size=MAX_FRAME, proxy=None, open_timeout=20, close_timeout=5, **options
        )

    def _connect(self, path: str, sid: str | None) -> None:
        self.close()
        self.session_id, self.closed = sid, None
        self.mark()
        self.socket = self.connect_raw(path)
        if self.base_url.startswith("https"):
            self._check_pin(self.socket.socket)
        self._reading.set()
        self._reader = threading.Thread(target=self._read, args=(self.socket,), daemon=True)
        self._reader.start()

    def _first(self, kind: str, timeout: float) -> Frame:
        frame = self.wait(lambda _: True, timeout)
        if frame["type"] != kind:
            raise DecodeError("first frame", f"{frame['type']} instead of {kind}")
        return frame

    def _read(self, connection: ClientConnection) -> None:
        """Reader thread: decode every frame until the socket closes."""
        try:
            while True:
                self._reading.wait()
                text = connection.recv()
                self._accept(text, time.monotonic_ns())
        except ConnectionClosed as error:
            closing = error.rcvd or error.sent
            code, reason = (closing.code, closing.reason) if closing else (1006, "")
            if error.sent and error.sent.code in (1002, 1007, 1009) and not error.rcvd_then_sent:
                self._complain(DecodeError("frame", f"violates the protocol or is too large: {error.sent}"), "")
        with self._news:
            if connection is self.socket:
                self.closed = (code, reason)
            self._news.notify_all()

    def _accept(self, text: str | bytes, when: int) -> None:
        try:
            frame = load_json(text)
            known = self.decoder.message(frame)
            if known:
                self._check_session(frame)
        except DecodeError as error:
            self._complain(error, text if isinstance(text, str) else repr(text))
            return
        with self._news:
            if known:
                self._track(frame)
                self.frames.append(frame)
                self.arrivals.append(when)
            else:
                self.unknown.append(frame)
            self._news.notify_all()

    def _complain(self, error: PhoneError, text: str) -> None:
        with self._news:
            self.rejected.append(text)
            self.errors.append(error)
            self._news.notify_all()

    def _check_session(self, frame: Frame) -> None:
        """App 1.1 drops a session's frame that does not say whose it is."""
        if self.generation != "1.1" or frame.get("sessionId") or frame["type"] in UNBOUND_TYPES:
            return
        if frame["type"] == "command_result" and frame["command"] in UNBOUND_RESULTS and frame.get("requestId"):
            return
        raise DecodeError(f"$({frame['type']}).sessionId", "missing on /stream: the app drops the frame")

    def _track(self, frame: Frame) -> None:
        """Sequence numbers of a session strictly increase, except where this phone asked for a replay."""
        sid = frame.get("sessionId") or self.session_id
        if not sid:
            return
        last = self.last_seq.get(sid, 0)
        if frame["type"] == "connected" and frame.get("currentSeq") is not None:
            if frame["currentSeq"] < last:
                self.errors.append(SequenceError(f"{sid}: connected says {frame['currentSeq']}, {last} was seen"))
            self.last_seq[sid] = self.replay_from.pop(sid, frame["currentSeq"])
        seq = frame.get("seq")
        if seq is None:
            return
        if seq <= last:
            self.errors.append(SequenceError(f"{sid}: {frame['type']} has seq {seq} after {last}"))
        self.last_seq[sid] = max(seq, last)

    def stall(self) -> None:
        """Stop reading frames, as a phone in a tunnel; the library's queue and the kernel's buffers then fill up."""
        self._reading.clear()

    def unstall(self) -> None:
        self._reading.set()

    def raise_errors(self) -> None:
        """Raise the first complaint of the reader thread, once."""
        with self._news:
            found, self.errors = self.errors, []
        if found:
            others = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise type(found[0])(*_arguments(found[0], others))

    def mark(self) -> int:
        """Make later `wait` calls look only at frames that arrive from now on; returns the position."""
        with self._news:
            self._cursor = len(self.frames)
            return self._cursor

    def since(self, mark: int | None = None) -> list[Frame]:
        with self._news:
            return self.frames[self._cursor if mark is None else mark :]

    def types(self, since: int | None = None) -> list[str]:
        """The types of the frames since a mark (default: the last one)."""
        return [frame["type"] for frame in self.since(since)]

    def text(self, since: int | None = None) -> str:
        """The text_delta frames since a mark, joined."""
        return "".join(frame["delta"] for frame in self.since(since) if frame["type"] == "text_delta")

    def wait(
        self,
        what: str | Predicate,
        timeout: float = 20.0,
        *,
        since: int | None = None,
        **fields: Json,
    ) -> Frame:
        """The first frame since the mark with this type (or for which `what` is true) and these field values.

        Does not move the mark, so frames may be awaited in any order.  Raises the reader's complaints, NoFrame on
        timeout and when the socket closed without such a frame.
        """
        matches = (lambda frame: frame["type"] == what) if isinstance(what, str) else what
        deadline, position = time.monotonic() + timeout, self._cursor if since is None else since
        while True:
            self.raise_errors()
            with self._news:
                while position < len(self.frames):
                    frame = self.frames[position]
                    position += 1
                    if matches(frame) and all(frame.get(name) == value for name, value in fields.items()):
                        return frame
                left = deadline - time.monotonic()
                if left <= 0 or (self.closed and not self.errors):
                    raise NoFrame(self._missing(what, fields, since))
                if not self.errors:
                    self._news.wait(left)

    def _missing(self, what: str | Predicate, fields: Mapping[str, Json], since: int | None) -> str:
        start = self._cursor if since is None else since
        name = what if isinstance(what, str) else "a frame for the predicate"
        state = f"socket closed {self.closed}" if self.closed else "timeout"
        tail = "\n  ".join(json.dumps(frame, ensure_ascii=False)[:300] for frame in self.frames[start:][-12:])
        return f"{state} waiting for {name} {dict(fields) or ''}; frames since the mark:\n  {tail or '(none)'}"

    def news(self, known: int, timeout: float) -> None:
        """Wait until there are more than `known` frames, a complaint, or the end of the socket."""
        with self._news:
            self._news.wait_for(lambda: len(self.frames) > known or self.closed or self.errors, timeout)

    def quiet(self, what: str | Predicate, duration: float, **fields: Json) -> None:
        """Assert that no matching frame arrives within `duration` seconds."""
        try:
            frame = self.wait(what, duration, **fields)
        except NoFrame:
            return
        raise PhoneError(f"unexpected frame: {json.dumps(frame)[:400]}")

    def send(self, type: str, **fields: Json) -> None:
        """Send one message; fields whose value is None are left out."""
        self.send_text(json.dumps({"type": type, **{k: v for k, v in fields.items() if v is not None}}))

    def send_text(self, text: str | bytes) -> None:
        assert self.socket is not None, "no socket is open"
        self.socket.send(text)

    def _address(self, sid: str | None) -> dict[str, Json]:
        """App 1.1 names the session in every message, app 1.0 has a socket per session."""
        return {"sessionId": sid} if self.generation == "1.1" and sid else {}

    def result(self, command: str, request_id: str, timeout: float = 20.0, *, since: int = 0) -> Frame:
        """The result of a command, matched on command AND requestId as the apps do."""
        kind = RESULT_TYPE[self.generation]
        return self.wait(kind, timeout, since=since, command=command, requestId=request_id)

    def command(
        self, type: str, sid: str | None = None, *, timeout: float = 20.0, check: bool = False, **fields: Json
    ) -> Frame:
        """Send a command with a fresh requestId and return its result frame; `check` demands success."""
        request_id, start = new_id(), len(self.frames)
        self.send(type, **self._address(sid), requestId=request_id, **fields)
        frame = self.result(type, request_id, timeout, since=start)
        if check and not frame["success"]:
            raise CommandFailed(f"{type}: {frame.get('error')}")
        return frame

    def subscribe(
        self, sid: str, level: str = "full", since: int | None = None, *, timeout: float = 35.0, check: bool = True
    ) -> list[Frame]:
        """Subscribe on `/stream`; returns that session's frames from the request to the result, in order."""
        start = len(self.frames)
        if since is not None and level == "full":
            self.replay_from[sid] = since
        frame = self.command("subscribe", sid, timeout=timeout, level=level, sinceSeq=since)
        self.replay_from.pop(sid, None)
        if check and not frame["success"]:
            raise CommandFailed(f"subscribe: {frame.get('error')}")
        with self._news:
            end = self.frames.index(frame, start) + 1
            found = [item for item in self.frames[start:end] if item.get("sessionId") == sid or item is frame]
        begins = [item["type"] for item in found if item["type"] in ("connected", "state")][:1]
        if check and level == "full" and begins != ["connected"]:
            raise PhoneError(f"a full subscription must begin with connected: {[item['type'] for item in found]}")
        return found

    def unsubscribe(self, sid: str) -> Frame:
        return self.command("unsubscribe", sid, check=True)

    def prompt(
        self,
        sid: str,
        text: str,
        client_turn_id: str | None = None,
        wait: str | None = "dispatched",
        *,
        kind: str = "prompt",
        request_id: str | None = None,
        timeout: float | None = None,
        **fields: Json,
    ) -> Turn:
        """Send a turn by the apps' contract and set the mark just before it.

        `wait` is an acknowledgement stage (that one or a later one settles it), "result", or None to return at once.
        A failed result raises CommandFailed.  A success result settles a stage wait only if no stage was seen.
        """
        turn = Turn(request_id or new_id(), client_turn_id or new_id())
        start = self.mark()
        ids = {"requestId": turn.request_id, "clientTurnId": turn.client_turn_id}
        self.send(kind, **self._address(sid), message=text, **ids, **fields)
        if wait:
            found = self.wait(self._settles(kind, turn, wait), timeout or self.send_timeout, since=start)
            if found.get("success") is False:
                raise CommandFailed(f"{kind}: {found.get('error')}")
            turn.frame = found
        return turn

    def _settles(self, command: str, turn: Turn, stage: str) -> Predicate:
        stages, result = ENUMS["Stage"].split(), RESULT_TYPE[self.generation]
        seen: list[str] = []

        def settled(frame: Frame) -> bool:
            if frame.get("command") != command:
                return False
            if frame["type"] == result and frame.get("requestId") == turn.request_id:
                return not frame["success"] or stage == "result" or not seen
            if frame["type"] != "turn_ack" or stage == "result":
                return False
            if frame.get("requestId") != turn.request_id and frame["clientTurnId"] != turn.client_turn_id:
                return False
            seen.append(frame["stage"])
            return stages.index(frame["stage"]) >= stages.index(stage)

        return settled

    def answer(self, permission_id: str, action: str, scope: str | None = None, **fields: Json) -> None:
        """Answer an approval as the apps do: no requestId, no sessionId, the scope `once` left out."""
        self.send("permission_response", id=permission_id, action=action, scope=scope, **fields)

    def answer_dialog(self, dialog_id: str, sid: str | None = None, **answer: Json) -> None:
        """Answer an extension dialog with value=…, confirmed=… or cancelled=True."""
        self.send("extension_ui_response", **self._address(sid), id=dialog_id, **answer)

    def wait_closed(self, timeout: float = 20.0) -> tuple[int, str]:
        """(code, reason) with which the socket was closed; 1006 if it just broke."""
        deadline = time.monotonic() + timeout
        with self._news:
            while not self.closed:
                if not self._news.wait(max(0.0, deadline - time.monotonic())) and time.monotonic() >= deadline:
                    raise NoFrame(f"socket still open after {timeout} s")
            found = self.closed
        self.raise_errors()
        return found

    def drop(self) -> None:
        """Lose the connection without a closing handshake, as when the network goes away."""
        if self.socket is not None:
            self._reading.set()
            with contextlib.suppress(OSError):
                self.socket.socket.shutdown(socket.SHUT_RDWR)  # a mere close would not wake the reader
            self._finish()

    def close(self, code: int = 1000) -> None:
        """Close the socket, wait for the reader, raise what it complained about."""
        if self.socket is not None:
            self._reading.set()
            self.socket.close(code)
            self._finish()
        self.raise_errors()

    def _finish(self) -> None:
        if self._reader is not None:
            self._reader.join(10)
        self.socket, self._reader = None, None


def _arguments(error: PhoneError, others: str) -> tuple[str, ...]:
    """Constructor arguments to raise the same complaint in another thread."""
    if isinstance(error, DecodeError):
        return error.path, error.problem + others
    return (str(error) + others,)


def new_id() -> str:
    return str(uuid.uuid4())


# ======================================================================================================================
# Invites
# ======================================================================================================================

ENVELOPE_FIELDS = "v:int alg:str kid:str iat:int exp:int nonce:str publicKey:str payload:InvitePayload sig:str"
SHAPES["InvitePayload"] = "host:str port:int token:str name:str fingerprint:str securityProfile:str"
INVITE_V3_FIELDS = (
    "v:int host:str port:int scheme?:str token:str pairingToken?:str name:str tlsCertFingerprint?:str fingerprint?:str"
)
CLOCK_SKEW = 300  # s: how far in the future a v2 invite may have been issued


@dataclass(frozen=True)
class Invite:
    """What an app keeps of a scanned invite, either version."""

    version: int
    host: str
    port: int
    token: str
    name: str
    fingerprint: str
    scheme: str = "http"
    pairing_token: str = ""
    tls_fingerprint: str | None = None
    kid: str = ""
    security_profile: str = ""
    envelope: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def base_url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


def unb64u(text: str) -> bytes:
    """Decode base64url; padding is optional."""
    if not re.fullmatch(r"[A-Za-z0-9_-]*={0,2}", text):
        raise ValueError("not base64url")
    return base64.urlsafe_b64decode(text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4))


def invite_json(text: str, version: int) -> str:
    """The invite's JSON, from the text of a QR code or from a deep link."""
    if text.lstrip().startswith("{"):
        return text
    link = urllib.parse.urlsplit(text.strip())
    if link.scheme.lower() not in ("oppi", "pi") or (link.netloc or link.path.strip("/")) not in ("connect", "pair"):
        raise InviteError(f"not an invite link: {text[:40]!r}")
    query = dict(urllib.parse.parse_qsl(link.query))
    if query.get("v", "") not in ("", str(version)):
        raise InviteError(f"link is for version {query['v']}, not {version}")
    try:
        return unb64u(query["invite"]).decode("utf-8")
    except (KeyError, ValueError):
        if "payload" not in query:
            raise InviteError("link has no readable invite") from None
        return query["payload"]


def _invite_object(text: str, version: int, generation: str, fields: str) -> dict[str, Any]:
    source = invite_json(text, version)
    try:
        value = load_json(source)
        Decoder(generation).fields(fields, value, "invite")
    except DecodeError as error:
        raise InviteError(str(error)) from None
    if value["v"] != version:
        raise InviteError(f"v is {value['v']}, not {version}")
    return dict(value)


def _check_address(host: str, port: int) -> None:
    if not host or not 1 <= port <= 65535:
        raise InviteError(f"unusable address {host!r}:{port}")


def signing_input(envelope: Mapping[str, Any]) -> bytes:
    """The 13 lines a v2 signature covers."""
    payload = envelope["payload"]
    lines = [f"{key}={envelope[key]}" for key in ("v", "alg", "kid", "iat", "exp", "nonce", "publicKey")]
    lines += [f"{key}={payload[key]}" for key in ("host", "port", "token", "name", "fingerprint", "securityProfile")]
    return "\n".join(lines).encode("utf-8")


def parse_invite_v2(text: str, now: float | None = None) -> Invite:
    """Everything app 1.0 checks in a signed invite (QR text or link); `now` is Unix time in seconds."""
    envelope = _invite_object(text, 2, "1.0", ENVELOPE_FIELDS)
    now = time.time() if now is None else now
    if envelope["alg"] != "Ed25519":
        raise InviteError(f"algorithm {envelope['alg']}")
    if envelope["exp"] < now or envelope["iat"] > now + CLOCK_SKEW:
        raise InviteError(f"expired or not yet valid: iat {envelope['iat']}, exp {envelope['exp']}, now {now:.0f}")
    try:
        key = Ed25519PublicKey.from_public_bytes(unb64u(envelope["publicKey"]))
        key.verify(unb64u(envelope["sig"]), signing_input(envelope))
    except (InvalidSignature, ValueError):
        raise InviteError("bad signature") from None
    payload = envelope["payload"]
    _check_address(payload["host"], payload["port"])
    if not payload["token"]:
        raise InviteError("no token")
    return Invite(
        2,
        payload["host"],
        payload["port"],
        payload["token"],
        payload["name"],
        payload["fingerprint"],
        kid=envelope["kid"],
        security_profile=payload["securityProfile"],
        envelope=envelope,
    )


def parse_invite_v3(text: str) -> Invite:
    """Everything app 1.1 checks in an unsigned invite (QR text or link)."""
    value = _invite_object(text, 3, "1.1", INVITE_V3_FIELDS)
    _check_address(value["host"], value["port"])
    scheme, pairing = value.get("scheme") or "http", value.get("pairingToken") or ""
    if scheme not in ("http", "https"):
        raise InviteError(f"scheme {scheme!r}")
    if not value["token"] and not pairing:
        raise InviteError("neither token nor pairing token")
    return Invite(
        3,
        value["host"],
        value["port"],
        value["token"],
        value["name"],
        value.get("fingerprint") or "",
        scheme,
        pairing,
        value.get("tlsCertFingerprint"),
        envelope=value,
    )


def host_class(host: str) -> str:
    """tailnet, local or public, by app 1.0's own (textual) rule."""
    name = host.strip("[]").lower()
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(name)
        if address.version == 4 and address in ipaddress.ip_network("100.64.0.0/10"):
            return "tailnet"
        if address.version == 4:
            local = ("10.0.0.0/8", "127.0.0.0/8", "192.168.0.0/16", "172.16.0.0/12", "169.254.0.0/16")
            return "local" if any(address in ipaddress.ip_network(net) for net in local) else "public"
    if name.endswith(".ts.net") or name.startswith("fd7a:115c:a1e0:"):
        return "tailnet"
    if name == "localhost" or name.endswith(".local") or not set(".:") & set(name):
        return "local"
    return "local" if name == "::1" or name.startswith(("fe80:", "fc", "fd")) else "public"


def check_transport(host: str, profile: Mapping[str, Any]) -> None:
    """App 1.0 speaks plain HTTP only and refuses to where the profile forbids that."""
    kind = host_class(host)
    if kind == "tailnet" and profile.get("allowInsecureHttpInTailnet") is False:
        raise InviteError("plain HTTP is not allowed in the tailnet")
    if kind == "public" and profile.get("requireTlsOutsideTailnet") is True:
        raise InviteError("plain HTTP is not allowed to a public host")


def check_profile(invite: Invite, profile: Mapping[str, Any]) -> None:
    """What a v2 invite promises must be what the server reports."""
    identity = profile["identity"]
    pairs = (
        ("fingerprint", invite.fingerprint if identity["fingerprint"] else "", identity["fingerprint"]),
        ("kid", invite.kid, identity["keyId"]),
        ("securityProfile", invite.security_profile, profile["profile"]),
    )
    for name, promised, reported in pairs:
        if promised and promised != reported:
            raise InviteError(f"{name} is {reported!r}, the invite says {promised!r}")


def bootstrap_10(invite: Invite | str) -> Phone:
    """Pair as app 1.0 does after decoding a v2 invite; any failure aborts."""
    invite = parse_invite_v2(invite) if isinstance(invite, str) else invite
    phone = Phone(invite.base_url, invite.token, "1.0")
    phone.health()
    profile = phone.security_profile()
    check_transport(invite.host, profile)
    check_profile(invite, profile)
    phone.me()
    if not (invite.fingerprint or profile["identity"]["fingerprint"]):
        raise InviteError("a server without fingerprint cannot be stored")
    phone.sessions()
    return phone


def bootstrap_11(invite: Invite | str) -> Phone:
    """Pair as app 1.1 does after decoding a v3 invite; any failure aborts."""
    invite = parse_invite_v3(invite) if isinstance(invite, str) else invite
    phone = Phone(invite.base_url, invite.token, "1.1", tls_fingerprint=invite.tls_fingerprint)
    if invite.pairing_token:
        phone.pair(invite.pairing_token)
    phone.health()
    phone.me()
    if not invite.fingerprint:
        raise InviteError("a server without fingerprint cannot be stored")
    phone.sessions()
    return phone
