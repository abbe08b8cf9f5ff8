"""YAML as its version 1.2 reads it (the core schema): for the settings file and the file of keys.

PyYAML's own rules are YAML 1.1's, where `no` is false, 010 is 8, 22:30 is 1350, 1_0 is 10 and
2026-11-22 a date; here 010 is 10, and all the others are text. A name that is there twice in one
mapping is an error.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_RULES: tuple[tuple[str, re.Pattern[str], str], ...] = (
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), "~nN\0"),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("int", re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), "-+0123456789"),
    (
        "float",
        re.compile(
            r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        "-+.0123456789",
    ),
)
"""Of plain scalars: what matches is of that type, tried in this order; with the first characters
that it can have, `\\0` where it can be empty."""


class CoreLoader(yaml.SafeLoader):
    """Reads."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012  # none of YAML 1.1's

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError) as error:  # of a tag that does not fit, such as !!int x
            problem = f"{node.value!r:.40} is no {node.tag.removeprefix(_TAG)}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value}: is there twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


class _CoreDumper(yaml.SafeDumper):
    """Quotes texts that either version of YAML would take for something else."""


def dump(content: Any) -> str:
    """As text, in the order given."""
    return yaml.dump(content, Dumper=_CoreDumper, sort_keys=False, allow_unicode=True, width=100)


def _whole(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(node.value, 0 if node.value[:2] in ("0o", "0x") else 10)


for name, pattern, first in _RULES:
    letters = ["" if letter == "\0" else letter for letter in first]
    CoreLoader.add_implicit_resolver(_TAG + name, pattern, letters)
    _CoreDumper.add_implicit_resolver(_TAG + name, pattern, letters)
CoreLoader.add_constructor(_TAG + "int", _whole)
