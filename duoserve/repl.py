"""Chat in a terminal: reads lines, streams answers, obeys slash commands. Knows people and one engine."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from duoserve.conversation import Conversation
from duoserve.core import Refusal, nearest
from duoserve.engine import Answer, Engine
from duoserve.plan import size
from duoserve.settings import GREEDY_BELOW, SETTINGS, checked

HELP = """\
/help              this list
/system [TEXT]     set the system message, or clear it; starts the chat anew
/set [NAME VALUE]  set max_new_tokens, temperature, top_p, top_k, repetition_penalty or seed; alone: show them
/clear             forget the conversation
/retry             answer the last message again
/stats             speed, expert hits, bytes, memory planned and used
/quit              leave (or Ctrl-D); Ctrl-C stops an answer and keeps the chat"""


def answer_once(chat: Conversation, prompt: str, settings: dict[str, Any], as_json: bool) -> None:
    """Stream one answer; with `as_json` also the figures, as the last line. Ctrl-C ends it with what there is."""
    answer = _stream(chat, prompt, settings)
    if as_json:
        print(json.dumps(figures(chat.engine, answer)), flush=True)


def figures(engine: Engine, answer: Answer | None) -> dict[str, Any]:
    """The engine's stats, with the answer's text first, and the reasoning that led to it, where there was any."""
    said: dict[str, Any] = {"text": answer.text if answer else "", "finish": answer.finish if answer else None}
    if answer is not None and answer.reasoning:
        said["reasoning"] = answer.reasoning
    return said | engine.stats()


def run(chat: Conversation, greeting: str, settings: dict[str, Any], as_json: bool) -> None:
    """Read, answer, repeat, until end of input or /quit."""
    last = None
    terminal = sys.stdin.isatty()
    print(greeting, file=sys.stdout if terminal else sys.stderr)
    if terminal:
        _history()
    for line in _lines(terminal):
        if not line.startswith("/"):
            last = _guarded(lambda line=line: _stream(chat, line, settings)) or last
            continue
        name, _, rest = line[1:].partition(" ")
        if name in ("quit", "exit"):
            break
        if name == "retry":
            last = _guarded(lambda: _stream(chat, None, settings)) or last
        else:
            _guarded(lambda name=name, rest=rest: _command(chat, settings, name, rest.strip()))
    if as_json:
        print(json.dumps(figures(chat.engine, last)), flush=True)


def banner(engine: Engine) -> str:
    plan = engine.plan
    return (
        f"{engine.store.folder.name} on {engine.device.name}: {plan.slots} of {plan.experts} experts fit "
        f"({plan.residency:.0%}), budget {size(plan.budget_bytes)}, context {plan.ctx} tokens. /help for commands."
    )


def _stream(chat: Conversation, text: str | None, settings: dict[str, Any]) -> Answer | None:
    options = _options(chat, settings)
    with _interruptible() as stop:
        show = _Progress(chat.unit)
        watch: dict[str, Any] = {"on_text": show.text, "on_reasoning": show.reasoning}
        watch |= {"on_layer": show.layer, "cancelled": stop.is_set}
        answer = chat.retry(**watch, **options) if text is None else chat.say(text, **watch, **options)
        show.end()
    if answer is None:
        print("nothing to retry yet")
    elif answer.finish == "cancelled":
        print("[stopped]")
    elif answer.finish == "length":
        print(f"[stopped at {answer.new_tokens} tokens: /set max_new_tokens N, or a larger --ctx]", file=sys.stderr)
    return answer


def _options(chat: Conversation, settings: dict[str, Any]) -> dict[str, Any]:
    options = dict(settings)
    if "seed" in options:
        chat.seed(options.pop("seed"))
    if options.get("temperature", 1.0) < GREEDY_BELOW:
        options.pop("temperature")
        options.pop("top_p", None)
        options["do_sample"] = False
    elif "temperature" in options or "top_p" in options:
        options["do_sample"] = True
    return options


def _command(chat: Conversation, settings: dict[str, Any], name: str, rest: str) -> None:
    if name == "help":
        print(HELP)
    elif name == "clear":
        chat.clear()
        print("conversation cleared")
    elif name == "system":
        chat.clear()
        chat.system = rest or None
        print("system message set" if rest else "system message cleared")
    elif name == "set":
        _set(settings, rest)
    elif name == "stats":
        print(stats_text(chat.engine.stats(), chat.reused_tokens))
    else:
        raise Refusal(
            "E_COMMAND",
            f"unknown command /{name}",
            nearest(name, ["help", "system", "set", "clear", "retry", "stats", "quit"]),
        )


def _set(settings: dict[str, Any], rest: str) -> None:
    name, _, value = rest.partition(" ")
    if name and name not in SETTINGS:
        raise Refusal("E_SETTING", f"unknown setting {name!r}", nearest(name, list(SETTINGS)))
    if name:
        settings[name] = checked(name, value)
    print("  ".join(f"{name}={settings.get(name, 'model default')}" for name in SETTINGS))


def stats_text(s: dict[str, Any], reused: int) -> str:
    """Of an engine; of a server only how the last answer went."""
    if "hits" not in s:
        return f"last answer   {_speed(s, reused)}\nserver        {s['url']}, its figures at {s['url']}/metrics"
    asked = s["hits"] + s["in_flight"] + s["misses"]
    share = {name: s[name] / asked if asked else 0 for name in ("hits", "in_flight", "misses")}
    link = f"{s['link_gbps']:.2f} GB/s while busy" if s["link_gbps"] else "idle"
    return (
        f"last answer   {_speed(s, reused)}\n"
        f"experts       {share['hits']:.1%} hit, {share['in_flight']:.1%} in flight, {share['misses']:.1%} missed; "
        f"{s['slots']} of {s['experts']} fit\n"
        f"guesses       {_guesses(s)}\n"
        f"moved         {size(s['bytes_moved'])}, {link}\n"
        f"stalled       {_stalls(s['stall_s'])}\n"
        f"memory        {size(s['used_bytes'])} used of {size(s['planned_bytes'])} planned, budget {size(s['budget_bytes'])}"
    )


def _speed(s: dict[str, Any], reused: int) -> str:
    ttft = f"{s['ttft_s']:.2f} s to the first token" if s["ttft_s"] is not None else "no answer yet"
    rate = f"{s['decode_tok_s']:.1f} tokens/s" if s["decode_tok_s"] else "-"
    return f"{ttft}, then {rate}; {s['new_tokens']} new tokens, {s['prompt_tokens']} prompt ({reused} kept)"


def _stalls(by_cause: dict[str, float]) -> str:
    """Seconds that compute waited, by cause, the longest first."""
    waited = sorted((cause for cause, s in by_cause.items() if s >= 0.0005), key=lambda cause: -by_cause[cause])
    return ", ".join(f"{by_cause[cause]:.3f} s {cause}" for cause in waited) or "never"


def _guesses(s: dict[str, Any]) -> str:
    """Whether experts are guessed ahead, why, and what became of the guesses."""
    p = s["prediction"]
    if p is None:
        return "none: no predictor"
    if p["error"]:
        return f"none: the predictor failed ({p['error']})"
    settled = s["guesses_ready"] + s["guesses_late"] + s["guesses_wrong"]
    became = f"{s['guesses']} begun"
    if settled:
        names = ("ready", "late", "wrong")
        became += ", of those settled " + ", ".join(f"{s['guesses_' + name] / settled:.0%} {name}" for name in names)
    measured = ""
    if p["with_s"] is not None:
        with_ms, without_ms = 1e3 * p["with_s"], 1e3 * p["without_s"]
        measured = (
            f" ({with_ms:.2f} ms a token with, {without_ms:.2f} without; {p['trials']} trials, {p['flips']} changes)"
        )
    return f"{p['predictor']}, {p['decision']}{measured}; {became}"


def _guarded(act: Any) -> Any:
    try:
        return act()
    except (ValueError, RuntimeError, OSError) as error:  # the chat goes on
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        print(
            f"error: {what if isinstance(error, Refusal) else f'E_FAILED: {what}; try again, or /quit'}",
            file=sys.stderr,
        )
        return None


def _lines(terminal: bool) -> Iterator[str]:
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except UnicodeDecodeError as error:
            print(f"error: E_INPUT: the line is not UTF-8 at byte {error.start}; type it again", file=sys.stderr)
            continue
        except EOFError:
            if terminal:
                print()
            return
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D leaves)")
            continue
        if line:
            yield line


def _history() -> None:
    try:
        import readline  # noqa: F401  line editing and history for input()
    except ImportError:
        return


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of raising, so that an answer ends between tokens and the chat stays whole."""
    stop = threading.Event()
    former = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, former)


