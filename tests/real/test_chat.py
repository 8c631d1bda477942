"""The phone in the terminal with a real pi."""

from __future__ import annotations

from tests.support.screen import screen

from .conftest import Chat


def test_an_approval_in_the_terminal(chat: Chat) -> None:
    """A prompt, live text, a command that runs only after `y`, and everything a phone beside it sees."""
    server = chat.server
    env = {**server.env, "OPPI_DATA_DIR": str(server.data)}
    with screen(server.command("chat", chat.sid), env) as shown:
        shown.shows("Type a message")
        shown.keys("-l", '!tool bash {"command": "git push origin main || echo really ran"}')
        shown.keys("Enter")
        shown.shows("? bash", "    git push origin main || echo really ran", "y allow once   n deny")
        chat.wait("permission_request")
        assert "really ran\n" not in chat.phone.text()
        shown.keys("y")
        shown.shows("Allowed once")
        output = chat.wait(lambda f: f["type"] == "tool_output" and "really ran" in f["output"])
        assert output
        chat.wait("agent_end")
        shown.keys("-l", "!say goodbye")
        shown.keys("Enter")
        chat.wait("message_end", role="assistant", content="goodbye")
        shown.shows("goodbye")
        shown.keys("C-d")
        shown.shows("ended with 0")


