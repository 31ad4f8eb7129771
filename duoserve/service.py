"""Answers many requests with one engine: a bounded queue in front, one thread that owns the model, and generations that meet
at the experts behind (`together.py`). Knows token ids, text and turns; knows nothing of HTTP.

    submit (any thread) -> queue, in turns by client -> admitted while keys and values fit -> a job -> `tell` Piece ... End

`tell` runs on the model's thread and must return at once: the engine never waits for whoever reads. Each request ends with
exactly one `End`, whatever became of it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import transformers

from duoserve.core import Refusal
from duoserve.device import in_background
from duoserve.engine import Engine
from duoserve.moe import Cancelled
from duoserve.sampling import Draw, Logprob, Sampling, logprob_of
from duoserve.sizing import CACHE
from duoserve.stopping import TextStream
from duoserve.together import Job, Together

PREFILL_CHUNK = 256  # tokens of a prompt per pass: how long those who decode may have to wait for one that joins


@dataclass(frozen=True)
class Limits:
    """Of a service. Seconds and counts; see docs/errors.md for what is said beyond them."""

    active: int = 4
    queue: int = 64
    per_client: int = 8
    queue_s: float = 300.0
    generation_s: float = 3600.0


@dataclass(frozen=True)
class Request:
    """A prompt as token ids and how to go on with it. `max_new` None: as many as there is room for; 0: only read the prompt.

    `prompt_logprobs`: alternatives to report with each token of the prompt; None for none.
    `arrived`: `time.perf_counter()` when it came, None for its submission: a client's requests go by that, however long one
    took to be understood. `mask` as `sampling.Draw`; made anew for each request. `visible`: special tokens that are part of
    the text.
    """

    ids: list[int]
    max_new: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    keep_stop: bool = False
    ignore_eos: bool = False
    prompt_logprobs: int | None = None
    mask: Any = None
    visible: frozenset[int] = frozenset()
    client: str = ""
    arrived: float | None = None


class Piece(NamedTuple):
    """Text that became certain, and the tokens that were drawn since the last piece (with logprobs where asked for)."""

    text: str
    tokens: list[int]
    logprobs: list[Logprob]


class Prompt(NamedTuple):
    """The prompt has been read. Logprobs of its second and later tokens, where asked for."""

    logprobs: list[Logprob]


class End(NamedTuple):
    """`finish`: "stop", "length", "cancelled" or "error"; seconds since submission to admission, first token, end."""

    finish: str
    prompt_tokens: int
    new_tokens: int
    queue_s: float
    first_s: float | None
    total_s: float
    stop_string: str | None = None
    error: BaseException | None = None


Event = Piece | Prompt | End


class Busy(Exception):
    """The queue is full; try again in about `retry_s` seconds. `scope` says whose: "server" or "client"."""

    def __init__(self, what: str, scope: str, retry_s: int):
        super().__init__(what)
        self.scope, self.retry_s = scope, retry_s


class Ticket:
    """A request on its way."""

    def __init__(self, request: Request, room: int, tell: Callable[[Event], None]):
        self.request, self.room, self._tell = request, room, tell
        self.submitted = time.perf_counter()
        self.arrived = self.submitted if request.arrived is None else request.arrived
        self.admitted: float | None = None
        self.first: float | None = None
        self.new_tokens = 0
        self.cancelled = False
        self.job: Job | None = None
        self.over = False

    def cancel(self) -> None:
        """On any thread, any number of times: it gives up its place within a layer's time."""
        self.cancelled = True
        if self.job is not None:
            self.job.cancel()

    @property
    def length(self) -> int:
        """Tokens that its keys and values may come to."""
        return len(self.request.ids) + self.room

    @property
    def read(self) -> int:
        """Tokens of the prompt that the model has read."""
        return min(len(self.request.ids), int(self.job.read)) if self.job is not None else 0

    def tell(self, event: Event) -> None:
        if not self.over:
            self.over = isinstance(event, End)
            self._tell(event)

    def end(self, finish: str, stop: str | None = None, error: BaseException | None = None) -> None:
        now = time.perf_counter()
        first = self.first - self.submitted if self.first is not None else None
        queued = (self.admitted or now) - self.submitted
        tokens = len(self.request.ids), self.new_tokens
        self.tell(End(finish, *tokens, queued, first, now - self.submitted, stop, error))