CONTROLS = {n: "\N{REPLACEMENT CHARACTER}" for n in (*range(32), *range(127, 160)) if chr(n) not in "\n\t"}
DIM, PLAIN = "\x1b[2m", "\x1b[22m"


class _Progress:
    """The answer on stdout as it comes; before it, in a terminal, how far the prompt has been read, and what the model
    writes for itself, dim. Where stdout is no terminal, it has the answer alone.

    What a terminal would obey is shown as a sign: a model is not to move the cursor or to write a clipboard.
    """

    def __init__(self, unit: str) -> None:
        self._shown, self._unit, self._thinking = 0, unit, False
        self._terminal, self._screen = sys.stderr.isatty(), sys.stdout.isatty()
        self._dim, self._plain = ("", "") if os.environ.get("TERM") == "dumb" else (DIM, PLAIN)

    def layer(self, done: int, layers: int) -> None:
        if self._terminal:
            line = f"reading the prompt: {self._unit} {done + 1} of {layers}"
            self._shown = len(line)
            print(f"\r{line}", end="", file=sys.stderr, flush=True)

    def reasoning(self, piece: str) -> None:
        if self._screen:
            self._wipe()
            self._thinking = True
            print(f"{self._dim}{piece.translate(CONTROLS)}{self._plain}", end="", flush=True)

    def text(self, piece: str) -> None:
        self._wipe()
        if self._thinking:
            print("\n")
            self._thinking = False
        print(piece.translate(CONTROLS) if self._screen else piece, end="", flush=True)

    def end(self) -> None:
        self._wipe()
        print(flush=True)

    def _wipe(self) -> None:
        if self._shown:
            print(f"\r{' ' * self._shown}\r", end="", file=sys.stderr, flush=True)
            self._shown = 0
