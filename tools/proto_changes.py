"""What of a protobuf contract breaks those who know an earlier state of it. Pure; called by
tools/protos.py.

Clients may hold on to numbers and types (the wire), to names (JSON, and code written against the
stubs), to presence and to methods. Adding to any of it breaks nobody.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)


def breaking_changes(before: FileDescriptorSet, after: FileDescriptorSet) -> list[str]:
    """One line a change that breaks a client of `before`: where, what it was, what it is."""
    found: list[str] = []
    for old, new, name in _pairs(before.file, after.file):
        found += [f"{name}: removed"] if new is None else _in_file(old, new)
    return found


def _in_file(old: FileDescriptorProto, new: FileDescriptorProto) -> Iterator[str]:
    if old.package != new.package:
        yield f"{old.name}: package: was {old.package}, is {new.package}"
    yield from _in_types(old.package, old.message_type, new.message_type, _in_message)
    yield from _in_types(old.package, old.enum_type, new.enum_type, _in_enum)
    yield from _in_types(old.package, old.service, new.service, _in_service)


def _in_types(scope: str, before: Any, after: Any, compare: Any) -> Iterator[str]:
    for old, new, name in _pairs(before, after):
        where = f"{scope}.{name}"
        if new is None:
            yield f"{where}: removed"
        else:
            yield from compare(where, old, new)


def _in_message(where: str, old: DescriptorProto, new: DescriptorProto) -> Iterator[str]:
    fields = {field.number: field for field in new.field}
    names = {field.name: field for field in new.field}
    for field in old.field:
        at = f"{where}.{field.name}"
        now = fields.get(field.number)
        if now is not None and now.name == field.name:
            yield from _in_field(at, _facts(old, field), _facts(new, now))
        elif field.name in names:
            yield f"{at}: number: was {field.number}, is {names[field.name].number}"
        elif now is not None:
            yield f"{at}: renamed to {now.name}, or its number {field.number} used again"
        else:
            yield f"{at}: removed"
    yield from _in_reserved(where, old, new)
    yield from _in_types(where, old.nested_type, new.nested_type, _in_message)
    yield from _in_types(where, old.enum_type, new.enum_type, _in_enum)


def _in_field(where: str, old: dict[str, str], new: dict[str, str]) -> Iterator[str]:
    for what, was in old.items():
        if new[what] != was:
            yield f"{where}: {what}: was {was}, is {new[what]}"


def _facts(message: DescriptorProto, field: FieldDescriptorProto) -> dict[str, str]:
    """What clients rely on, in words. An optional field lies in a oneof of its own; that is how
    presence is spelled, and no oneof that anybody sees."""
    in_oneof = field.HasField("oneof_index") and not field.proto3_optional
    has_presence = in_oneof or field.proto3_optional or field.type == field.TYPE_MESSAGE
    return {
        "type": field.type_name or FieldDescriptorProto.Type.Name(field.type),
        "cardinality": FieldDescriptorProto.Label.Name(field.label),
        "presence": "explicit" if has_presence else "implicit",
        "oneof": message.oneof_decl[field.oneof_index].name if in_oneof else "none",
        "JSON name": field.json_name,
    }


def _in_reserved(where: str, old: DescriptorProto, new: DescriptorProto) -> Iterator[str]:
    """What was reserved must not be used again, nor be free to be."""
    kept = [range(r.start, r.end) for r in new.reserved_range]
    for r in old.reserved_range:
        shown = f"{r.start}" if r.end == r.start + 1 else f"{r.start} to {r.end - 1}"
        used = [f.name for f in new.field if r.start <= f.number < r.end]
        if used:
            yield f"{where}: reserved {shown}: used again, by {', '.join(used)}"
        elif not all(any(n in numbers for numbers in kept) for n in (r.start, r.end - 1)):
            yield f"{where}: reserved {shown}: reserved no more"
    for name in old.reserved_name:
        if any(field.name == name for field in new.field):
            yield f"{where}: reserved {name!r}: used again"
        elif name not in new.reserved_name:
            yield f"{where}: reserved {name!r}: reserved no more"


def _in_enum(where: str, old: EnumDescriptorProto, new: EnumDescriptorProto) -> Iterator[str]:
    for value, now, name in _pairs(old.value, new.value):
        if now is None:
            yield f"{where}.{name}: removed"
        elif now.number != value.number:
            yield f"{where}.{name}: number: was {value.number}, is {now.number}"


def _in_service(
    where: str, old: ServiceDescriptorProto, new: ServiceDescriptorProto
) -> Iterator[str]:
    for method, now, name in _pairs(old.method, new.method):
        at = f"{where}.{name}"
        if now is None:
            yield f"{at}: removed"
            continue
        for what in ("input_type", "output_type", "client_streaming", "server_streaming"):
            was, is_ = getattr(method, what), getattr(now, what)
            if was != is_:
                yield f"{at}: {what.replace('_', ' ')}: was {was}, is {is_}"


def _pairs(before: Any, after: Any) -> Iterator[tuple[Any, Any, str]]:
    """Each entry of `before`, its namesake in `after` or None, and their name."""
    found = {entry.name: entry for entry in after}
    for entry in before:
        yield entry, found.get(entry.name), entry.name
