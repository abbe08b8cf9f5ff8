"""How a conversation is written as text: the chat template, and the same thing for training.

`export.py` ships CHAT_TEMPLATE, `data.py` and `evaluate.py` write turns with the functions; a test
holds the two together.
"""

from __future__ import annotations

from .tokenizer import TURN_END, TURN_START

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message.role not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('role must be system, user or assistant, got ' + message.role) }}"
    "{%- endif %}"
    f"{{{{- '{TURN_START}' + message.role + '\\n' + message.content + '{TURN_END}\\n' }}}}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    f"{{{{- '{TURN_START}assistant\\n' }}}}"
    "{%- endif %}"
)


def system_turn(text: str) -> str:
    return f"{TURN_START}system\n{text}{TURN_END}\n"


def user_turn(text: str) -> str:
    """What a user says, up to where the model starts to answer."""
    return f"{TURN_START}user\n{text}{TURN_END}\n{TURN_START}assistant\n"


def answer(text: str) -> str:
    """What the model has to write: its words, and the token that ends its turn."""
    return f"{text}{TURN_END}"
