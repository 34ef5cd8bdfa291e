"""Which values cross between two segments, and which of them come back as cotangents."""

from __future__ import annotations

from p2ptrain.bundle.manifest import Manifest, SegmentKind, Value


def cotangent_positions(before: SegmentKind, after: SegmentKind) -> tuple[bool, ...]:
    """Which values between two segments have a cotangent: those differentiable on both sides."""
    leaving = [port.differentiable for port in before.outputs if port.role == "boundary"]
    entering = [port.differentiable for port in after.inputs if port.role == "boundary"]
    return tuple(a and b for a, b in zip(leaving, entering, strict=True))


def cotangent_values(manifest: Manifest, segment: int) -> tuple[Value, ...]:
    """The values between `segment` and the next that have a cotangent, in their order."""
    kinds = [manifest.kinds[manifest.segments[index].kind] for index in (segment, segment + 1)]
    values, positions = manifest.boundary(segment), cotangent_positions(*kinds)
    return tuple(value for value, has in zip(values, positions, strict=True) if has)
