"""A short ledger loop (see tests/ledger.py, which runs longer by hand), and that its checks can fail."""

from __future__ import annotations

import pytest

from tests import ledger
from tests.fleet import missing_tools


def event(name: str, before: str | None, after: str, epoch: int, attempt: int = 1) -> dict[str, object]:
    """A row of job_events, as far as `replay` looks at it."""
    return {"event": name, "from_state": before, "to_state": after, "epoch": epoch, "attempt": attempt}


STORY = [
    event("submitted", None, "pending", 0, 0),
    event("claimed", "pending", "running", 1),
    event("started", "running", "running", 1),
    event("adopted", "running", "running", 2),
    event("completed", "running", "completed", 2),
]


def test_a_true_story_passes_the_replay() -> None:
    assert ledger.replay(STORY) == []


@pytest.mark.parametrize(
    ("story", "complaint"),
    [
        (STORY[:-1], "0 final events"),
        ([*STORY, event("completed", "completed", "completed", 2)], None),
        ([*STORY, event("failed", "running", "failed", 2)], "2 final events"),
        ([*STORY[:3], event("adopted", "running", "running", 1), STORY[4]], "adopted without a new epoch"),
        ([*STORY[:4], event("completed", "running", "completed", 1)], "epoch fell from 2 to 1"),
        ([STORY[0], event("completed", "pending", "completed", 0)], "illegal transition"),
        ([STORY[0], *STORY[2:]], "comes from running, but the job was pending"),
    ],
)
def test_the_replay_sees_what_must_not_be(story: list[dict[str, object]], complaint: str | None) -> None:
    found = ledger.replay(story)
    if complaint is None:
        assert found == []  # a note after the end changes nothing
    else:
        assert any(complaint in text for text in found), found


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_no_promise_is_broken_while_server_and_nodes_are_killed() -> None:
    reason = missing_tools()
    if reason is not None:
        pytest.skip(reason)
    book, wrong = ledger.run(45, 8, seed=1)
    print(ledger.report(book, wrong))
    assert wrong == []
    assert book.counts["submitted"] >= 20
    assert book.counts["server kills in all"] >= 8
