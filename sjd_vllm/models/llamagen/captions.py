r"""Cleaning of captions, as the model saw them in training.

FoundationVision/LlamaGen, language/t5.py, `T5Embedder.text_preprocessing` and `clean_caption`, which has it from
DeepFloyd's IF: each step in its order, the whole twice.
"""

from __future__ import annotations

import html
import re
from urllib.parse import unquote_plus

_DOMAIN = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b\/?(?!@)"
_FILE_KINDS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_Rules = tuple[tuple[str, str], ...]

_LINKS: _Rules = (
    ("<person>", "person"),
    (rf"\b((?:https?:(?:\/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN}))", ""),
    (rf"\b((?:www:(?:\/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN}))", ""),
)
_SIGNS: _Rules = (
    (r"@[\w\d]+\b", ""),  # nicknames
    ("[\u31c0-\u31ef]+", ""),  # CJK strokes
    ("[\u31f0-\u31ff]+", ""),  # Katakana extensions
    ("[\u3200-\u32ff]+", ""),  # enclosed CJK letters
    ("[\u3300-\u33ff]+", ""),  # CJK compatibility
    ("[\u3400-\u4dbf]+", ""),  # CJK extension A
    ("[\u4dc0-\u4dff]+", ""),  # hexagrams
    ("[\u4e00-\u9fff]+", ""),  # CJK ideographs
    (
        "[\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32"
        "\ufe58\ufe63\uff0d]+",  # dashes
        "-",
    ),
    ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),  # quotation marks
    ("[\u2018\u2019]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # network addresses
    (r"\d:\d\d\s+$", ""),  # article numbers
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"[\S]+\.(?:{_FILE_KINDS})", ""),  # file names
    (r"[\"\']{2,}", '"'),
    (r"[\.]{2,}", " "),
    ("[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~" r"\)\(\]\[\}\{\|\\/\*]{1,}", " "),
    (r"\s+\.\s+", " "),
)
_WORDS: _Rules = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILE_KINDS})(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    ("\\b\\d+\\.?\\d*[x\u0445\u00d7]\\d+\\.?\\d*\\b", ""),  # sizes
    (r"\b\s+\:\s+", ": "),
    (r"(\D[,\./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"\']([\w\W]+)[\"\']$", r"\1"),
    (r"^[\'\_,\-\:;]", ""),
    (r"[\'\_,\-\:\-\+]$", ""),
    (r"^\.\S+$", ""),
)


def clean_caption(caption: str) -> str:
    """The caption as the text encoder reads it; cleaning a clean one may change it once more, so it is done twice."""
    return _clean_once(_clean_once(caption))


def _clean_once(caption: str) -> str:
    import ftfy
    from bs4 import BeautifulSoup

    text = _apply(_LINKS, unquote_plus(caption).strip().lower())
    text = _apply(_SIGNS, BeautifulSoup(text, features="html.parser").text)
    if len(re.findall(r"[\-_]", text)) > 3:
        text = re.sub(r"[\-_]", " ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return _apply(_WORDS, text).strip()


def _apply(rules: _Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text
