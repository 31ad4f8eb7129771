"""Tokens become text piece by piece, and stop where a stop string appears. Knows a tokenizer's decoding; knows nothing of
models or requests.

Text is handed on once no later token can change it: a character whose bytes have not all come is held back, and so is an end
that may become a stop string.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

BROKEN = "\ufffd"  # what a tokenizer makes of half a character
LOOK_BACK = 6  # tokens before the new ones that are decoded with them, since some write their space by their neighbour


class TextStream:
    """One answer's text. `put` returns what became certain; `stopped` says that a stop string came.

    `visible`: special tokens whose text is told, where all others are not.
    """

    def __init__(
        self, tokenizer: Any, stop: Sequence[str] = (), keep_stop: bool = False, visible: Collection[int] = frozenset()
    ):
        self._hidden = special_ids(tokenizer) - set(visible) if visible else None
        self._tokenizer, self._stop, self._keep_stop = tokenizer, [s for s in stop if s], keep_stop
        self._tokens: list[int] = []
        self._from = self._read = 0  # tokens decoded for context, and tokens whose text is certain
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False
        self.stop_string: str | None = None
        self.text = ""

    def put(self, token: int) -> str:
        self._tokens.append(token)
        return "" if self.stopped else self._hand_on(self._new_text(), last=False)

    def end(self) -> str:
        """What was held back, once no token will follow."""
        return "" if self.stopped else self._hand_on(self._new_text(last=True), last=True)

    def _new_text(self, last: bool = False) -> str:
        before = self._decode(self._tokens[self._from : self._read])
        now = self._decode(self._tokens[self._from :])
        if now.endswith(BROKEN) and not last:
            return ""
        self._from, self._read = max(self._from, len(self._tokens) - LOOK_BACK), len(self._tokens)
        return now[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        if self._tokenizer is None:  # ids alone
            return ""
        if self._hidden is not None:
            tokens = [token for token in tokens if token not in self._hidden]
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=self._hidden is None, clean_up_tokenization_spaces=False
        )
        return text

    def _hand_on(self, text: str, last: bool) -> str:
        pending = self._held + text
        found = [(at, -len(s), s) for s in self._stop if (at := pending.find(s)) >= 0]
        if found:
            at, _, self.stop_string = min(found)
            self.stopped, self._held = True, ""
            certain = pending[: at + len(self.stop_string)] if self._keep_stop else pending[:at]
        else:
            held = 0 if last else max((_overlap(pending, s) for s in self._stop), default=0)
            certain, self._held = pending[: len(pending) - held], pending[len(pending) - held :]
        self.text += certain
        return certain


def special_ids(tokenizer: Any) -> set[int]:
    """Tokens that `skip_special_tokens` leaves out: more than those with a role, which `all_special_ids` has."""
    return {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
