"""What a member has promised holds: a step that it was in the middle of is made again."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from p2ptrain.agreement.run_messages import ViewPrepare
from p2ptrain.runtime.views.view_work import ViewWork
from p2ptrain.training.messages import Done
from tests.disturbed_runs import SECONDS_MAX, Disturbed, assert_same, request, undisturbed
from tests.memory_group import memory_group, until


async def test_step_that_a_promise_left_out_is_recorded_by_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its record would say that the step counts, and the promise that its state is lost."""
    alone_path = tmp_path / "alone"
    alone_path.mkdir()
    alone = await trio.to_thread.run_sync(undisturbed, alone_path)
    told: list[Done] = []
    tell = ViewWork._tell_done

    def noted(work: ViewWork, done: Done) -> None:
        tell(work, done)
        if work.plan.home == work._services.device:
            told.append(done)

    monkeypatch.setattr(ViewWork, "_tell_done", noted)
    async with memory_group(tmp_path, 2) as group:
        run, home, other = Disturbed(group), group[0], group[1].device
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request(tmp_path, stages=2))
                await run.wait_step(5)
                member = home.runs.member
                assert member is not None
                assert member.view is not None
                before = member.view
                async with group.held_link(home.device, other):
                    # An activation that has not arrived: the step cannot be complete.
                    count = len(group.tensors)

                    def held_back() -> list[int]:
                        sent = group.tensors[count:]
                        return [
                            h.step for _, to, h in sent if (to, h.kind) == (other, "activation")
                        ]

                    await until(lambda: bool(held_back()))
                    (under_way,) = set(held_back())
                    home.drops = lambda message: isinstance(message, ViewPrepare)
                    member.want("to be sure", after_s=0.0)
                    await until(lambda: member.machine.promised)
                await until(lambda: bool(told) and told[-1].step == under_way)
                home.drops = lambda message: False
                await until(lambda: member.view is not before)
                view = member.view
        assert view is not None
        assert view.resume_step == under_way - 1
        assert view.restoration is not None
        assert view.restoration.replays == ()
    assert run.result is not None
    assert_same(run.result, alone)
