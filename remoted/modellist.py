# SPDX-License-Identifier: GPL-2.0-or-later
"""`iohub-remoted --models`: all models that have a name, with their options and where they come from."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from common.errors import UsageError
from common.journal import printable
from common.options import DEVICE_OPTIONS
from remoted.declaration import check_options
from remoted.models import Model, hidden_models, known_models, load_class
from remoted.options import Option, show

__all__ = ["describe_models"]

_WIDTH = 80
_NAME_WIDTH = 18


def describe_models(as_json: bool) -> str:
    """The list as text, or as one JSON object; a model that can't be loaded is listed with the reason."""
    models = [_describe(model) for model in known_models()]
    hidden = [model._asdict() for model in hidden_models()]
    if as_json:
        return json.dumps({"models": models, "options": DEVICE_OPTIONS, "hidden": hidden}, indent=2)
    lines = []
    for model in models:
        lines.append(printable(f"{model['name']}  ({model['origin']})"))
        if "error" in model:
            lines.append(printable(f"  {model['error']}"))
        elif model["summary"]:
            summary = printable(model["summary"])
            lines.append(textwrap.fill(summary, _WIDTH, initial_indent="  ", subsequent_indent="  "))
        lines += [_line(option) for option in model.get("options", ())]
    lines += ["", "every model:"]
    lines += [_row(name, text) for name, text in DEVICE_OPTIONS.items()]
    for other in hidden:
        name = f"{other['name']} of {other['origin']}"
        lines.append(printable(f"{name} is hidden by the built-in model: give it as {other['target']}"))
    return "\n".join(lines)


def _describe(model: Model) -> dict[str, Any]:
    described: dict[str, Any] = model._asdict()
    try:
        found = load_class(model.target, f"model {model.name!r}")
        check_options(found.OPTIONS)
    except UsageError as error:
        return {**described, "error": str(error)}
    return {
        **described,
        "summary": (found.__doc__ or "").strip().partition("\n")[0],
        "options": [_describe_option(option) for option in found.OPTIONS],
    }


def _describe_option(option: Option) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": option.name,
        "type": option.type.__name__,
        "default": option.default,
        "help": option.help,
    }
    for name in ("minimum", "maximum"):
        if (bound := getattr(option, name)) is not None:
            described[name] = bound
    if option.choices:
        described["choices"] = list(option.choices)
    return described


def _line(option: dict[str, Any]) -> str:
    value = {"str": "TEXT", "int": "N", "float": "X", "bool": "on|off"}[option["type"]]
    if "choices" in option:
        value = "|".join(show(choice) for choice in option["choices"])
    default = "" if option["default"] is None else f" (default: {show(option['default'])})"
    return _row(printable(f"{option['name']}={value}"), printable(f"{option['help']}{default}"))


def _row(name: str, text: str) -> str:
    """Two columns; a name that is wider than the first has a line of its own."""
    indent = " " * (_NAME_WIDTH + 3)
    wrapped = textwrap.fill(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)
    return (
        f"  {name}\n{wrapped}" if len(name) > _NAME_WIDTH else f"  {name:<{_NAME_WIDTH}} {wrapped.lstrip()}"
    )
