"""What a person may set of how a chat answers, each within its range. Knows names and numbers; knows nothing of models.
Imports no torch, so that a wrong value is refused before anything is loaded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from duoserve.core import Refusal

GREEDY_BELOW = 1e-5  # temperatures under this are greedy in effect, and logits over them are no numbers


class Setting(NamedTuple):
    kind: type
    least: float
    most: float


SETTINGS = {
    "max_new_tokens": Setting(int, 1, 2**31),
    "temperature": Setting(float, 0, 100),
    "top_p": Setting(float, 0.001, 1),
    "top_k": Setting(int, 1, 2**31),
    "repetition_penalty": Setting(float, 0.1, 10),
    "seed": Setting(int, 0, 2**63 - 1),
}


def sampling(max_new_tokens: int, temperature: float | None, top_p: float | None, seed: int | None) -> dict[str, Any]:
    """The settings a chat starts with; what is None is the model's own."""
    given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    return {name: checked(name, value) for name, value in given.items() if value is not None}


def checked(name: str, value: Any) -> Any:
    """The value as its kind, within its range."""
    kind, least, most = SETTINGS[name]
    try:
        number = kind(value)
    except ValueError as error:
        raise Refusal(
            "E_SETTING", f"{name} {value!r} is no {kind.__name__}", f"give one from {least} to {most}"
        ) from error
    if not least <= number <= most:
        raise Refusal("E_SETTING", f"{name} {value} is out of range", f"give one from {least} to {most}")
    return number
