"""Who keeps what others would need: replicas of stages, and a second copy of the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from p2ptrain.ids import DeviceId
from p2ptrain.planner.plan import Plan, StagePlan


def replica_keepers(
    stages: Sequence[StagePlan],
    members: Collection[DeviceId],
    *,
    private_home: DeviceId | None = None,
) -> tuple[DeviceId | None, ...]:
    """For each stage, the member that keeps its replicas; None when nobody is there to, or where
    the stage's own peers have its state anyway. Of tensor shards it is the second (`keepers_of`).
    A private run's home peer (`private_home`) keeps what it runs itself: others could tell inputs
    from the parameters that they train.

    Neighbours are avoided where the group allows, since a stage's logs lie there: losing one
    device then costs a stage either its replica or half its logs, never both. Among the rest the
    one that keeps least so far, counted in parameters; ties go to the lower device id.
    """
    kept: Counter[DeviceId] = Counter()
    keepers: list[DeviceId | None] = []
    for index, stage in enumerate(stages):
        if stage.split in ("replicas", "sequence"):
            keepers.append(None)
            continue
        if stage.device == private_home and len(members) > 1:
            keepers.append(private_home)
            continue
        near = {d for s in stages[max(0, index - 1) : index + 2] for d in s.devices}
        far = [device for device in members if device not in near]
        others = far or [device for device in members if device != stage.device]
        keeper = min(others, key=lambda device: (kept[device], device), default=None)
        if keeper is not None:
            kept[keeper] += stage.parameter_count
        keepers.append(keeper)
    return tuple(keepers)


def keepers_of(plan: Plan, stage_index: int) -> tuple[DeviceId, ...]:
    """Who keeps a stage's replicas: of tensor shards its first peer, too, since whichever device is
    lost, all slices are lost with it but for what another one has kept."""
    keeper = plan.replicas[stage_index] if plan.replicas else None
    if keeper is None:
        return ()
    stage = plan.stages[stage_index]
    return (stage.device, keeper) if stage.split == "tensor" else (keeper,)


def data_holders(
    home: DeviceId,
    stages: Sequence[StagePlan],
    members: Collection[DeviceId],
    *,
    keep_data_here: bool,
    holding: Collection[DeviceId] = (),
) -> tuple[DeviceId, ...]:
    """The home peer and, unless the data stays there, one more member for a second copy.

    One that has the data already (`holding`) is preferred, then one without a stage, then the one
    with the fewest parameters; ties go to the lower device id.
    """
    if keep_data_here:
        return (home,)
    parameters = {device: s.parameter_count for s in stages for device in s.devices}
    others = [device for device in members if device != home]
    if not others:
        return (home,)
    second = min(others, key=lambda d: (d not in holding, parameters.get(d, -1), d))
    return (home, second)
