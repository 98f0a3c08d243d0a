"""What is done about a change between two steps: the queue is kept, dropped or checked, and the user told."""

import itertools

import pytest

from picardopt.audit.surroundings import Drop, Keep, OuterChanges, Recheck


def test_no_change_keeps_the_queue() -> None:
    policy = OuterChanges()
    for exact, queued in itertools.product([True, False], repeat=2):
        assert policy.look([], exact=exact, queued=queued) == Keep()
    assert policy.dropped == 0
    assert policy.message() is None


def test_tolerance_zero_drops_at_any_change() -> None:
    policy = OuterChanges()
    assert policy.look(["weight"], exact=True, queued=True) == Drop(("weight",))
    assert "`weight`" in (policy.message() or "")
    assert policy.look(["weight"], exact=True, queued=True) == Drop(("weight",))
    assert policy.message() is None  # said once
    assert (policy.dropped, policy.names["weight"]) == (2, 2)


@pytest.mark.parametrize("exact", [True, False])
def test_nothing_is_dropped_where_nothing_is_queued(exact: bool) -> None:
    policy = OuterChanges()
    assert policy.look(["weight"], exact=exact, queued=False) == Keep()
    assert policy.dropped == 0


def test_what_does_no_harm_is_looked_at_once() -> None:
    policy = OuterChanges()
    assert policy.look(["step", "log"], exact=False, queued=True) == Recheck(("step", "log"))
    policy.harmless(["step", "log"])
    for _ in range(20):
        assert policy.look(["step", "log"], exact=False, queued=True) == Keep()
    assert policy.look(["step", "weight"], exact=False, queued=True) == Recheck(("weight",))
    policy.harmful(["weight"])
    assert policy.look(["step"], exact=False, queued=True) == Keep()
    text = policy.message() or ""
    assert "`weight`" in text
    assert "step`" not in text
    assert policy.dropped == 1
    # A tolerance that is set to 0 later holds for all names.
    assert policy.look(["step"], exact=True, queued=True) == Drop(("step",))


def test_an_innocent_name_beside_a_harmful_one_gets_another_look() -> None:
    policy = OuterChanges()
    policy.look(["step", "weight"], exact=False, queued=True)
    policy.harmful(["step", "weight"])
    assert policy.look(["step"], exact=False, queued=True) == Recheck(("step",))
    policy.harmless(["step"])
    assert policy.look(["step"], exact=False, queued=True) == Keep()


@pytest.mark.parametrize("exact", [True, False])
def test_a_change_at_every_step_is_said_with_the_remedy(exact: bool) -> None:
    policy, texts = OuterChanges(), []
    for _ in range(30):
        if isinstance(policy.look(["batch"], exact=exact, queued=True), Recheck):
            policy.harmful(["batch"])
        texts.append(policy.message())
    said = [text for text in texts if text]
    assert len(said) == 2
    assert "closure(step)" in said[1]
    assert "`batch`" in said[1]
    assert policy.dropped == 30


def test_now_and_then_is_not_every_step() -> None:
    policy = OuterChanges()
    for step in range(300):
        policy.look(["weight"] if step % 50 == 49 else [], exact=True, queued=True)
    assert policy.dropped == 6
    assert "between two steps" in (policy.message() or "")


def test_long_lists_of_names_are_cut() -> None:
    policy = OuterChanges()
    policy.look([f"target.{index}.weight" for index in range(40)], exact=True, queued=True)
    assert "and 37 more" in (policy.message() or "")
