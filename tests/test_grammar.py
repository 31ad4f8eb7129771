"""Whatever a model would rather say, an answer under a schema follows it; whatever a schema asks, it is bounded."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import jsonschema
import pytest
import torch
from test_service import Reader, ask

import duoserve
from duoserve.api import compiling, grammar
from duoserve.api.grammar import mask_for
from duoserve.core import Refusal
from duoserve.sampling import Draw, Sampling
from duoserve.service import Busy, Limits, Service

STR = {"type": "string", "maxLength": 6}
INT = {"type": "integer"}


def obj(required: bool = True, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required else [],
        "additionalProperties": False,
    }


TREE = {"$defs": {"n": obj(v=INT, c={"type": "array", "maxItems": 2, "items": {"$ref": "#/$defs/n"}})}}
SCHEMAS: dict[str, dict[str, Any]] = {
    "integer": INT,
    "range": {"type": "integer", "minimum": -3, "maximum": 17},
    "exclusive": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "number": {"type": "number"},
    "multiple": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "string": STR,
    "length": {"type": "string", "minLength": 2, "maxLength": 4},
    "pattern": {"type": "string", "pattern": "^[a-c]{2,5}-[0-9]+$"},
    "date": {"type": "string", "format": "date"},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "enum": {"enum": ["red", "green", "blue"]},
    "mixed enum": {"enum": ["red", 1, None, {"a": [1]}]},
    "const": {"const": {"k": "v"}},
    "types": {"type": ["integer", "null"]},
    "any of": {"anyOf": [INT, obj(a=INT)]},
    "one of": {"oneOf": [{"type": "integer"}, {"type": "boolean"}]},
    "all of": {"allOf": [obj(a=INT) | {"additionalProperties": True}, {"properties": {"a": {"minimum": 5}}}]},
    "object": obj(name={"enum": ["x", "y"]}, age=INT),
    "optional": obj(required=False, a=INT, b={"type": "boolean"}, c={"type": "null"}),
    "nested": obj(a=obj(b=obj(c={"type": "boolean"}))),
    "map": {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 2},
    "pattern properties": {
        "type": "object",
        "patternProperties": {"^k[0-9]$": INT},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    "array": {"type": "array", "items": INT, "minItems": 1, "maxItems": 3},
    "tuple": {"type": "array", "prefixItems": [INT, {"type": "boolean"}], "items": False, "minItems": 2},
    "matrix": {"type": "array", "maxItems": 2, "items": {"type": "array", "maxItems": 2, "items": INT}},
    "objects": {"type": "array", "maxItems": 2, "items": obj(k={"enum": ["p", "q"]})},
    "ref": {"$defs": {"p": obj(x=INT)}, "type": "array", "items": {"$ref": "#/$defs/p"}, "maxItems": 2},
    "tree": TREE | {"$ref": "#/$defs/n"},
    "unicode": obj(**{"ключ": {"enum": ["да", "нет"]}, 'q"uote': INT}),
    "anything": {},
    "any object": {"type": "object"},
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    with duoserve.load(None, predictor="none", sequences=3) as engine:
        yield engine


@pytest.fixture(scope="module")
def tokenizer(engine: Any) -> Any:
    return engine.tokenizer


def asked(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def completed(mask: Any, tokenizer: Any, ids: list[int], dice: random.Random) -> str:
    """`ids` and what may follow until the end, closing what is open wherever that may be."""
    ids, eos = list(ids), tokenizer.eos_token_id
    closers = {
        t for t in range(len(tokenizer)) if tokenizer.decode([t]).strip() in ('"', "}", "]", "]}", '"}', '"]', "}}")
    }
    for _ in range(1500):
        allowed = mask(torch.tensor(ids, dtype=torch.long)).nonzero().flatten().tolist()
        if eos in allowed:
            return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        closing = [t for t in allowed if t in closers]
        ids.append(dice.choice(closing or allowed))
    raise AssertionError(f"no end in sight: {tokenizer.decode(ids)[:300]}")


def test_every_answer_of_the_demo_follows_its_schema(engine: Any, tokenizer: Any) -> None:
    """At a temperature where the model would say anything. What ends by length is the beginning of what follows."""
    service = Service(engine, Limits(active=3, queue=99))
    readers = {
        name: Reader(
            service,
            ask(
                engine,
                "Go on",
                max_new=8,
                sampling=Sampling(temperature=8.0, seed=n),
                mask=mask_for(asked(s), tokenizer),
            ),
        )
        for n, (name, s) in enumerate(SCHEMAS.items())
    }
    finishes = {}
    for n, (name, reader) in enumerate(readers.items()):
        end = reader.end()
        assert end.finish in ("stop", "length"), (name, end.error)
        text, finishes[name] = reader.text, end.finish
        if end.finish == "length":
            text = completed(mask_for(asked(SCHEMAS[name]), tokenizer), tokenizer, reader.tokens, random.Random(n))
            assert text.startswith(reader.text.rstrip("\ufffd")), name
        jsonschema.validate(json.loads(text), SCHEMAS[name])
    assert sum(finish == "stop" for finish in finishes.values()) >= 8, finishes
    service.close()


@pytest.mark.parametrize("seed", range(2))
def test_every_answer_of_the_dice_follows_its_schema(tokenizer: Any, seed: int) -> None:
    for name, schema in SCHEMAS.items():
        mask, ids = mask_for(asked(schema), tokenizer), [7, 8]
        draw = Draw(Sampling(temperature=1.0, seed=seed), 2, mask)
        noise = torch.Generator().manual_seed(seed)
        for _ in range(40):
            scores = (
                torch.randn((1, len(tokenizer) + 100), generator=noise) * 2
            )  # a vocabulary larger than the tokenizer's
            ids.append(int(draw(torch.tensor([ids]), scores).argmax()))  # type: ignore[arg-type]
            if ids[-1] == tokenizer.eos_token_id:
                text = tokenizer.decode(ids[2:-1], clean_up_tokenization_spaces=False)
                break
        else:
            text = completed(mask_for(asked(schema), tokenizer), tokenizer, ids[2:], random.Random(seed))
        jsonschema.validate(json.loads(text), schema), (name, text)


def test_an_answer_may_end_exactly_where_it_is_whole(tokenizer: Any) -> None:
    schema = obj(a={"enum": [1, 12]}, b={"type": "array", "items": {"type": "boolean"}})
    for text in ('{"a": 12, "b": [true, false]}', '{"a":1,"b":[ ]}', '{\n "a" : 1,\n "b" : []\n}'):
        mask = mask_for(asked(schema), tokenizer)
        ids = tokenizer(text)["input_ids"]
        for n in range(len(ids) + 1):
            allowed_V = mask(torch.tensor(ids[:n], dtype=torch.long))
            assert bool(allowed_V[tokenizer.eos_token_id]) == (n == len(ids)), text
            assert n == len(ids) or allowed_V[ids[n]], (text, n)


def test_blanks_are_bounded_and_indented_json_is_still_written(engine: Any, tokenizer: Any) -> None:
    """The demo knows nothing of JSON: with 40 blanks allowed it filled each gap with them, until its length."""
    schema = obj(name=STR, age={"type": "integer", "minimum": 0, "maximum": 150}, tags={"type": "array", "maxItems": 2})
    service = Service(engine, Limits(active=3))
    readers = [
        Reader(
            service,
            ask(
                engine,
                "A person as JSON",
                max_new=150,
                sampling=Sampling(temperature=float(seed > 0), seed=seed),
                mask=mask_for(asked(schema), tokenizer),
            ),
        )
        for seed in range(3)
    ]
    gap = re.compile(r' |\r?\n[ \t]{0,24}|"(?:[^"\\]|\\.)*"|[^\s"]+')  # or what stands between gaps
    for reader in readers:
        assert reader.end().finish in ("stop", "length")
        text = reader.text[: reader.text.rfind('"') + 1]
        pieces = gap.findall(text)
        assert "".join(pieces) == text and not any(a.isspace() and b.isspace() for a, b in pairwise(pieces)), text
    assert any(reader.end().finish == "stop" for reader in readers)
    service.close()
    value = {"a": [1, {"b": [{"c": [True, {}]}]}], "d": {}}
    for written in (json.dumps(value, indent=n, separators=s) for n, s in ((2, None), (3, None), (None, (",", ":")))):
        mask, ids = mask_for({"type": "json_object"}, tokenizer), tokenizer(written)["input_ids"]
        assert all(mask(torch.tensor(ids[:n], dtype=torch.long))[ids[n]] for n in range(len(ids))), written


def test_what_compiles_grammars_can_be_begun_before_it_is_needed(tokenizer: Any) -> None:
    grammar.begin(tokenizer, [0, 7])
    mine = grammar._of(tokenizer, [7, 0])
    process = mine._trial._process
    assert process is not None and process.poll() is None and mine.kept_bytes
    assert mask_for(asked(INT), tokenizer, [0, 7]) is not None and mine._trial._process is process
    slow = type("Slow", (), {"is_fast": False, "eos_token_id": 0})()
    grammar.begin(slow)  # it cannot be masked, which who asks is told
    mine._trial.end()


def test_a_mask_reads_each_token_once(tokenizer: Any) -> None:
    mask = mask_for({"type": "json_object"}, tokenizer)
    ids = torch.tensor(tokenizer('{"a": [1, 2, 3]}')["input_ids"])
    steps = [mask(ids[:n]) for n in range(len(ids) + 1)]
    with pytest.raises(Refusal, match="E_SCHEMA: the grammar failed after"):
        mask(torch.cat([ids, ids]))  # what cannot follow
    again = mask.again()
    assert all(torch.equal(again(ids[:n]), step) for n, step in enumerate(steps))


def test_two_answers_of_one_request_do_not_share_a_mask(tokenizer: Any) -> None:
    one = mask_for({"type": "json_object"}, tokenizer)
    other = one.again()
    one(torch.tensor(tokenizer('{"a":')["input_ids"]))
    begin = other(torch.tensor([], dtype=torch.long))
    assert begin[tokenizer("{")["input_ids"][0]] and not begin[tokenizer("7")["input_ids"][0]]


def test_text_needs_no_mask(tokenizer: Any) -> None:
    assert mask_for(None, tokenizer) is None and mask_for({"type": "text"}, tokenizer) is None


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth - 1):
        schema = {"not": schema}
    return schema


def sized(size: int) -> dict[str, Any]:
    empty = len(grammar.as_text({"description": ""}))
    return {"description": "x" * (size - empty)}


REFUSED: dict[str, tuple[Any, str]] = {
    "no object": (7, "the schema is a int"),
    "a truth": (True, "the schema is a bool"),
    "bytes": (sized(grammar.SCHEMA_BYTES + 1), "has 65537 bytes, at most 65536"),
    "depth": (nested(grammar.SCHEMA_DEPTH + 1), "more than 32 levels"),
    "depth beyond any stack": (nested(100_000), "more than 32 levels"),
    "pattern": ({"type": "string", "pattern": "x" * 4097}, "a pattern of 4097 characters, at most 4096"),
    "pattern property": ({"type": "object", "patternProperties": {"x" * 4097: {}}}, "4097 characters, at most 4096"),
    "a web address": ({"$ref": "http://169.254.169.254/latest"}, "outside itself"),
    "a file": ({"properties": {"a": {"$ref": "file:///etc/passwd"}}}, "outside itself"),
    "another address": ({"$id": "http://a/b", "properties": {"a": {"$ref": "#/c"}}}, "cannot be used"),
    "a dialect": ({"$schema": "http://a/b", "type": "integer"}, "cannot be used"),
    "nowhere": ({"$ref": "#/$defs/none"}, "cannot be used"),
    "itself": ({"$ref": "#"}, "no answer can match it"),
    "a circle": ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "no answer"),
    "type": ({"type": "objekt"}, "Invalid type: objekt"),
    "type of type": ({"type": 5}, "type must be"),
    "properties": ({"properties": [1]}, "properties must be an object"),
    "required": ({"required": "a"}, "Expected array for 'required'"),
    "negative": ({"type": "string", "minLength": -1}, "got -1"),
    "huge": ({"type": "string", "maxLength": 2**63}, "cannot be used"),
    "nan": ({"minimum": float("nan")}, "is no JSON"),
    "half a character": ({"enum": ["\ud800"]}, "is no JSON"),
    "open group": ({"type": "string", "pattern": "("}, "unclosed group"),
    "look ahead": ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
    "not": ({"not": {"type": "string"}}, 'Unimplemented keys: \\["not"\\]'),
    "unique": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    "format": ({"type": "string", "format": "weird"}, "Unknown format: weird"),
    "unsatisfiable": ({"type": "string", "minLength": 5, "maxLength": 2}, "Unsatisfiable"),
    "instructions": ({"type": "object", "x-guidance": {"lenient": True}}, "no keyword"),
    "too many ways": (
        {"allOf": [{"anyOf": [{"required": [f"{i}{j}"]} for j in range(4)]} for i in range(12)]},
        "schema too large",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_schema_that_cannot_be_is_refused_in_one_line(tokenizer: Any, name: str) -> None:
    schema, why = REFUSED[name]
    with pytest.raises(Refusal, match=why) as refusal:
        mask_for(asked(schema), tokenizer)
    assert refusal.value.code == "E_SCHEMA" and "\n" not in str(refusal.value) and len(str(refusal.value)) < 500


def test_at_the_bounds_a_schema_passes(tokenizer: Any) -> None:
    for schema in (sized(grammar.SCHEMA_BYTES), {"type": "string", "pattern": "x" * grammar.REGEX_CHARS}):
        assert mask_for(asked(schema), tokenizer) is not None
    assert grammar.check_schema(nested(grammar.SCHEMA_DEPTH))


SLOW = {
    "patterns to be held apart": {"type": "object", "patternProperties": {f"^{i}x*$": INT for i in range(900)}},
    "patterns to be intersected": {
        "allOf": [{"type": "string", "pattern": f"^(a|b)*a(a|b){{12}}{i}"} for i in range(100)]
    },
    "a large multiple": {"type": "integer", "multipleOf": 10_000_019},
}


def test_what_takes_too_long_is_ended_and_the_next_schema_served(tokenizer: Any) -> None:
    trial = grammar._Trial(grammar._backend(tokenizer), [0])
    trial._start["limit_s"] = 0.3
    for name, schema in SLOW.items():
        assert trial.fault(grammar.json_grammar(schema)) == compiling.OVERRAN, name
        assert trial.fault(grammar.json_grammar(INT)) is None
    process = trial._process
    assert process is not None
    process.kill()
    with pytest.raises(Busy, match="started anew"):
        trial.fault(grammar.json_grammar(INT))
    assert trial.fault(grammar.json_grammar(INT)) is None
    process = trial._process
    trial.end()
    assert process is not None and process.returncode is not None


def test_grammars_are_kept_by_bytes(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "KEPT_BYTES", 400_000)
    kept = grammar._Grammars(tokenizer, [0])
    texts = [grammar.json_grammar({"const": n}) for n in range(9)]
    for text in texts:
        kept.mask(text)
        assert kept.kept_bytes <= 400_000
    assert texts[-1] in kept._kept and texts[0] not in kept._kept
    kept.mask(texts[0])
    assert texts[0] in kept._kept


def test_other_shapes_of_response_format_are_refused(tokenizer: Any) -> None:
    for asked_for in (
        {"type": "grammar"},
        {"type": None},
        {},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {}},
    ):
        with pytest.raises(Refusal, match="E_SCHEMA"):
            mask_for(asked_for, tokenizer)


def test_a_grammar_that_fails_in_an_answer_ends_that_answer_alone(engine: Any) -> None:
    many = {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(2000)}}
    service = Service(engine, Limits(active=2))
    greedy = Sampling(temperature=0)
    failing = Reader(
        service, ask(engine, "Go on", max_new=8, sampling=greedy, mask=mask_for(asked(many), engine.tokenizer))
    )
    other = Reader(
        service, ask(engine, "Go on", max_new=8, sampling=greedy, mask=mask_for(asked(INT), engine.tokenizer))
    )
    end = failing.end()
    assert end.finish == "error" and "E_SCHEMA: the grammar failed after 1 tokens" in str(end.error)
    assert other.end().finish in ("stop", "length") and other.text.strip().lstrip("-").isdigit()
    service.close()


KEYS = ["type", "properties", "items", "anyOf", "allOf", "oneOf", "not", "$ref", "$defs", "enum", "const", "pattern",
        "minimum", "multipleOf", "minItems", "maxLength", "required", "additionalProperties", "patternProperties",
        "prefixItems", "$id", "$schema", "$anchor", "if", "propertyNames"]  # fmt: skip
VALUES = [None, True, 0, -1, 1e308, 2**63, 10**40, 0.1, "", "#", "#/", "#/$defs/n", "string", "object", "^a*$",
          "(a|b)*c{3,900}", [], {}, ["object", "null"], [{}], {"a": {}}, "\x00", [1, 1]]  # fmt: skip


def containers(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from containers(inner)


def mutated(dice: random.Random) -> dict[str, Any]:
    schema = copy.deepcopy(dice.choice([*SCHEMAS.values()]))
    for _ in range(dice.randrange(1, 4)):
        place = dice.choice([*containers(schema)])
        value = copy.deepcopy(dice.choice([*VALUES, dice.choice([*SCHEMAS.values()])]))
        if isinstance(place, dict):
            place[dice.choice([*KEYS, *place])] = value
        else:
            place.append(value)
    return schema


@pytest.mark.parametrize("cases", [150, pytest.param(20_000, marks=pytest.mark.slow)])
def test_whatever_stands_in_a_schema_it_is_taken_or_refused(tokenizer: Any, cases: int) -> None:
    dice, taken = random.Random(cases), 0
    for _ in range(cases):
        schema = mutated(dice)
        try:
            mask, ids = mask_for(asked(schema), tokenizer), []
        except Refusal:
            continue
        taken += 1
        for _ in range(6):
            ids.append(dice.choice(mask(torch.tensor(ids, dtype=torch.long)).nonzero().flatten().tolist()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    assert cases / 10 < taken < cases
