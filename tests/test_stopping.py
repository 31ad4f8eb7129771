"""Text that comes in pieces is the text: nothing lost, nothing leaked of a stop string, no half characters."""

from __future__ import annotations

import random

import pytest

from duoserve.engine import DEMO
from duoserve.stopping import TextStream
from duoserve.tokenizer import read_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return read_tokenizer(DEMO)


WORDS = ["Git ", "is", " a ", "naïve ", "日本", "語 ", "👩‍👩‍👧 ", "end", "ENDE", "\n\n", "x" * 9, "é", " 0.5", "'s"]


def test_pieces_make_the_whole_text(tokenizer: object) -> None:
    rng = random.Random(3)
    for _ in range(2000):
        text = "".join(rng.choices(WORDS, k=rng.randint(1, 14)))
        ids = tokenizer.encode(text)  # type: ignore[attr-defined]
        stream = TextStream(tokenizer)
        pieces = [stream.put(token) for token in ids] + [stream.end()]
        whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)  # type: ignore[attr-defined]
        assert "".join(pieces) == whole == stream.text
        assert all("\ufffd" not in piece for piece in pieces)


def test_stop_strings_cut_anywhere_leak_nothing_and_lose_nothing(tokenizer: object) -> None:
    rng = random.Random(4)
    for _ in range(10_000):
        text = "".join(rng.choices(WORDS, k=rng.randint(2, 10)))
        at = rng.randrange(len(text))
        stop = [text[at : at + rng.randint(1, 6)], rng.choice(WORDS) + "!"]
        ids = tokenizer.encode(text)  # type: ignore[attr-defined]
        whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)  # type: ignore[attr-defined]
        stream, pieces = TextStream(tokenizer, stop), []
        for token in ids:
            pieces.append(stream.put(token))
            if stream.stopped:
                break
        pieces.append(stream.end())
        first = min((whole.find(s) for s in stop if s in whole), default=len(whole))
        assert "".join(pieces) == whole[:first], (text, stop)
        assert stream.stopped == (first < len(whole))


def test_a_stop_string_can_be_kept(tokenizer: object) -> None:
    stream = TextStream(tokenizer, ["is"], keep_stop=True)
    pieces = [stream.put(token) for token in tokenizer.encode("Git is a tool")]  # type: ignore[attr-defined]
    assert "".join(pieces) == "Git is"