class Service:
    """One engine's requests. Open until `close`; `drain` first lets those under way end."""

    def __init__(self, engine: Engine, limits: Limits | None = None):
        self.engine, self.limits = engine, limits or Limits()
        self._lock = threading.Condition()
        self._waiting: dict[str, deque[Ticket]] = {}  # by client, the next one's turn first
        self._active: list[Ticket] = []
        self._open = True
        self._stopping = False
        self.finished: dict[str, int] = {}  # requests by how they ended
        self.rounds = 0
        self._ended = in_background(self._work, "service")

    def submit(self, request: Request, tell: Callable[[Event], None]) -> Ticket:
        """Queue a request. Refusal where it can never be answered, `Busy` where it cannot be now."""
        ticket = Ticket(request, self.room(request), tell)
        with self._lock:
            self.refuse_full(request.client)
            _in_order(self._waiting.setdefault(request.client, deque()), ticket)
            self._lock.notify()
        return ticket

    def refuse_full(self, client: str = "") -> None:
        """`Busy` where one more of this client's could not wait now."""
        if (busy := self.busy(client)) is not None:
            raise busy

    def busy(self, client: str = "", coming: int = 0) -> Busy | None:
        """What one more of this client's would hear, `coming` others being on their way here; None where it may wait."""
        with self._lock:
            mine = len(self._waiting.get(client, ())) + sum(t.request.client == client for t in self._active)
            at_once = max(0, self.limits.active - len(self._active))  # of those who wait
            waiting, most = self.queued + coming - at_once, self.limits.per_client
        if not self._open:
            return Busy("the server is shutting down", "server", 30)
        if waiting >= self.limits.queue:
            return Busy(f"{waiting} requests wait, at most {self.limits.queue} may", "server", self._retry_s())
        if client and mine >= most:
            what = f"{mine} of your requests are under way, at most {most} may be"
            return Busy(what, "client", self._retry_s())
        return None

    @property
    def open(self) -> bool:
        """Whether requests are still taken."""
        return self._open

    @property
    def queued(self) -> int:
        with self._lock:
            return sum(len(tickets) for tickets in self._waiting.values())

    @property
    def active(self) -> int:
        return len(self._active)

    def reading(self) -> list[tuple[int, int]]:
        """Of each request whose first token is to come: tokens of its prompt that were read, and all of them."""
        with self._lock:
            return [(t.read, len(t.request.ids)) for t in self._active if t.first is None]

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests; wait for those under way, and end what is left with "cancelled". Whether none was."""
        with self._lock:
            self._open = False
            done = self._lock.wait_for(lambda: not self._active and not self.queued, timeout_s)
            for ticket in (*self._active, *(t for tickets in self._waiting.values() for t in tickets)):
                ticket.cancel()
            self._lock.notify()
        return done

    def close(self) -> None:
        """End everything and the thread; the engine stays open."""
        self.drain(0)
        with self._lock:
            self._stopping = True
            self._lock.notify()
        self._ended()

    def room(self, request: Request) -> int:
        """Tokens that may be made; Refusal where there is no room at all."""
        plan, prompt = self.engine.plan, len(request.ids)
        room = plan.ctx - prompt
        if prompt == 0:
            raise Refusal("E_PROMPT", "the prompt has 0 tokens", "write at least one word")
        if room < (0 if request.max_new == 0 else 1):
            raise Refusal(
                "E_CTX",
                f"the prompt has {prompt} tokens, the context {plan.ctx}",
                "shorten it, or start the server with a larger --ctx",
                4,
            )
        return room if request.max_new is None else min(room, request.max_new)

    def _retry_s(self) -> int:
        """A guess at when a place is free: seconds."""
        return min(60, max(1, self.queued // max(1, self.limits.active)))

    # The model's thread

    def _work(self) -> None:
        with torch.inference_mode():
            together = Together(self.engine.runtime)
            try:
                while self._next(together):
                    if together.jobs:
                        together.round()
                        self.rounds = together.rounds
            finally:
                self.engine.runtime.company = None

    def _next(self, together: Together) -> bool:
        """Admit whoever fits, waiting while there is nothing to do; False once all is over."""
        with self._lock:
            self._expire()
            admitted = list(self._admit())
            if not together.jobs and not admitted:
                if self._stopping:
                    return False
                self._lock.wait(1.0)
        for ticket in admitted:
            self._begin(together, ticket)
        return True

    def _begin(self, together: Together, ticket: Ticket) -> None:
        ticket.job = together.add(lambda: self._answer(ticket), lambda result, error: self._over(ticket, result, error))
        if ticket.cancelled:
            ticket.job.cancel()

    def _admit(self) -> Iterator[Ticket]:
        """Clients in turns, each client's requests in order, as long as their keys and values fit the plan together."""
        plan = self.engine.plan
        while len(self._active) < self.limits.active:
            client = next((name for name, tickets in self._waiting.items() if tickets), None)
            if client is None:
                return
            ticket = self._waiting[client][0]
            taken = sum(plan.kv_of(1, t.length) for t in self._active)
            if self._active and taken + plan.kv_of(1, ticket.length) > plan.kv_bytes:
                return
            tickets = self._waiting.pop(client)
            tickets.popleft()
            if tickets:
                self._waiting[client] = tickets  # at the end: the next client's turn
            ticket.admitted = time.perf_counter()
            self._active.append(ticket)
            yield ticket

    def _expire(self) -> None:
        """Those who gave up while they waited, and those who waited too long."""
        now = time.perf_counter()
        for client, tickets in list(self._waiting.items()):
            for ticket in list(tickets):
                late = now - ticket.submitted > self.limits.queue_s
                if ticket.cancelled or late:
                    tickets.remove(ticket)
                    waited = TimeoutError(f"waited {self.limits.queue_s:.0f} s for a place")
                    self._count("error" if late else "cancelled")
                    ticket.end("error" if late else "cancelled", error=waited if late else None)
            if not tickets:
                del self._waiting[client]
        self._lock.notify_all()

    def _answer(self, ticket: Ticket) -> tuple[str, str | None]:
        """Inside a job: read the prompt, go on with it; how it ended."""
        request = ticket.request
        if request.prompt_logprobs is not None:
            ticket.tell(Prompt(self._prompt_logprobs(request)))
        if ticket.room == 0:
            if request.prompt_logprobs is None:
                ticket.tell(Prompt([]))
            return "length", None
        draw = Draw(request.sampling, len(request.ids), request.mask)
        text = TextStream(self.engine.tokenizer, request.stop, request.keep_stop, request.visible)
        ends = self.ends if not request.ignore_eos else set()
        reader = _Reader(ticket, draw, text, ends, time.perf_counter() + self.limits.generation_s)
        ids_1S = torch.tensor([request.ids], device=self.engine.device.torch_device)
        self.engine.model.generate(
            input_ids=ids_1S,
            attention_mask=torch.ones_like(ids_1S),
            generation_config=self._config(ticket.room, ends),
            logits_processor=transformers.LogitsProcessorList([draw]),
            stopping_criteria=transformers.StoppingCriteriaList([reader]),
            streamer=reader,
        )
        if reader.late:
            raise TimeoutError(f"the answer took longer than {self.limits.generation_s:.0f} s")
        reader.close()
        return reader.finish, text.stop_string

    def _config(self, room: int, ends: set[int]) -> transformers.GenerationConfig:
        """All that changes logits is `Draw`'s; what the model's own configuration would add is said not to be."""
        return transformers.GenerationConfig(
            max_new_tokens=room,
            do_sample=False,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            num_beams=1,
            use_cache=True,
            prefill_chunk_size=PREFILL_CHUNK,
            eos_token_id=sorted(ends) or -1,
            pad_token_id=min(ends, default=0),
        )

    @property
    def ends(self) -> set[int]:
        """Tokens that end an answer."""
        return set(self.engine.ends)

    def _prompt_logprobs(self, request: Request) -> list[Logprob]:
        """Of each token of the prompt but the first, by what came before it."""
        found: list[Logprob] = []
        ids_1S, past = torch.tensor([request.ids], device=self.engine.device.torch_device), None
        alternatives = request.prompt_logprobs or 0
        for begin in range(0, ids_1S.shape[1], PREFILL_CHUNK):
            chunk = ids_1S[:, begin : begin + PREFILL_CHUNK]
            out = self.engine.model(input_ids=chunk, use_cache=True, **({CACHE: past} if past is not None else {}))
            past = out[CACHE]
            following = request.ids[begin + 1 : begin + 1 + chunk.shape[1]]
            found += [logprob_of(out.logits[0, at], token, alternatives) for at, token in enumerate(following)]
        return found

    def _over(self, ticket: Ticket, result: Any, error: BaseException | None) -> None:
        with self._lock:
            self._active.remove(ticket)
            finish, stop = result if error is None else ("cancelled" if isinstance(error, Cancelled) else "error", None)
            self._count(finish)
            self._lock.notify_all()
        ticket.end(finish, stop, None if isinstance(error, Cancelled) else error)

    def _count(self, finish: str) -> None:
        self.finished[finish] = self.finished.get(finish, 0) + 1


