"""Configs that Transformers does not know, or that name remote code, read by vLLM through a family's own reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def register_config_format(name: str, served_config: Callable[[Path, dict[str, Any]], Any]) -> str:
    """Tell vLLM, in this process, how configs of a format are read; returns the name, as EngineArgs.config_format.

    Args:
        name: of the format; a second call with it changes nothing.
        served_config: from a checkpoint's folder and its config.json to the Transformers config that vLLM is given.
    """
    from vllm.transformers_utils.config import get_config_parser, register_config_parser
    from vllm.transformers_utils.config_parser_base import ConfigParserBase

    try:
        get_config_parser(name)
    except ValueError:

        class FamilyConfigParser(ConfigParserBase):  # type: ignore[misc]
            def parse(self, model: str | Path, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
                file = Path(model) / "config.json"  # original releases may have none
                config = json.loads(file.read_text()) if file.is_file() else {}
                return config, served_config(Path(model), config)

        register_config_parser(name)(FamilyConfigParser)
    return name
