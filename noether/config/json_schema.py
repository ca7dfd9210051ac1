"""A JSON schema (draft 2020-12) of the YAML of a configuration, which editors use for completion and checks.

Texts, types, defaults and ranges come from the settings classes. The schema accepts whatever the loader accepts; the
loader checks more, such as that dotted paths exist.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final

from noether.config.bounds import find_bounds
from noether.config.compatibility import SECTIONS, TRAINER, translation_of
from noether.config.default_callbacks import DEFAULT
from noether.config.docstrings import argument_texts, docstring_of, inherited_texts
from noether.config.init_settings import InitSettings
from noether.config.objects.kinds import SAMPLER, Kind
from noether.config.optimizer_settings import SETTINGS_OF_KIND, OptimizerSettings, ScheduleSettings
from noether.config.reference import fields_in_yaml, read_sections, section_in
from noether.config.schema import Config, Dataset
from noether.config.structure.signatures import parameters
from noether.config.trainer_settings import EvaluateSettings, TrainerSettings

if TYPE_CHECKING:
    from noether.config.compatibility import Translation

Schema = dict[str, Any]

_REFERENCE: Final[Schema] = {"$ref": "#/$defs/reference"}
_KIND: Final[Schema] = {
    "type": "object",
    "properties": {"kind": {"type": "string", "description": "Dotted path; its settings are beside it."}},
    "required": ["kind"],
}
_PATH_OR_KIND: Final[Schema] = {"anyOf": [{"type": "string"}, _KIND]}
_SCALARS: Final[Mapping[Any, str]] = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    type(None): "null",
    Kind: "string",
}


def make_schema() -> Schema:
    """Return the schema of a whole configuration.

    Example:
        >>> make_schema()["properties"]["trainer"]["anyOf"][0]["properties"]["max_batch_size"]["anyOf"][0]
        {'type': 'integer', 'minimum': 1}
    """
    root = _section(Config)
    root["properties"]["vars"] = {"type": "object", "description": read_sections()[-1].setting.text}
    definitions = {
        "reference": {
            "type": "string",
            "pattern": r"\$\{",
            "description": "A reference such as ${trainer.max_epochs}.",
        },
        "callback": _callback(),
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A configuration of noether",
        **root,
    } | {"$defs": definitions}


def _section(section: type) -> Schema:
    """Return the schema of a section."""
    texts, known, properties = argument_texts(docstring_of(section)), parameters(section), dict[str, Schema]()
    required = []
    for key, (field, annotation) in fields_in_yaml(section).items():
        schema = _value(annotation, _range(section, field, annotation))
        schema = schema | {"description": re.sub(r"\bNone\b", "null", texts[field])}
        if known[field].default is known[field].empty:
            required.append(key)
        elif isinstance(known[field].default, (int, float, str)):
            schema["default"] = known[field].default
        properties[key] = schema
    return _complete(section, {"type": "object", "properties": properties, "required": required})


def _complete(section: type, schema: Schema) -> Schema:
    """Return the schema of a section with what its fields do not say: open settings, and other forms that load."""
    properties = schema["properties"]
    if section is EvaluateSettings:
        del properties["NAME"]
        from noether.core.callbacks.metric_functions import METRICS

        # The loader leaves other names to the callback that measures them.
        metrics = {"type": "array", "items": {"anyOf": [{"enum": ["loss", *METRICS]}, _PATH_OR_KIND]}, "minItems": 1}
        return schema | {"required": [], "additionalProperties": _or_reference(metrics)}
    if section is OptimizerSettings:
        return schema | {"required": ["kind", "lr"]}
    if section is ScheduleSettings:
        path = {"type": "string", "pattern": "[.]"}
        properties["kind"] |= _or_reference({"enum": [*SETTINGS_OF_KIND]}, path, _KIND)
        has_path = {"properties": {"kind": {"type": "string", "pattern": r"[.]|\$\{"}}, "required": ["kind"]}
        return schema | {"if": has_path, "else": {"propertyNames": {"enum": [*properties]}}}
    if section is Config:
        properties["data"] = _data(properties["data"])
        properties["callbacks"] |= _or_reference(_callbacks())
        schema["required"] = [name for name in schema["required"] if name != "callbacks"]
        _add_older(properties, SECTIONS)
    if section is TrainerSettings:
        properties["callbacks"] = _or_reference(_callbacks(), null=True) | {"deprecated": True}
        _add_older(properties, TRAINER)
    return schema | {"additionalProperties": False}


def _data(schema: Schema) -> Schema:
    dataset = _value(Dataset, {})
    count = {
        "anyOf": [*_PATH_OR_KIND["anyOf"], _REFERENCE],
        "description": argument_texts(docstring_of(Config))["batch_size"],
    }
    mapping = {
        "type": "object",
        "properties": {"batch_size": count},
        "additionalProperties": dataset,
        "required": ["train"],
    }
    return {"description": schema["description"], **_or_reference(mapping)}


def _add_older(properties: dict[str, Schema], translation: Translation) -> None:
    """Add the settings of the class-based framework that the loader accepts, as deprecated ones."""
    for name, older_values in translation.values.items():
        if name in properties:
            properties[name]["anyOf"].append({"enum": [*older_values]})
    for older, name in translation.renamed.items():
        values = [{"enum": [*translation.values[older]]}] if older in translation.values else []
        forms = [*properties[name]["anyOf"], *values, {"type": "null"}]
        properties[older] = {"anyOf": forms, "deprecated": True, "description": f"Older name of {name}."}
    for name, reason in translation.ignored.items():
        properties.setdefault(name, {"deprecated": True, "description": f"Has no effect: {reason}."})
    for name, instead in translation.replaced.items():
        off = {"enum": [None, {}, "disabled"], "deprecated": True, "description": f"Is no setting here: {instead}."}
        properties.setdefault(name, off)


def _value(annotation: Any, bounds: Schema) -> Schema:
    """Return the schema of a value of an annotated type; a reference may stand for it."""
    return _or_reference(*_forms(annotation, bounds))


def _or_reference(*forms: Schema, null: bool = False) -> Schema:
    return {"anyOf": [*forms, *([{"type": "null"}] if null else []), _REFERENCE]}


def _forms(annotation: Any, bounds: Schema) -> list[Schema]:
    """Return the forms that a value of a type may have in YAML; any form for a type that YAML does not know."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        is_path_too = inside[0] is not Kind or inside[1] is SAMPLER
        return [_PATH_OR_KIND if is_path_too else _KIND]
    if origin in (typing.Union, types.UnionType):
        return [form for each in inside for form in _forms(each, bounds)]
    if annotation is InitSettings:
        return [{"type": "string"}, _section(annotation)]
    if annotation in _SCALARS:
        return [{"type": _SCALARS[annotation], **(bounds if annotation in {int, float} else {})}]
    if origin is typing.Literal:
        return [{"enum": list(inside)}]
    if origin in (tuple, list, Collection) and (len(inside) == 2 and inside[1] is Ellipsis):  # noqa: PLR2004  # tuple[X, ...]
        return [{"type": "array", "items": _value(inside[0], bounds)}]
    if origin is Mapping:
        return [{"type": "object"}]
    if (inner := section_in(annotation)) and inner.__module__.startswith("noether.config."):
        return [_section(inner)]
    return [{}]