def _in_order(tickets: deque[Ticket], ticket: Ticket) -> None:
    """Add a client's request behind those that came before it."""
    at = len(tickets)
    while at and tickets[at - 1].arrived > ticket.arrived:
        at -= 1
    tickets.insert(at, ticket)


class _Reader(transformers.generation.streamers.BaseStreamer, transformers.StoppingCriteria):
    """Sees each token as it is drawn, tells its text, and says when to stop."""

    def __init__(self, ticket: Ticket, draw: Draw, text: TextStream, ends: set[int], until: float):
        self._ticket, self._draw, self._text, self._ends, self._until = ticket, draw, text, ends, until
        self._prompt_seen = self._closed = False
        self._tokens: list[int] = []
        self._told = 0  # logprobs
        self.finish, self.late = "length", False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        ticket, token = self._ticket, int(value.reshape(-1)[0])
        ticket.first = ticket.first or time.perf_counter()
        ticket.new_tokens += 1
        if token in self._ends:  # counted, not told
            self.finish = "stop"
            del self._draw.drawn[self._told + len(self._tokens) :]
            return
        self._tokens.append(token)
        self._tell(self._text.put(token))
        if self._text.stopped:
            self.finish = "stop"

    def end(self) -> None:
        pass

    def close(self) -> None:
        """No token follows: what was held back is certain now."""
        if not self._closed:
            self._closed = True
            self._tell(self._text.end(), last=True)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.late = not self._text.stopped and time.perf_counter() > self._until
        done = self._text.stopped or self.late
        return torch.full((input_ids.shape[0],), done, dtype=torch.bool, device=input_ids.device)

    def _tell(self, text: str, last: bool = False) -> None:
        logprobs = self._draw.drawn[self._told :]
        if text or logprobs or (last and self._tokens):
            tokens, self._tokens, self._told = self._tokens, [], len(self._draw.drawn)
            self._ticket.tell(Piece(text, tokens, logprobs))
