"""The fields of a profile as a Markdown table, from the schema's own descriptions.

python -m qwen_profiles.documentation docs/profiles.md    writes it between the file's two marks
"""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import BaseModel

from qwen_profiles.schema import FrequentTokens, Hardware, Profile, Quality, Recognise, WeightFormat

BEGIN, END = "<!-- fields: begin -->\n", "<!-- fields: end -->"
_MODELS: dict[str, type[BaseModel]] = {
    "": Profile,
    "weights.ROLE.": WeightFormat,
    "frequent_tokens.": FrequentTokens,
    "hardware.": Hardware,
    "hardware.recognise.": Recognise,
    "quality.": Quality,
}


def fields_table() -> str:
    rows = ["| field | default | what |", "| --- | --- | --- |"]
    for prefix, model in _MODELS.items():
        for name, field in model.model_fields.items():
            default = "required" if field.is_required() else f"`{_toml(field.default)}`"
            rows.append(f"| `{prefix}{name}` | {default} | {' '.join((field.description or '').split())} |")
    return "\n".join(rows) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or isinstance(value, Recognise):
        return "not set"
    if isinstance(value, str):
        return f'"{value}"'
    return {"()": "[]"}.get(str(value), str(value))


def main() -> None:
    path = Path(sys.argv[1])
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}{fields_table()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
