"""The names of a table's classes, where the bundle has none: found once, kept in the cache."""

from __future__ import annotations

from collections.abc import Iterable

from p2ptrain.data.cache import CacheWriter, cached
from p2ptrain.data.files import digest_of
from p2ptrain.data.labels import infer_class_names
from p2ptrain.data.records import Wanted
from p2ptrain.data.tables import Table


def table_class_names(
    table: Table, field: str, values: Iterable[object], wanted: Wanted
) -> tuple[str, ...]:
    """Names by label, empty for numbers; `values` are read only if they were never read before.

    Raises:
        DataError: the values are words, but not as many as the model has classes.
    """
    classes = wanted.manifest.data.classes
    if wanted.class_names or not classes:
        return wanted.class_names
    key = digest_of({
        "class names": 1, "table": table.file.digest, "header": table.header, "field": field,
        "kind": wanted.manifest.data.kind, "classes": classes,
    })  # fmt: skip

    def make(writer: CacheWriter) -> None:
        writer.facts["names"] = infer_class_names(
            values, wanted.manifest, what=str(table.file.path)
        )

    return tuple(cached(wanted.cache, key, make).facts["names"])
