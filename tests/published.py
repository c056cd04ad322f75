"""Reads what a verb of `kvbm` wrote with `--json`, and sees that it is what its published schema says."""

import json
from pathlib import Path

import jsonschema

SCHEMAS = Path(__file__).parent.parent / "docs" / "reference" / "schemas"


def published(verb, text):
    """Give the document.

    Args:
        verb: The words behind `kvbm`.
        text: What was written, or the document already.
    """
    document = json.loads(text) if isinstance(text, str) else text
    schema = json.loads((SCHEMAS / f"{verb.replace(' ', '-')}.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(document)
    return document
