"""What the page makes of an answer beside its text: thoughts, tables, questions written anew."""

# ruff: noqa: F811  (fixtures of pages; `script` is our own)
from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from pages import Script, Site, answered, browser, demo, look, needs_chromium, send, site, thorough  # noqa: F401


class Thinker(Script):
    """A model that thinks first."""

    def __init__(self) -> None:
        super().__init__()
        self.thoughts: list[str] = []
        self.name = "reasoning"

    async def events(self) -> AsyncIterator[str]:
        for thought in self.thoughts:
            yield self._chunk({self.name: thought})
        async for event in super().events():
            yield event


@pytest.fixture
def script() -> Thinker:
    return Thinker()


THOUGHT = ".turn[data-role=assistant] >> nth=-1 >> .thought"


@needs_chromium
@pytest.mark.parametrize("name", ["reasoning", pytest.param("reasoning_content", marks=thorough)])
def test_thoughts_are_shown_apart_and_not_sent_back(site: Site, script: Thinker, name: str) -> None:
    page = site.open()
    script.name, script.thoughts, script.pieces = name, ["Let me **see** ", "<img src=x>"], []
    script.hold.set()
    send(page, "Why?")
    page.wait_for_selector(f"{THOUGHT}[open] strong")  # open while there is nothing else to read
    assert page.inner_text(f"{THOUGHT} summary") == "Thinking"
    assert page.inner_text(f"{THOUGHT} .thought-body") == "Let me see <img src=x>"
    assert page.inner_text("#said") == "The model is thinking."
    script.hold.clear()
    assert answered(page) == ""
    script.pieces = ["Because."]
    page.get_by_role("button", name="Retry").click()
    page.wait_for_function("() => document.querySelector('.turn[data-role=assistant] .body').innerText === 'Because.'")
    assert answered(page) == "Because." and page.inner_text(f"{THOUGHT} summary") == "Thought"
    assert page.get_attribute(THOUGHT, "open") is None
    page.focus(f"{THOUGHT} summary")
    page.keyboard.press("Enter")
    page.wait_for_selector(f"{THOUGHT}[open] strong")
    send(page, "And?")  # what the reader opened stays open
    answered(page, 2)
    assert page.get_attribute(".turn[data-role=assistant] >> nth=0 >> .thought", "open") is not None
    assert script.asked[-1]["messages"] == [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because."},
        {"role": "user", "content": "And?"},
    ]
    page.reload()
    page.wait_for_selector(f"{THOUGHT}:not([hidden])")  # it is kept


@needs_chromium
def test_a_question_written_anew_takes_the_place_of_what_followed(site: Site, script: Thinker) -> None:
    page = site.open()
    for n, text in enumerate(("One", "Two"), 1):
        send(page, text)
        answered(page, n)
    page.press("#question", "ArrowUp")
    assert page.input_value("#question") == "Two" and page.locator(".turn.to-go").count() == 2
    page.keyboard.press("Escape")
    assert page.input_value("#question") == "" and page.is_hidden("#changing")
    page.locator(".turn").nth(0).hover()
    page.get_by_role("button", name="Edit").first.click()
    assert page.is_visible("#changing") and page.locator(".turn.to-go").count() == 4
    script.pieces = ["| a | b |\n|:--|--:|\n| x | 1\\|2 |\n\n---\n\nnone | such\n--\n\n```py\nx = 1\n```"]
    send(page, "Eins")
    page.wait_for_function("() => document.querySelectorAll('.turn').length === 2")
    answered(page)
    assert script.asked[-1]["messages"] == [{"role": "user", "content": "Eins"}]
    assert page.locator(".table :is(th, td)").all_inner_texts() == ["a", "b", "x", "1|2"]
    assert page.locator(".table .right").count() == 2 and page.locator(".body hr").count() == 1
    assert page.inner_text(".body p") == "none | such\n--"
    assert page.is_hidden("#changing") and page.locator(".to-go").count() == 0
    assert page.inner_text("#chat-list .open") == "Eins"
    page.evaluate("() => Object.defineProperty(navigator, 'clipboard', { value: undefined })")  # as on a plain network
    page.click(".copy-code")
    page.press("#question", "ControlOrMeta+v")
    assert page.input_value("#question") == "x = 1"
