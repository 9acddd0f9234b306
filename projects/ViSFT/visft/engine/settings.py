"""Reads a config file and KEY VALUE pairs into a config, with a helpful error for each mistake."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import yaml
from detectron2.config import CfgNode, get_cfg
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from visft.config import add_visft_config
from visft.errors import ConfigError, unknown

Form = TypeVar("Form")


def load_config(config_file: str | None, opts: Sequence[str] = ()) -> CfgNode:
    """Return the defaults of detectron2 and ViSFT, changed by a YAML file (with its `_BASE_`) and KEY VALUE pairs.

    YAML tags that build Python objects are refused. The returned config is not frozen.

    Raises:
        ConfigError: the file is missing or not a YAML mapping, a key does not exist (the message suggests the nearest
            one), a value has another type, or a pair is incomplete.
    """
    cfg = get_cfg()
    add_visft_config(cfg)
    if config_file:
        for key, value in _leaves(read_yaml(config_file)):
            _set(cfg, key, value, config_file)
    change(cfg, opts)
    return cfg


def change(cfg: CfgNode, opts: Sequence[str]) -> None:
    """Set KEY VALUE pairs in a config.

    Raises:
        ConfigError: as in `load_config`.
    """
    for key, value in pairs(opts):
        _set(cfg, key, value, "command line")


def read_yaml(path: str | os.PathLike, option: str = "--config-file") -> dict[str, Any]:
    """Return the mapping in a YAML file, merged into that of its `_BASE_` if it names one.

    Tags that build Python objects are refused.

    Args:
        option: the command-line option that names the file, for messages.

    Raises:
        ConfigError: the file is missing, not YAML, or not a mapping.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise ConfigError(f"{option} {path}: there is no such file")
    try:
        content = CfgNode.load_yaml_with_base(path, allow_unsafe=False)
    except yaml.constructor.ConstructorError as error:
        raise ConfigError(
            f"{path}: line {error.problem_mark.line + 1} has a tag that builds an object; only plain YAML is read"
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}: not valid YAML{where}: {getattr(error, 'problem', error)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8, so not a config") from error
    except (TypeError, AssertionError) as error:
        raise ConfigError(f"{path}: expected a mapping of keys to values ({error})") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot read it or its _BASE_: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, found {type(content).__name__}")
    return content


def read_form(path: str | os.PathLike, form: type[Form], option: str, like: str) -> Form:
    """Return a YAML file as a dataclass, whose fields define the entries and their types.

    Args:
        option: as in `read_yaml`.
        like: an example file of this form, for messages.

    Raises:
        ConfigError: as in `read_yaml`, or an entry is unknown, missing or of another type.
    """
    found, name, known = OmegaConf.structured(form), "", form.__dataclass_fields__
    try:
        for name, value in read_yaml(path, option).items():
            if name not in known:
                raise unknown(f"{path}: entry", str(name), known)
            found = OmegaConf.merge(found, {name: value})
        return OmegaConf.to_object(found)
    except OmegaConfBaseException as error:
        where, why = error.full_key or name, str(error).splitlines()[0]
        raise ConfigError(f"{path}: `{where}` does not have the form shown in {like} ({why})") from error


def value_of(config: Mapping[str, Any], key: str) -> Any:
    """Return the value of a full key, or None if there is no such key."""
    for part in key.split("."):
        if not isinstance(config, Mapping) or part not in config:
            return None
        config = config[part]
    return config


def _all_keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _all_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _leaves(content: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the full keys and values of nested YAML."""
    for key, value in content.items():
        full = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{full}.")
        else:
            yield full, value


def pairs(opts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the KEY VALUE pairs of a command line."""
    opts = list(opts or ())
    if opts and opts[0] == "--":
        opts = opts[1:]
    for word in opts[::2]:
        if word.startswith("--"):
            raise ConfigError(
                f"command line: `{word}` is among the KEY VALUE pairs; put options before the first pair"
            )
    if len(opts) % 2:
        raise ConfigError(f"command line: expected KEY VALUE pairs, but `{opts[-1]}` has no value after it")
    yield from zip(opts[::2], opts[1::2], strict=True)


def words(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return config keys and values as KEY VALUE words for a command line."""
    return tuple(word for key, value in values.items() for word in (key, str(value)))


def _set(cfg: CfgNode, key: str, value: Any, source: str) -> None:
    if cfg.key_is_deprecated(key):  # this call logs a warning
        return
    node: Any = cfg
    for part in key.split("."):
        if not isinstance(node, CfgNode) or part not in node:
            raise unknown(f"{source}: key", key, _all_keys(cfg))
        node = node[part]
    if isinstance(node, CfgNode):
        raise ConfigError(f"{source}: {key} is a section, not a key; its keys are {', '.join(node)}")
    decoded = CfgNode._decode_cfg_value(value)
    if isinstance(node, str) and not isinstance(node, bool) and not isinstance(decoded, str):
        decoded = value if isinstance(value, str) else decoded  # a name that looks like a number
    elif isinstance(node, float) and type(decoded) is int:
        decoded = float(decoded)
    elif isinstance(node, (list, tuple)) and isinstance(decoded, (list, tuple)):
        decoded = type(node)(decoded)
    if node is not None and type(decoded) is not type(node):
        raise ConfigError(
            f"{source}: {key} is {decoded!r}, of type {type(decoded).__name__}; expected "
            f"{type(node).__name__}, like its default {node!r}"
        )
    owner, _, name = key.rpartition(".")
    target = cfg
    for part in owner.split(".") if owner else ():
        target = target[part]
    target[name] = decoded
