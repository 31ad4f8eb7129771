"""A grammar's text becomes a matcher, within bounds; and the process that tries it first. Knows llguidance; knows nothing of
requests, schemas or models, and imports neither torch nor the rest of the package: run as a file, it is that process.

llguidance bounds most of its work itself, but not all: patterns that must be intersected or held apart, and multiples of
large numbers, take minutes, and cannot be interrupted. So a grammar is first compiled where an alarm ends it.

    server                                trial                        its child, one for each grammar
    {"tokenizer", "ends", "limit_s"}  ->  reads the tokenizer, once
    {"grammar"}                       ->  fork                     ->  alarm(limit_s); compile; first mask
                                                                   <-  status 0 and, on the trial's output:
                                      <-                               {"fault": null | "one line"}
                                      <-  {"fault": OVERRAN}       <-  or another status: the alarm, a crash, no memory
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import llguidance

MEMORY = 512 << 20  # bytes that grammars may add to what the process has with its tokenizer
OVERRAN = "it takes too long or too much memory to compile"
LIMITS = llguidance.LLParserLimits(
    max_lexer_states=20_000,  # one or two KiB each
    verbose_errors=False,
)


def tokens_of(tokenizer_json: str, ends: Sequence[int]) -> llguidance.LLTokenizer:
    """The vocabulary as llguidance wants it. ValueError where it cannot read this kind of tokenizer."""
    return llguidance.LLTokenizer(tokenizer_json, eos_token=list(ends))


def compile_grammar(tokens: llguidance.LLTokenizer, grammar: str) -> tuple[llguidance.LLMatcher, str | None]:
    """A matcher at its beginning, and what is wrong with it in one line."""
    matcher = llguidance.LLMatcher(tokens, grammar, log_level=0, limits=LIMITS)
    if matcher.is_error():
        return matcher, _line(matcher.get_error())
    first = matcher.deep_copy()
    first.compute_bitmask()
    if first.get_error().startswith("NoExtension"):
        return matcher, "no answer can match it"
    return matcher, _line(first.get_error()) if first.is_error() else None


def _line(error: str) -> str:
    return " ".join(error.replace("<non-verbose/>", "").split())[:200] or "it cannot be compiled"


def serve(requests: IO[str], replies: IO[str]) -> None:
    """Try grammars until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the server's; the end of the pipe ends this
    start = json.loads(requests.readline())
    tokens = tokens_of(start["tokenizer"], start["ends"])
    most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for line in requests:
        child = os.fork()
        if child == 0:
            signal.setitimer(signal.ITIMER_REAL, start["limit_s"])  # nobody handles the alarm: it ends this process
            fault = compile_grammar(tokens, json.loads(line)["grammar"])[1]
            signal.setitimer(signal.ITIMER_REAL, 0)
            _reply(replies, fault)
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            _reply(replies, OVERRAN)


def _reply(replies: IO[str], fault: str | None) -> None:
    replies.write(json.dumps({"fault": fault}) + "\n")
    replies.flush()


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)
