"""Prompt template of Janus, and its unconditional prompt.

Source: deepseek-ai/Janus, generation_inference.py and README.md ("Text-to-Image Generation"); the template "deepseek"
of janus/utils/conversation.py: ``role: message\\n\\nrole:``, without a system prompt, and the begin-of-image tag behind
it. The roles are "<|User|>" and "<|Assistant|>" in Janus-Pro's examples, "User" and "Assistant" in those of Janus-1.3B.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sjd_vllm.models.janus.config import BEGIN_OF_IMAGE

_PRO_ROLES = ("<|User|>", "<|Assistant|>")
_FIRST_ROLES = ("User", "Assistant")
_PAD = "<\uff5c\u2581pad\u2581\uff5c>"  # VLChatProcessor's pad_tag
_BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"


class JanusPrompts:
    """Prompts to token ids, from tokenizer.json and tokenizer_config.json."""

    def __init__(self, checkpoint: Path, roles: tuple[str, str] | None = None) -> None:
        self._tokenizer: Any = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        self.roles = roles or self._roles_of(checkpoint)
        config_file = checkpoint / "tokenizer_config.json"
        config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
        bos = config.get("bos_token") or _BOS
        # `tokenizer.encode` of the authors adds it
        self._bos = [self._id(bos["content"] if isinstance(bos, dict) else bos)] if _adds_bos(config) else []
        self._pad = self._id(_PAD)

    def conditional(self, prompt: str) -> list[int]:
        """``<bos> User: prompt \\n\\n Assistant: <begin_of_image>``."""
        user, assistant = self.roles
        text = f"{user}: {prompt.strip()}\n\n{assistant}:" if prompt.strip() else f"{user}:{assistant}:"
        ids: list[int] = self._tokenizer.encode(text + BEGIN_OF_IMAGE, add_special_tokens=False).ids
        return [*self._bos, *ids]

    def unconditional(self, conditional: list[int]) -> list[int]:
        """A conditional prompt with padding for all tokens but the first and the last; its length is the same."""
        return [conditional[0], *[self._pad] * (len(conditional) - 2), conditional[-1]]

    def _id(self, token: str) -> int:
        index: int | None = self._tokenizer.token_to_id(token)
        if index is None:
            raise ValueError(f"the tokenizer of this Janus checkpoint has no token {token!r}")
        return index

    def _roles_of(self, checkpoint: Path) -> tuple[str, str]:
        """Janus-1.3B is told by its name, in the path or the config, and by a tokenizer without Janus-Pro's roles."""
        is_first = "Janus-1.3B" in str(checkpoint.resolve()) or self._tokenizer.token_to_id(_PRO_ROLES[0]) is None
        return _FIRST_ROLES if is_first else _PRO_ROLES


def _adds_bos(config: dict[str, Any]) -> bool:
    return bool(config.get("add_bos_token", True))
