"""Arguments of calls of tools, as a chat template wants them: an object, which it writes as JSON, or JSON text.

Data sets have either: OpenAI's API gives text, transformers' documentation asks for objects. A template that is given
the other one writes JSON of JSON, with its quotes escaped, or an object as Python does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

Messages = list[dict[str, Any]]


def forms(messages: Messages) -> Iterator[tuple[Messages, list[str]]]:
    """The ways to give a template the messages, the likelier first, and what then must not be in what it writes.

    Without arguments there is one. Text that is given as text stays as it is.
    """
    found: list[dict[str, Any]] = []

    def as_object(given: Any) -> Any:
        try:
            read = json.loads(given) if isinstance(given, str) else given
        except (ValueError, RecursionError):
            return given
        if not isinstance(read, dict):
            return given
        if read:
            found.append(read)
        return read

    objects = _with(messages, as_object)
    if not found:
        yield objects, []
        return
    said = [str(message.get("content")) for message in messages]
    yield objects, [python for python in map(str, found) if not any(python in content for content in said)]
    yield _with(messages, _as_text), []


def _as_text(given: Any) -> Any:
    return json.dumps(given, ensure_ascii=False) if isinstance(given, dict) else given


def _with(messages: Messages, change: Callable[[Any], Any]) -> Messages:
    """The messages with other arguments."""

    def changed(call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        function = {"function": changed(call["function"])} if "function" in call else {}
        return call | function | ({"arguments": change(call["arguments"])} if "arguments" in call else {})

    return [
        message | {"tool_calls": [changed(call) for call in calls]}
        if isinstance(calls := message.get("tool_calls"), list)
        else message
        for message in messages
    ]
