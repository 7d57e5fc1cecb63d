"""JSON schemas of a public suite: what the model completes is valid, however wild its sampling."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jsonschema

SUITE = json.loads((Path(__file__).parent / "json_schemas.json").read_text())["schemas"]
SCHEMAS = SUITE[:: 1 if os.environ.get("ALL_SCHEMAS") else 6]
BATCH = 24
EOS = 2


def test_every_completed_reply_is_valid_and_most_are_completed(server):
    closing = [token for text in ('"', "}", "]") for token in tokens(server, text)]
    params = {
        "temperature": 1.5,
        "max_new_tokens": 96,
        "logit_bias": dict.fromkeys([EOS, *closing], 8.0),  # or strings would have no end
    }
    completed = 0
    for start in range(0, len(SCHEMAS), BATCH):
        some = SCHEMAS[start : start + BATCH]
        replies = server.generate(
            text=["A short example, as JSON:\n"] * len(some),
            sampling_params=[
                {**params, "json_schema": json.dumps(schema), "seed": start + i}
                for i, schema in enumerate(some)
            ],
        )
        for schema, reply in zip(some, replies, strict=True):
            reason = reply["meta_info"]["finish_reason"]["type"]
            assert reason in ("stop", "length"), schema
            if reason == "stop":
                check(reply["text"], schema)
                completed += 1
    print(f"{completed} of {len(SCHEMAS)} replies were completed")
    assert completed > len(SCHEMAS) * 0.7


def tokens(server, text: str) -> list[int]:
    return server.post("/tokenize", {"text": text}).json()["tokens"]


def check(text: str, schema: dict) -> None:
    validator = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    validator(schema, format_checker=validator.FORMAT_CHECKER).validate(json.loads(text))
