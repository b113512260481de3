"""Chat templates: from the files of a Hugging Face directory, as GGUF pairs, and back.

A tokenizer has one template, a string, or several by name, of which `default` is taken where no name is given.
"""

import re
from pathlib import Path
from typing import Any

from gguf import Keys

from ramp_jax.models.source import read_json, reason

Templates = str | dict[str, str]

_DEFAULT = "default"
_NAMED = Keys.Tokenizer.CHAT_TEMPLATE_N.format(name="")


def templates_from_directory(folder: Path, config: dict[str, Any]) -> Templates | None:
    """Templates of `chat_template.jinja` and its siblings, else of `tokenizer_config.json`, else `chat_template.json`.

    Raises `ValueError` where a template is not text.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        named = {_DEFAULT: file, **{other.stem: other for other in others}}
        return _simplest({name: _text(path) for name, path in named.items()})
    if config.get("chat_template") is not None:
        return _named(config["chat_template"], folder / "tokenizer_config.json")
    file = folder / "chat_template.json"
    if file.is_file():
        return _named(read_json(file).get("chat_template"), file)
    return None


def templates_to_gguf(templates: Templates | None) -> dict[str, Any]:
    """The pairs that llama.cpp's converter writes: the default one, the others under their names, and these names."""
    if not templates:
        return {}
    named = {_DEFAULT: templates} if isinstance(templates, str) else templates
    others = {re.sub("[^a-zA-Z0-9]", "_", name): text for name, text in named.items() if name != _DEFAULT}
    pairs: dict[str, Any] = {_NAMED + name: text for name, text in others.items()}
    if others:
        pairs[Keys.Tokenizer.CHAT_TEMPLATES] = sorted(others)
    if _DEFAULT in named:
        pairs[Keys.Tokenizer.CHAT_TEMPLATE] = named[_DEFAULT]
    return pairs


def templates_from_gguf(fields: dict[str, Any], path: Path) -> Templates | None:
    """Templates of a file's metadata; raises `ValueError` where one is not text."""
    named = {key.removeprefix(_NAMED): text for key, text in fields.items() if key.startswith(_NAMED)}
    if Keys.Tokenizer.CHAT_TEMPLATE in fields:
        named[_DEFAULT] = fields[Keys.Tokenizer.CHAT_TEMPLATE]
    return _named(named, path) if named else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({reason(error)}); download or save it again.") from error


def _named(value: Any, source: Path) -> Templates:
    if isinstance(value, list):
        if not all(isinstance(item, dict) and isinstance(item.get("name"), str) for item in value):
            raise ValueError(f"{source}: chat_template is a list without names; name each template, or keep only one.")
        value = {item["name"]: item.get("template") for item in value}
    named = value if isinstance(value, dict) else {_DEFAULT: value}
    if bad := [name for name, text in named.items() if not isinstance(text, str)]:
        raise ValueError(f"{source}: chat template {bad[0]!r} is not text; write the template itself there.")
    return _simplest(named)


def _simplest(named: dict[str, str]) -> Templates:
    return named[_DEFAULT] if list(named) == [_DEFAULT] else named
