"""Writes ``docs/report.schema.json``, the JSON Schema of ``report.json``: ``python docs/generate_schema.py``."""

import json
from pathlib import Path

import msgspec

from evit_deploy.report.report import FORMAT, Report

PATH = Path(__file__).with_name("report.schema.json")


def schema() -> str:
    """The schema, as it stands in the file."""
    title = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"report.json, format {FORMAT}"}
    return json.dumps(title | msgspec.json.schema(Report), indent=1) + "\n"


if __name__ == "__main__":
    PATH.write_text(schema())
