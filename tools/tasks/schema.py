"""JSON Schema as far as the tasks use it: types, properties, required, enum, items.

The checks of json_answers.py and the tests of tool_calls.py validate with it. A keyword that is not
known is an error, so that no schema asks for what is not checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}
_KNOWN = {"type", "properties", "required", "enum", "items", "description"}


def fits(schema: Mapping[str, Any], value: object) -> bool:
    """Whether a JSON value is what the schema describes; objects may have no other properties.

    Raises:
      ValueError: the schema uses a keyword beyond those above.
    """
    if unknown := schema.keys() - _KNOWN:
        raise ValueError(f"schema: got {sorted(unknown)}, must be among {sorted(_KNOWN)}")
    kind = schema["type"]
    if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        if not set(schema.get("required", ())) <= value.keys() <= properties.keys():
            return False
        return all(fits(properties[name], entry) for name, entry in value.items())
    if isinstance(value, list):
        return all(fits(schema["items"], entry) for entry in value)
    return True
