"""From a YAML file and `key=value` overrides to a checked configuration.

OmegaConf reads, merges and resolves `${key}`; pydantic checks. A top-level key that the schema does
not know is allowed where some `${key}` uses it: it is a variable of the file's own.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from mosaicbert.errors import ConfigError, did_you_mean

Schema = TypeVar("Schema", bound=BaseModel)

_REFERENCE = re.compile(r"\$\{\s*([A-Za-z_]\w*)")
_FREE_FORM = {"model_config", "trainer_kwargs", "loggers"}
"""Sections whose null values mean something; elsewhere null is 'not given'."""
_MAY_BE_NULL = {"run_folder"}
"""Keys whose null means none, not the default."""
_OWN_KEY = {"pretrain": "mlm_probability", "classify": "class_weights", "glue": "tasks"}
"""A key that only one job's schema has."""
_SIGNS = {
    "pretrain": "its train_loader has a `dataset`",
    "classify": "its train_loader has a `split` and no `dataset`",
    "glue": "it has `tasks`",
}


def load_config(
    schema: type[Schema],
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
) -> Schema:
    """Read, merge, resolve and check.

    Args:
        schema: the job's schema, such as `PretrainConfig`.
        source: a YAML file, or its content as a mapping.
        overrides: `a.b=c` words that win over the file.

    Raises:
        ConfigError: the file or a word cannot be read, or a key is unknown or its value wrong.
    """
    where = "configuration" if isinstance(source, Mapping) else str(source)
    raw = OmegaConf.create(dict(source)) if isinstance(source, Mapping) else _read(Path(source))
    merged = OmegaConf.merge(raw, _dot_list(overrides))
    used = set(_REFERENCE.findall(yaml.safe_dump(OmegaConf.to_container(merged, resolve=False))))
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{where}: a ${{...}} cannot be resolved: {reason}") from None
    assert isinstance(values, dict)
    known = schema.model_fields
    values = {str(k): v for k, v in values.items() if k in known or k not in used}
    config = check(schema, _without_nulls(values), where)
    _share_tokenizer(config, where)
    return config


def _share_tokenizer(config: Any, where: str) -> None:
    """Give the top-level tokenizer to the sections that name none; another one is an error.

    What encodes the data, sizes the vocabulary and goes into checkpoints must be the same.
    """
    name = getattr(config, "tokenizer_name", None)
    for key in ("model", "train_loader", "eval_loader"):
        section: Any = getattr(config, key, None)
        if hasattr(section, "dataset"):
            key, section = f"{key}.dataset", section.dataset
        if not hasattr(section, "tokenizer_name"):
            continue
        if "tokenizer_name" in section.model_fields_set and section.tokenizer_name != name:
            raise ConfigError(
                f"{where}: {key}.tokenizer_name is {section.tokenizer_name!r}, but tokenizer_name "
                f"is {name!r}. Data, model and checkpoints share one: set tokenizer_name, and "
                "leave the others out."
            )
        section.tokenizer_name = name


def check(schema: type[Schema], values: Mapping[str, Any], where: str = "configuration") -> Schema:
    """Check plain values against a schema; a `ConfigError` lists every key that is wrong."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        ours = next((job for job, key in _OWN_KEY.items() if key in schema.model_fields), None)
        theirs = told_job(values)
        if ours and theirs and theirs != ours:
            raise ConfigError(
                f"{where} is a YAML for `mosaicbert {theirs}`: {_SIGNS[theirs]}. Give it to that "
                f"command, or this one a YAML for `mosaicbert {ours}`."
            ) from None
        raise ConfigError("\n".join([f"{where}:", *_faults(schema, error, values)])) from None


def told_job(values: Mapping[str, Any]) -> str | None:
    """The job that a YAML's content is for, where a section tells."""
    if "tasks" in values:
        return "glue"
    loader = values.get("train_loader")
    if not isinstance(loader, Mapping):
        return None
    return "pretrain" if "dataset" in loader else "classify" if "split" in loader else None