def _range(section: type, field: str, annotation: Any) -> Schema:
    bounds = find_bounds(section, field, annotation)
    limits = {
        "minimum": bounds.at_least,
        "exclusiveMinimum": bounds.above,
        "maximum": bounds.at_most,
        "exclusiveMaximum": bounds.below,
    }
    return {keyword: limit for keyword, limit in limits.items() if limit is not None}


def _callbacks() -> Schema:
    items = {"type": "array", "items": {"anyOf": [{"const": DEFAULT}, {"$ref": "#/$defs/callback"}, _REFERENCE]}}
    return {"anyOf": [{"const": DEFAULT}, items]}


def _callback() -> Schema:
    """Return the schema of an item of `callbacks`; its `kind` chooses the settings."""
    from noether.config.descriptions import PREFIX, known_kinds
    from noether.core.callbacks.registry import EXPORTS

    forms, paths = [], []
    for name, aliases in known_kinds().items():
        target: Any = EXPORTS[name].load()
        paths += [f"{PREFIX}.{each}" for each in (name, *aliases)]
        written = {"type": "string", "pattern": rf"^noether[.].*\b({'|'.join((name, *aliases))})$"}
        forms.append({"if": {"properties": {"kind": written}}, "then": _settings_of_callback(target)})
    kind = {"anyOf": [{"enum": paths}, {"type": "string"}], "description": "Dotted path of a callback."}
    return {"type": "object", "properties": {"kind": kind}, "required": ["kind"], "allOf": forms}


def _settings_of_callback(target: Any) -> Schema:
    texts = inherited_texts(target) if isinstance(target, type) else argument_texts(docstring_of(target))
    properties: dict[str, Schema] = {"kind": {}, "name": {}}
    if not isinstance(target, type):
        return {}
    for name, parameter in parameters(target).items():
        forms = [*_forms(parameter.annotation, _range(target, name, parameter.annotation)), {"type": "null"}]
        properties[name] = {"anyOf": [*forms, _REFERENCE], "description": texts.get(name, "")}
    translation = translation_of(target)
    for name in (*translation.renamed, *translation.ignored, *translation.replaced):
        properties.setdefault(name, {"deprecated": True})
    doc = " ".join(docstring_of(target).partition("\n\n")[0].split())
    return {"description": doc, "properties": properties, "propertyNames": {"enum": [*properties]}}
