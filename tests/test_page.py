"""The web page in a real headless Chromium: ten flows by hand and keyboard, and what a model writes stays text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pages  # skips this file where there is no playwright
import pytest
from pages import KEY, Script, Site, answered, needs_chromium, send, thorough, until
from servers import running

from duoserve.api.app import make_app
from duoserve.api.host import Host
from duoserve.api.limits import Door
from duoserve.api.page import assets

browser, demo, look, script, site = pages.browser, pages.demo, pages.look, pages.script, pages.site  # fixtures
XSS = json.loads((Path(__file__).parent / "data" / "xss.json").read_text())

# Ten flows


@needs_chromium
def test_a_message_is_sent_and_its_answer_figured(site: Site, script: Script) -> None:
    page = site.open()
    script.pieces = ["A **list** holds ", "things:\n\n- one\n- two\n\n```python\nx = [1]\n", "```\n"]
    send(page, "What is a list?")
    answered(page)
    body = ".turn[data-role=assistant] .body"
    assert page.inner_text(f"{body} strong") == "list"
    assert page.locator(f"{body} li").all_inner_texts() == ["one", "two"]
    assert page.inner_text(f"{body} pre") == "x = [1]"
    assert page.inner_text("#tokens") == "7 + 3" and page.inner_text("#ttft").endswith(" s")
    assert script.asked[0]["messages"] == [{"role": "user", "content": "What is a list?"}]
    assert script.asked[0]["model"] == "stand-in" and script.asked[0]["stream"] is True
    send(page, "And then?")
    answered(page, 2)
    assert [m["role"] for m in script.asked[1]["messages"]] == ["user", "assistant", "user"]
    assert page.inner_text("#chat-list button.open") == "What is a list?"


@needs_chromium
def test_an_answer_shows_as_it_comes(site: Site, script: Script) -> None:
    page = site.open()
    script.pieces = ["first ", "second ", "third. "]
    script.hold.set()
    send(page, "Go on")
    page.wait_for_function(
        "() => document.querySelector('.turn[data-state=streaming] .body')?.innerText.includes('third')"
    )
    assert page.is_visible("#stop") and page.is_hidden("#send")
    assert page.get_attribute(".turn[data-role=assistant] .body", "aria-busy") == "true"
    script.hold.clear()
    assert answered(page) == "first second third."
    page.wait_for_function("() => document.querySelector('#said').textContent.includes('third.')")  # read out


@needs_chromium
def test_stop_keeps_what_came_and_tells_the_server(site: Site, script: Script) -> None:
    page = site.open()
    script.hold.set()
    send(page, "Go on")
    page.wait_for_selector(".turn[data-state=streaming] .body p")
    page.click("#stop")
    assert answered(page) == "Hello there."
    assert page.inner_text(".turn[data-role=assistant] .note") == "Stopped."
    until(lambda: script.left == 1)
    script.hold.clear()
    send(page, "More")
    assert answered(page, 2) == "Hello there."


@needs_chromium
def test_retry_asks_the_same_again(site: Site, script: Script) -> None:
    page = site.open()
    script.refusal = (503, "64 requests wait, at most 64 may; try again in 3 s")
    send(page, "Why?")
    answered(page)
    assert page.inner_text(".turn[data-role=assistant] .note") == script.refusal[1]
    script.refusal = None
    page.get_by_role("button", name="Retry").click()
    page.wait_for_selector(".turn[data-state=done]")
    assert answered(page) == "Hello there."
    script.pieces = ["Another."]
    page.get_by_role("button", name="Retry").click()
    page.wait_for_function("() => document.querySelector('.turn[data-role=assistant] .body').innerText === 'Another.'")
    assert [a["messages"] for a in script.asked] == [[{"role": "user", "content": "Why?"}]] * 3
    assert page.locator(".turn").count() == 2


@thorough
@needs_chromium
def test_a_reload_keeps_conversations_and_what_was_streaming(site: Site, script: Script) -> None:
    page = site.open()
    send(page, "One")
    answered(page)
    script.hold.set()
    send(page, "Two")
    page.wait_for_selector(".turn[data-state=streaming] .body p")
    page.reload()
    page.wait_for_selector(".turn[data-state=broken]")
    assert page.locator(".turn .body").all_inner_texts() == ["One", "Hello there.", "Two", "Hello there."]
    assert "Interrupted" in page.inner_text(".turn >> nth=-1 >> .note")
    until(lambda: script.left == 1)
    script.hold.clear()
    page.get_by_role("button", name="Retry").click()
    page.wait_for_function("() => [...document.querySelectorAll('.turn')].at(-1).dataset.state === 'done'")
    assert answered(page, 2) == "Hello there."
    page.get_by_role("button", name="Delete One").click()
    assert page.locator("#chat-list li").count() == 0 and page.locator(".turn").count() == 0
    page.get_by_role("button", name="Undo", exact=True).click()
    page.click("#chat-list button.open")
    assert page.locator(".turn").count() == 4


@thorough
@needs_chromium
def test_two_tabs_share_conversations_and_do_not_answer_twice(site: Site, script: Script) -> None:
    first = site.open()
    script.hold.set()
    send(first, "Who?")
    first.wait_for_selector(".turn[data-state=streaming] .body p")
    second = site.open()
    second.wait_for_selector(".turn[data-state=streaming] .body p")  # sees the other's answer grow
    send(second, "Me too")
    second.wait_for_selector("#problem:not([hidden])")
    assert "Another tab is answering" in second.inner_text("#problem") and len(script.asked) == 1
    script.hold.clear()
    assert answered(first) == answered(second) == "Hello there."
    second.press("#question", "Enter")
    assert answered(second, 2) == "Hello there."
    assert answered(first, 2) == "Hello there." and len(script.asked) == 2
    script.hold.set()
    send(first, "Again")
    second.wait_for_selector(".turn[data-state=streaming]")
    first.close()
    second.wait_for_selector(".turn[data-state=broken]")  # nobody writes that answer any more


@thorough
@needs_chromium
def test_a_server_that_goes_and_comes_back(site: Site, script: Script) -> None:
    page = site.open()
    script.hold.set()
    send(page, "Stay")
    page.wait_for_selector(".turn[data-state=streaming] .body p")
    site.stop()
    page.wait_for_selector(".turn[data-state=broken]")
    assert page.inner_text(".turn .body >> nth=-1") == "Hello there."
    assert "broke off" in page.inner_text(".turn >> nth=-1 >> .note")
    page.wait_for_selector("#status[data-state=away]")
    send(page, "Anybody?")
    page.wait_for_function("() => document.querySelectorAll('.turn[data-state=broken]').length === 2")
    assert "cannot be reached" in page.inner_text(".turn >> nth=-1 >> .note")
    script.hold.clear()
    script.model = "another"
    site.start()
    page.wait_for_selector("#status[data-state=ready]")
    page.get_by_role("button", name="Retry").click()
    page.wait_for_function("() => [...document.querySelectorAll('.turn')].at(-1).dataset.state === 'done'")
    assert answered(page, 2) == "Hello there."
    assert script.asked[-1]["model"] == "another"


@thorough
@needs_chromium
def test_everything_is_done_by_keyboard(site: Site, script: Script) -> None:
    page = site.open()
    keys = page.keyboard
    keys.type("First")  # the cursor is there already
    keys.press("Shift+Enter")
    keys.type("line two")
    keys.press("Enter")
    answered(page)
    assert script.asked[0]["messages"][0]["content"] == "First\nline two"
    keys.press("Alt+r")
    until(lambda: len(script.asked) == 2)
    answered(page)
    script.hold.set()
    keys.type("Long")
    keys.press("Enter")
    page.wait_for_selector(".turn[data-state=streaming] .body p")
    keys.press("Escape")
    page.wait_for_selector(".turn[data-state=stopped]")
    script.hold.clear()
    keys.press("Alt+n")
    assert page.locator(".turn").count() == 0
    keys.type("Second")
    keys.press("Enter")
    answered(page)
    keys.press("Alt+ArrowDown")
    page.wait_for_function("() => document.querySelectorAll('.turn').length === 4")
    keys.press("Alt+p")
    assert page.is_hidden("#panel")
    keys.press("Alt+p")
    page.focus("#map")
    keys.press("ArrowRight")
    keys.press("ArrowRight")
    assert page.inner_text("#map-readout").startswith("Layer 0, expert 1:")
    keys.press("Tab")
    page.evaluate("document.activeElement.blur()")
    keys.press("?")
    assert page.is_visible("#help")
    keys.press("Escape")
    assert page.is_hidden("#help")
    reached = _tabbed(page)
    named = "a, button, textarea, [tabindex='0']"
    visible = page.evaluate(f"[...document.querySelectorAll(`{named}`)].filter(e => e.checkVisibility()).length")
    assert len(reached) == visible and all(name for name, _ in reached)
    assert all(ring for _, ring in reached)


def _tabbed(page: Any) -> list[tuple[str, bool]]:
    """Name of each element that Tab comes to, and whether it shows that it has the focus."""
    page.evaluate("document.activeElement.blur()")
    seen: list[tuple[str, bool]] = []
    ids: list[int] = []
    while len(seen) < 60:
        page.keyboard.press("Tab")
        at, name, ring = page.evaluate(
            """() => { const e = document.activeElement; window.met ??= [];
            if (!window.met.includes(e)) window.met.push(e);
            const label = e.getAttribute('aria-label') || e.labels?.[0]?.innerText || e.innerText;
            return [e === document.body ? -1 : window.met.indexOf(e), label,
                    getComputedStyle(e).outlineStyle !== 'none']; }"""
        )
        if at in ids or at < 0:
            break
        ids.append(at)
        seen.append((name, ring))
    return seen


@thorough
@needs_chromium
def test_without_a_network_the_page_says_so_and_recovers(site: Site, script: Script) -> None:
    page = site.open()
    send(page, "One")
    answered(page)
    site.context.set_offline(True)
    send(page, "Two")
    answered(page, 2)
    assert "cannot be reached" in page.inner_text(".turn >> nth=-1 >> .note")
    page.get_by_role("button", name="New conversation").click()
    page.click("#chat-list button.open")
    assert page.locator(".turn").count() == 4  # what was said is still to be read
    site.context.set_offline(False)
    page.get_by_role("button", name="Retry").click()
    page.wait_for_function("() => [...document.querySelectorAll('.turn')].at(-1).dataset.state === 'done'")
    assert answered(page, 2) == "Hello there."
    assert len(script.asked) == 2


ALLOWED = {
    "div", "p", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "pre", "code", "span", "button", "strong", "em",
}  # fmt: skip
TEXT_ONLY = """() => [...document.querySelectorAll('#turns .body *, #turns .note *')].map(e =>
    [e.tagName.toLowerCase(), [...e.attributes].map(a => a.name)])"""


@thorough
@needs_chromium
def test_what_a_model_writes_stays_text(site: Site, script: Script) -> None:
    assert len(XSS) >= 50
    page = site.open()
    page.evaluate("window.__ran = 0")
    for n, payload in enumerate(XSS):
        cut = len(payload) * (n % 7) // 7  # also through the middle of a tag
        script.pieces = [payload[:cut], payload[cut:], f"\n\n- {payload}\n\n> {payload}\n\n```{payload}\n{payload}\n"]
        script.model = payload
        if n % 10 == 0:
            page.click("#new-chat")
        send(page, payload)
        page.wait_for_function("n => document.querySelectorAll('.turn[data-state=done]').length === n", arg=n % 10 + 1)
    script.refusal = (400, "".join(XSS[:5]))
    send(page, "refuse me")
    page.wait_for_selector(".turn[data-state=broken]")
    page.reload()  # and out of storage
    page.wait_for_selector(".turn[data-state=broken]")
    page.wait_for_timeout(300)
    assert page.evaluate("window.__ran ?? 0") == 0
    for tag, attributes in page.evaluate(TEXT_ONLY):
        assert tag in ALLOWED and set(attributes) <= {"class", "type", "tabindex", "start"}, (tag, attributes)
    shown = page.locator(".turn[data-role=user] .body").all_text_contents()
    assert shown[:-1] == [p.strip() for p in XSS[-len(shown) + 1 :]]


# What stands beside the flows


@thorough
@needs_chromium
def test_a_key_is_asked_for_and_forgotten_with_the_tab(site: Site, script: Script) -> None:
    script.key = "open sesame"
    page = site.open()
    page.wait_for_selector("#key[open]")
    page.fill("#key-value", "wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("#key[open]")
    page.wait_for_function("() => document.querySelector('#key-value').value === ''")
    page.fill("#key-value", "open sesame")
    page.keyboard.press("Enter")
    page.wait_for_selector("#status[data-state=ready]")
    send(page, "In?")
    assert answered(page) == "Hello there."
    assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")
    page.reload()
    page.wait_for_selector("#status[data-state=ready]")  # the same tab
    other = site.open()
    other.wait_for_selector("#key[open]")


@thorough
@needs_chromium
def test_a_model_that_loads_says_how_far(site: Site, script: Script) -> None:
    script.loading = True
    page = site.open()
    page.wait_for_function("() => document.querySelector('#status').textContent === 'loading, 25 %'")
    script.loading = False
    page.wait_for_selector("#status[data-state=ready]")
    page.wait_for_selector("#lanes .lane")


@thorough
@needs_chromium
def test_settings_are_sent(site: Site, script: Script) -> None:
    page = site.open()
    page.click("#show-settings")
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "0.5")
    page.fill("#max-tokens", "20")
    page.get_by_role("button", name="Done").click()
    send(page, "Hi")
    answered(page)
    asked = script.asked[0]
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (asked["temperature"], asked["max_tokens"]) == (0.5, 20)


@thorough
@needs_chromium
@pytest.mark.parametrize("width", [360, 800, 1360])
def test_nothing_is_wider_than_the_window(site: Site, script: Script, width: int) -> None:
    page = site.open()
    page.set_viewport_size({"width": width, "height": 700})
    script.pieces = ["word " * 40, "\n\n```\n" + "x" * 400 + "\n```\n\n" + "y" * 400]
    send(page, "z" * 300)
    answered(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelector('#scroll').scrollWidth") <= width
    if page.is_hidden("#panel"):
        page.click("#show-panel")
    assert page.is_visible("#map")


@thorough
@needs_chromium
def test_hostile_text_is_not_slow(site: Site, script: Script) -> None:
    page = site.open()
    parts = [
        "**a " * 8000,
        ">" * 20_000,
        "`" * 20_000,
        " " * 20_000 + "`",
        "*a*" * 5000,
        "- " * 9000,
        "```" + " x" * 9000,
    ]
    script.pieces = ["\n\n".join(parts)]
    send(page, "Go")
    answered(page)
    took = page.evaluate(
        """async text => { const { render } = await import('./markdown.js');
        const began = performance.now(); render(document.createElement('div'), text); return performance.now() - began; }""",
        "\n\n".join(parts),
    )
    assert took < 20_000  # a hang, not a figure: it takes tens of milliseconds


def test_the_page_names_no_other_place() -> None:
    """Every reference is to a file beside it, and no markup is made of strings."""
    found = assets()
    assert {"/", "/app.js", "/style.css", "/icon.svg"} <= set(found)
    for path, asset in found.items():
        text = asset.body.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", text), path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function", text), path
    page = found["/"].body.decode()
    for name in re.findall(r'(?:href|src)="([^"#]+)"', page):
        assert f"/{name}" in found
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=", page)


# The real engine


@pytest.fixture
def real(demo: Any, browser: Any) -> Iterator[Site]:
    """The application that `duoserve serve` runs."""
    engine, service = demo
    host = Host("demo")
    host.ready(engine, service)
    site = Site(make_app(host), browser)
    yield site
    site.close()
    until(lambda: service.active == service.queued == 0)


@needs_chromium
def test_the_demo_answers_and_its_picture_moves(demo: Any, real: Site) -> None:
    page = real.open()
    page.wait_for_selector("#lanes .lane")
    assert page.inner_text("#model") == "demo"
    before = page.inner_text("#link")
    page.evaluate("() => localStorage.setItem('duoserve.settings', JSON.stringify({maxTokens: 48, temperature: 0}))")
    send(page, "Explain an index.")
    page.wait_for_function("before => document.querySelector('#link').textContent !== before", arg=before)
    assert answered(page)
    page.wait_for_function("() => document.querySelector('[data-name=hits] output').textContent.endsWith('%')")
    prompt, new = map(int, page.inner_text("#tokens").split(" + "))
    assert 0 < new <= 48 and prompt > 5 and float(page.inner_text("#rate")) > 0
    plan = demo[0].plan
    assert page.inner_text("#residency") == f"{plan.slots} of {plan.experts} fit"
    assert page.locator("#memory > div").count() == 5
    drawn = page.evaluate("""() => { const c = document.querySelector('#map');
        const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        return new Set(Array.from({length: d.length / 4}, (_, i) => d.slice(4 * i, 4 * i + 4).join())).size; }""")
    assert drawn > 5  # colours: absent, and resident by how often they are used


@thorough
@needs_chromium
def test_a_server_with_a_key_answers_who_gives_it(demo: Any, browser: Any) -> None:
    """The whole of `duoserve serve --api-key`, over its own protocol."""
    with running(demo[0], door=Door(key=KEY)) as server:
        site = Site(None, browser, at=server.port)
        page = site.open()
        page.wait_for_selector("#key[open]")
        page.fill("#key-value", "wrong-key")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key[open]")
        page.wait_for_function("() => document.querySelector('#key-value').value === ''")
        assert server.service.finished == {}
        page.fill("#key-value", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#status[data-state=ready]")
        page.wait_for_selector("#lanes .lane")  # its picture needs the key too
        page.evaluate("() => localStorage.setItem('duoserve.settings', JSON.stringify({maxTokens: 8, temperature: 0}))")
        send(page, "Explain an index.")
        assert answered(page) and sum(server.service.finished.values()) == 1
        stored = page.evaluate("JSON.stringify(localStorage) + document.cookie + location.href")
        assert KEY not in stored and KEY not in "".join(site.requests)
        site.open().wait_for_selector("#key[open]")  # another tab knows nothing of it
        site.close()


@thorough
@needs_chromium
def test_stop_and_leaving_free_the_engine(demo: Any, real: Site) -> None:
    _, service = demo
    page = real.open()
    send(page, "Write a long text.")
    page.wait_for_selector(".turn[data-state=streaming] .body p")
    page.keyboard.press("Escape")
    page.wait_for_selector(".turn[data-state=stopped]")
    until(lambda: service.active == 0)
    page.get_by_role("button", name="Retry").click()
    page.wait_for_selector(".turn[data-state=streaming] .body p")
    page.close()
    until(lambda: service.active == 0)


@thorough
@needs_chromium
def test_a_prompt_that_does_not_fit_is_told_with_both_numbers(demo: Any, real: Site) -> None:
    page = real.open()
    send(page, "word " * 3000)
    answered(page)
    note = page.inner_text(".turn >> nth=-1 >> .note")
    assert re.search(rf"the prompt has \d+ tokens, the context {demo[0].plan.ctx}; shorten it", note), note
