"""Content blocks that the importers of Claude Code and Codex logs share."""

from __future__ import annotations

import binascii
from hashlib import sha256
from typing import Any

from workbench.data.importers.base import as_text
from workbench.data.records import Part

_INT64_END = 1 << 63


def count(value: Any) -> int | None:
    """A number of tokens as the store can hold it; None for anything that is none."""
    return value if type(value) is int and 0 <= value < _INT64_END else None


def known_string(value: Any) -> str | None:
    """The value where it is a string that says something, else None."""
    return value if isinstance(value, str) and value else None


def stored_image(media_type: Any, base64_text: Any, call_id: str | None = None) -> Part:
    """An image part that refers to the image by its hash; bytes and hash are None where it cannot be decoded."""
    media_type = known_string(media_type) or "image"
    try:
        content = binascii.a2b_base64(base64_text)
    except (ValueError, TypeError):
        data = {"media_type": media_type, "bytes": None, "sha256": None}
    else:
        data = {"media_type": media_type, "bytes": len(content), "sha256": sha256(content).hexdigest()}
    return Part("image", name=media_type, call_id=call_id, data=data)


def linked_image(url: Any, call_id: str | None = None) -> Part:
    """An image part for a URL; a data: URL counts as the image itself."""
    url = as_text(url)
    if url.startswith("data:"):
        header, _, content = url.partition(",")
        return stored_image(header[5:].partition(";")[0], content, call_id)
    return Part("image", call_id=call_id, data={"url": url})
