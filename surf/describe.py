"""Documents made from the config's own descriptions, so that they cannot drift.

python -m surf.describe schema > surf/config.schema.json
python -m surf.describe keys > docs/config.md
"""

import json
import sys
from typing import Any, Literal, get_args, get_origin

from pydantic_core import PydanticUndefined

from surf.config import SECTIONS, Config, Demo, Variant
from surf.sections import Section

HEAD = """# Config

Every key of `config.yaml`. Made by `python -m surf.describe keys > docs/config.md` from `surf/config.py` and its sections.

A change of a key reruns its stage, unless it is marked *knob* (speed and places only) or *workflow* (read by the Snakefile).
"""


def schema() -> str:
    """JSON schema of config.yaml, as editors want it."""
    return json.dumps(Config.model_json_schema(), indent=2, sort_keys=True) + "\n"


def keys() -> str:
    """A Markdown table for each section."""
    lines = [HEAD]
    top = {name: field for name, field in Config.model_fields.items() if name not in SECTIONS}
    lines += ["## Top level\n", *_table(top), "", *_section("demo", Demo)]
    for name, section in SECTIONS.items():
        lines += _section(name, section)
    lines += _section("variants.NAME", Variant)
    return "\n".join(lines)


def _section(name: str, section: type[Section]) -> list[str]:
    """The section's table, and those of the sections within it."""
    lines = [f"## {name}\n", f"{' '.join((section.__doc__ or '').split())}\n", *_table(section.model_fields), ""]
    for key, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            lines += _section(f"{name}.{key}", field.annotation)
        for part in get_args(field.annotation):
            if isinstance(part, type) and issubclass(part, Section):
                lines += _section(f"{name}.{key}.NAME", part)
    return lines


def _table(fields: dict[str, Any]) -> list[str]:
    lines = ["| Key | Default | What it is |", "|---|---|---|"]
    for name, field in fields.items():
        role = (field.json_schema_extra or {}).get("role")
        default = "required" if field.default is PydanticUndefined else f"`{_plain(field.default)}`"
        lines.append(f"| `{name}`{f' *{role}*' if role else ''} | {default} | {_described(field)} |")
    return lines


def _described(field: Any) -> str:
    """The field's description, and the words that it allows."""
    words = ", ".join(f"`{word}`" for word in _words(field.annotation))
    if not words:
        return field.description or ""
    lead = "Any of" if get_origin(field.annotation) is list else "One of" if ", " in words else "Or the word"
    return f"{field.description or ''} {lead} {words}.".lstrip()


def _words(annotation: Any) -> list[str]:
    """Values of the Literal types within a type."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [word for part in get_args(annotation) for word in _words(part)]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        value = {
            key: item.model_dump(exclude_defaults=True) if hasattr(item, "model_dump") else item for key, item in value.items()
        }
    if hasattr(value, "model_dump"):
        value = value.model_dump()
    return json.dumps(value).replace("|", "\\|")


if __name__ == "__main__":
    made = {"schema": schema, "keys": keys}
    if len(sys.argv) != 2 or sys.argv[1] not in made:
        sys.exit("usage: python -m surf.describe schema|keys")
    print(made[sys.argv[1]](), end="")
