"""Conversations of requests as plain messages."""

from __future__ import annotations

from collections.abc import Sequence

from onebase.server.codec.fields import required
from onebase.server.errors import FailedPrecondition, InvalidArgument
from onebase.server.jobs import BaseFacts, Message
from onebase.v1 import types_pb2


def read_chat(chat: types_pb2.Chat, field: str, facts: BaseFacts) -> list[Message]:
    """The messages of a chat, at least one, each with a role.

    Raises:
        InvalidArgument: REQUIRED.
        FailedPrecondition: NO_CHAT_TEMPLATE.
    """
    if not facts.chat_template:
        raise FailedPrecondition(
            "NO_CHAT_TEMPLATE",
            f"{field} is a chat, and the tokenizer of {facts.model!r} has no chat template: serve it with "
            "--chat-template FILE, or give text or tokens",
            field=field,
        )
    if not chat.messages:
        raise required(f"{field}.messages", "give at least one")
    for index, message in enumerate(chat.messages):
        if not message.role:
            raise required(f"{field}.messages[{index}].role", "give one that the chat template knows, such as user")
    return [{"role": message.role, "content": message.content} for message in chat.messages]


def said_before(prompt: types_pb2.Content, field: str, facts: BaseFacts, *, may_be_empty: bool) -> list[Message]:
    """The messages that a chat completion follows.

    Args:
        prompt: the sequence's prompt.
        field: its path.
        facts: the base.
        may_be_empty: whether the conversation may begin with the completion, as rewards allow.

    Raises:
        InvalidArgument: CHAT_WITHOUT_PROMPT where the prompt is no chat.
    """
    if prompt.WhichOneof("value") == "chat":
        return read_chat(prompt.chat, f"{field}.chat", facts)
    if may_be_empty and not prompt.text and not prompt.tokens.data:
        return []
    raise InvalidArgument(
        "CHAT_WITHOUT_PROMPT",
        f"{field} is not a chat, and the completion is one: give both as chats, or the completion as text or tokens",
        field=field,
    )


def characters(messages: Sequence[Message]) -> int:
    """Characters of all messages."""
    return sum(len(message["role"]) + len(message["content"]) for message in messages)
