"""Reads YAML in which each key of a mapping occurs once: the library itself takes the last one, and says nothing.

Numbers have the forms of YAML 1.1 and of JSON: 1e-3 is a number.
"""

from __future__ import annotations

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value} occurs twice", key.start_mark
                    )
                keys.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        if "\0" in node.value or any("\ud800" <= c <= "\udfff" for c in node.value):  # no path can contain them
            raise yaml.constructor.ConstructorError(
                None, None, "a text with a NUL or half of a surrogate pair", node.start_mark
            )
        return super().construct_scalar(node)


# A number such as 1e-3: in YAML 1.1, which the library reads, it is a text without a dot and a sign of the exponent.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_yaml(text: str) -> Any:
    """Return the value of a YAML document. Raises `yaml.YAMLError`.

    A repeated key raises it too, and so does a NUL or half of a surrogate pair in a text. A value that its tag does not
    permit, such as the date 2026-13-45, raises what its constructor raises.
    """
    return yaml.load(text, _Loader)
