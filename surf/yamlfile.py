"""YAML files in which no key stands twice: YAML itself would take the last one and forget the others."""

from pathlib import Path
from typing import Any

import yaml

from surf.errors import SurfError


class _Loader(yaml.SafeLoader):
    pass


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        if (key.tag, key.value) in seen:
            raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
        seen.add((key.tag, key.value))
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read(path: str | Path) -> Any:
    """The content of a YAML file.

    Raises:
        SurfError: it cannot be read, or a key stands twice in one mapping.
    """
    try:
        return yaml.load(Path(path).read_text(), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SurfError(f"cannot be read: {error}", where=str(path), expected="a YAML file") from None
