from pathlib import Path

import pytest
from pydantic import BaseModel, TypeAdapter

from mosaicbert.completion import keys_of
from mosaicbert.config.jobs import ClassifyConfig, GlueConfig, PretrainConfig
from mosaicbert.config.reference import PARTS, reference, rows
from mosaicbert.config.units import UNITS, unit

PAGE = Path(__file__).parents[2] / "docs/configuration.md"


def test_the_page_is_that_of_the_schema():
    assert PAGE.read_text() == reference(), (
        "run: python -m mosaicbert.config.reference > docs/configuration.md"
    )


@pytest.mark.parametrize(("_heading", "prefix", "schema", "but"), PARTS, ids=lambda x: str(x)[:30])
def test_every_key_has_a_meaning_and_an_example_that_is_allowed(_heading, prefix, schema, but):
    for key, kind, _default, example, meaning in rows(prefix, schema, but):
        assert meaning, key
        assert kind, key
        assert unit(key, kind), key
        name = key.removeprefix(prefix)
        fields = {
            field.alias or field_name: field for field_name, field in schema.model_fields.items()
        }
        assert fields[name].annotation is not None
        TypeAdapter(fields[name].annotation).validate_python(
            example.model_dump() if isinstance(example, BaseModel) else example, strict=False
        )


@pytest.mark.parametrize("schema", [PretrainConfig, ClassifyConfig, GlueConfig])
def test_no_key_is_missing_from_the_page(schema):
    listed = {row[0] for part in PARTS for row in rows(*part[1:])}
    for key in keys_of(schema):
        general = key.replace("eval_loader.", "train_loader.")
        assert general in listed, key


def test_every_unit_is_that_of_a_key():
    names = {row[0].rpartition(".")[2] for part in PARTS for row in rows(*part[1:])}
    assert set(UNITS) <= names