def dump_config(config: BaseModel) -> str:
    """The whole configuration as YAML, defaults included, as it can be read again."""
    values = config.model_dump(mode="json", by_alias=True)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _read(path: Path) -> DictConfig:
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        names = sorted(p.name for p in folder.glob("*.y*ml")) if folder.is_dir() else []
        near = did_you_mean(path.name, names) if folder != path else ""
        hint = f" {folder}/ has: {', '.join(names)}." if names else ""
        what = f"{path} is a folder" if folder == path else f"There is no configuration file {path}"
        raise ConfigError(f"{what}.{near or hint} Name a YAML file.")
    try:
        content = OmegaConf.load(path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{path}{line}: this is not YAML: {problem}.") from None
    except (OmegaConfBaseException, OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{path} must hold keys and values at its top level, not a list.")
    return content


def _dot_list(overrides: Sequence[str]) -> DictConfig:
    for word in overrides:
        key, equals, _ = word.partition("=")
        if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
            raise ConfigError(
                f'"{word}" is no override. Write key=value, such as model.name=mosaic_bert.'
            )
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:  # or not UTF-8
        raise ConfigError(
            f"An override cannot be read: {str(error).splitlines()[0]} (in: {' '.join(overrides)})"
        ) from None


def _without_nulls(values: Any) -> Any:
    """Leave out null values: in the original's templates they mean 'not given'.

    A task of GLUE without settings (`rte:`) is null too, and stays; so do `_MAY_BE_NULL`.
    """
    if not isinstance(values, dict):
        return values
    if isinstance(values.get("tasks"), dict):
        tasks = {name: task or {} for name, task in values["tasks"].items()}
        values = {**values, "tasks": tasks}
    return {
        key: value if key in _FREE_FORM else _without_nulls(value)
        for key, value in values.items()
        if value is not None or key in _MAY_BE_NULL
    }


def _faults(schema: type[BaseModel], error: ValidationError, values: Any) -> list[str]:
    """One line for each key that is wrong: path, what is wrong, what is allowed."""
    found: dict[str, list[str]] = {}
    shown: dict[str, Any] = {}
    listed: set[type[BaseModel]] = set()  # sections whose keys were listed: once is enough
    for details in error.errors():
        path = _path(details["loc"], values)
        name = ".".join(map(str, path))
        if details["type"] == "extra_forbidden":
            section = schema
            for part in path[:-1]:
                section = _section(section, str(part)) or section
            allowed = [field.alias or key for key, field in section.model_fields.items()]
            near = did_you_mean(str(path[-1]), allowed)
            known = near or f" Allowed here: {', '.join(allowed)}." * (section not in listed)
            listed |= set() if near else {section}
            found[name] = [f"unknown key.{known}"]
        elif details["type"] == "missing" and not isinstance(details["loc"][-1], int):
            found[name] = ["this key is needed and has no value."]
        else:
            shown[name] = _at(values, path)
            found.setdefault(name, []).append(_allowed(details))
    lines = []
    for name, faults in found.items():
        if name in shown:
            near = did_you_mean(str(shown[name]), re.findall(r"'([^']+)'", faults[-1]))
            text = f"{shown[name]!r} is not allowed: must be {' or '.join(faults)}.{near}"
        else:
            text = faults[0]
        lines.append(f"  {name}: {text}")
    return lines


def _allowed(details: Mapping[str, Any]) -> str:
    """What pydantic would have taken, in a few words."""
    if details["type"] == "missing" or details["type"] == "too_long":
        return "a list of two values"  # the only lists of a fixed length
    if details["type"] == "list_type":
        return f"a list, such as [{details['input']}]"
    if details["type"] in ("model_type", "dict_type", "model_attributes_type"):
        return "a section of keys, such as {key: value}"
    message: str = details["msg"].removeprefix("Value error, ")
    message = message.removeprefix("Input should be ").split(", unable")[0].split(", got")[0]
    return message.replace("a valid ", "a ").replace("a integer", "an integer").rstrip(".")


def _at(values: Any, path: Sequence[str | int]) -> Any:
    for part in path:
        values = values[part]
    return values


def _path(location: Sequence[str | int], values: Any) -> list[str | int]:
    """The keys of an error's location, without pydantic's names for the members of a union."""
    path: list[str | int] = []
    for part in location:
        inside = isinstance(values, dict) and part in values
        inside = inside or (
            isinstance(values, list) and isinstance(part, int) and part < len(values)
        )
        if inside:
            values = values[part]
            path.append(part)
        elif part == location[-1] and isinstance(values, dict) and "." not in str(part):
            path.append(part)  # a key that is missing
    return path


def _section(schema: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The schema of one key's section, also inside `X | None` and `dict[str, X]`."""
    fields = {field.alias or name: field for name, field in schema.model_fields.items()}
    if key not in fields:
        return None
    candidates = [fields[key].annotation]
    while candidates:
        kind = candidates.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
        candidates.extend(get_args(kind))
    return None
