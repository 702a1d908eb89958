"""What pydantic finds wrong with settings, in one line."""

from __future__ import annotations

import typing
from typing import Any

from pydantic import ValidationError

from secateur.errors import ConfigError, unknown


def config_error(broken: ValidationError, settings: type) -> ConfigError:
    """Return the first fault that pydantic found as an error of one line.

    Args:
        broken: what it found.
        settings: the model that it validated.
    """
    first = broken.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
        section: Any = settings
        for part in first["loc"][:-1]:
            section = section.model_fields[str(part)].annotation
        known = section.model_fields if hasattr(section, "model_fields") else section.__dataclass_fields__
        return typing.cast("ConfigError", unknown("setting", str(first["loc"][-1]), known))
    return ConfigError(f"{path} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}")
