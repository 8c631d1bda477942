"""The life of a session as the table has it: only the statuses and transitions of the spec, whatever happens in
whatever order, and every promise to the phones kept once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

import oppi

from .support import many

TRIGGERS = sorted({trigger for steps in oppi.LIFE.values() for trigger in steps})
STATUSES = {"starting", "ready", "busy", "stopping", "stopped"}  # `error` is for containers that did not come up
TRANSITIONS = {  # of the statuses phones see (stream 5.1)
    ("starting", "ready"), ("starting", "stopped"), ("ready", "busy"), ("busy", "ready"), ("ready", "stopping"),
    ("busy", "stopping"), ("stopping", "ready"), ("stopping", "busy"), ("ready", "stopped"), ("busy", "stopped"),
    ("stopping", "stopped"),
}  # fmt: skip


def test_every_step_leads_somewhere_and_does_what_exists() -> None:
    for steps in oppi.LIFE.values():
        for step in steps.values():
            assert step.to in oppi.LIFE
            assert all(callable(getattr(oppi.LiveSession, "_" + name)) for name in step.effects)


def test_phones_see_only_the_statuses_and_transitions_of_the_spec() -> None:
    status = oppi.WIRE_STATUS
    assert set(status.values()) == STATUSES
    seen = {(status[state], status[step.to]) for state, steps in oppi.LIFE.items() for step in steps.values()}
    assert {pair for pair in seen if pair[0] != pair[1]} == TRANSITIONS


def test_a_dead_pi_ends_every_state_for_good() -> None:
    for state, steps in oppi.LIFE.items():
        assert steps["exit"].to == "stopped" if state != "stopped" else steps == {}


def test_a_pi_whose_tool_ran_unasked_is_killed_in_every_state_it_can_run_one() -> None:
    assert {state for state, steps in oppi.LIFE.items() if "trip" in steps} == set(oppi.LIFE) - {"starting", "killed", "stopped"}


@many
@given(st.lists(st.sampled_from(TRIGGERS), max_size=40))
def test_whatever_happens_each_turn_ends_once_and_each_stop_is_answered_once(triggers: list[str]) -> None:
    state, open_turns, open_stops = "starting", 0, 0
    for trigger in ["up", *triggers, "exit"]:
        step = oppi.LIFE[state].get(trigger)
        if step is None:
            continue
        tripped, state = state == "killed", step.to
        open_turns += step.effects.count("turn_begun") - step.effects.count("turn_over")
        open_stops += step.effects.count("request_stop")
        open_stops -= sum(step.effects.count(name) for name in ("confirm_stop", "confirm_end", "fail_stop", "give_up"))
        if state in ("killed", "stopped"):
            continue
        assert open_turns == (state in oppi.RUNNING)
        assert open_stops == (state in oppi.STOPPING)
        assert ("abort" in step.effects) <= (state in ("aborting", "quitting"))
    assert state == "stopped"
    assert open_stops == 0 or tripped
