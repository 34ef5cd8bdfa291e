"""Every control message: whatever is done to its bytes, it is read or refused."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.errors import RemoteProtocolError
from p2ptrain.wire.codec import decode, encode, to_plain
from tests.interop.message_samples import product_messages, sample

MESSAGES = product_messages()
names = st.sampled_from(sorted(MESSAGES))
scalars = (
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats() | st.text(max_size=20) | st.binary(max_size=20)
)  # fmt: skip
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def read_or_refused(body: bytes) -> None:
    """What is read can be written again, and says the same."""
    try:
        value = decode(body)
    except RemoteProtocolError:
        return
    again = decode(encode(value))
    assert repr(again) == repr(value)  # repr: a NaN is not equal to itself


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to every value inside a nested one."""
    found = [path] if path else []
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            found += places(value[key], (*path, key))
    return found


@pytest.mark.parametrize("name", MESSAGES)
def test_message_is_read_as_it_was_written(name: str) -> None:
    value = sample(MESSAGES[name])
    assert decode(encode(value)) == value


@given(name=names, data=st.data())
def test_message_with_one_field_of_anything_is_read_or_refused(
    name: str, data: st.DataObject
) -> None:
    fields = {"t": name, **to_plain(sample(MESSAGES[name]))}
    *path, last = data.draw(st.sampled_from(places(fields)))
    target: Any = fields
    for key in path:
        target = target[key]
    target[last] = data.draw(anything)
    read_or_refused(msgpack.packb(fields, use_bin_type=True))


@given(name=names, data=st.data())
def test_message_with_a_field_missing_or_more_is_read_or_refused(
    name: str, data: st.DataObject
) -> None:
    fields = {"t": name, **to_plain(sample(MESSAGES[name]))}
    if data.draw(st.booleans()):
        del fields[data.draw(st.sampled_from(sorted(fields)))]
    else:
        fields["something newer"] = data.draw(anything)
    read_or_refused(msgpack.packb(fields, use_bin_type=True))


@given(name=names)
def test_unknown_fields_are_ignored(name: str) -> None:
    value = sample(MESSAGES[name])
    fields = {"t": name, **to_plain(value), "something newer": [1]}
    assert decode(msgpack.packb(fields, use_bin_type=True)) == value


@given(body=st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    read_or_refused(body)


@given(fields=st.dictionaries(st.text(max_size=10), anything, max_size=4), name=names)
def test_any_map_is_read_or_refused(fields: dict[str, Any], name: str) -> None:
    read_or_refused(msgpack.packb({"t": name, **fields}, use_bin_type=True))


def test_choice_of_texts_is_checked() -> None:
    body = encode(sample(MESSAGES["view.promise"]))
    assert body.count(b"\xaaactivation") == 2, "a log that is held, and a part of one in a replay"
    for wrong in (b"\xaaactivatiox", b"\xc4\x0aactivation"):
        with pytest.raises(RemoteProtocolError, match="kind"):
            decode(body.replace(b"\xaaactivation", wrong))
