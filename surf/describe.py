"""Documents made from the config's own descriptions, so that they cannot drift.

python -m surf.describe schema > surf/config.schema.json
python -m surf.describe keys > docs/config.md
"""

import json
import sys
from typing import Any

from pydantic_core import PydanticUndefined

from surf.config import SECTIONS, Config

HEAD = """# Config

Every key of `config.yaml`. Made by `python -m surf.describe keys > docs/config.md`; edit the descriptions in `surf/config.py`.

A change of a key reruns its stage, unless it is marked *knob* (speed and places only) or *workflow* (read by the Snakefile).
"""


def schema() -> str:
    """JSON schema of config.yaml, as editors want it."""
    return json.dumps(Config.model_json_schema(), indent=2, sort_keys=True) + "\n"


def keys() -> str:
    """A Markdown table for each section."""
    lines = [HEAD]
    top = {name: field for name, field in Config.model_fields.items() if name not in SECTIONS}
    lines += ["## Top level\n", *_table(top), ""]
    for name, section in SECTIONS.items():
        lines += [f"## {name}\n", f"{(section.__doc__ or '').strip()}\n", *_table(section.model_fields), ""]
    return "\n".join(lines)


def _table(fields: dict[str, Any]) -> list[str]:
    lines = ["| Key | Default | What it is |", "|---|---|---|"]
    for name, field in fields.items():
        role = (field.json_schema_extra or {}).get("role")
        default = "required" if field.default is PydanticUndefined else f"`{_plain(field.default)}`"
        lines.append(f"| `{name}`{f' *{role}*' if role else ''} | {default} | {field.description or ''} |")
    return lines


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        value = {key: item.model_dump() if hasattr(item, "model_dump") else item for key, item in value.items()}
    if hasattr(value, "model_dump"):
        value = value.model_dump()
    return json.dumps(value).replace("|", "\\|")


if __name__ == "__main__":
    made = {"schema": schema, "keys": keys}
    if len(sys.argv) != 2 or sys.argv[1] not in made:
        sys.exit("usage: python -m surf.describe schema|keys")
    print(made[sys.argv[1]](), end="")
