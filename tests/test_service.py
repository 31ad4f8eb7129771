"""Many requests, one engine: each answer is what the model alone would say; places, cancels and ends are accounted for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toys

import duoserve
from duoserve.core import Refusal
from duoserve.sampling import Sampling
from duoserve.service import Busy, End, Limits, Piece, Prompt, Request, Service

GREEDY = Sampling(temperature=0)


class Reader:
    """What a request was told."""

    def __init__(self, service: Service, request: Request):
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.seen: list[Any] = []
        self.ticket = service.submit(request, self.events.put)

    def end(self) -> End:
        while not self.seen or not isinstance(self.seen[-1], End):
            self.seen.append(self.events.get(timeout=60))
        return self.seen[-1]

    def first(self) -> Any:
        self.seen.append(self.events.get(timeout=60))
        return self.seen[0]

    @property
    def text(self) -> str:
        return "".join(e.text for e in self.seen if isinstance(e, Piece))

    @property
    def tokens(self) -> list[int]:
        return [t for e in self.seen if isinstance(e, Piece) for t in e.tokens]

    @property
    def logprobs(self) -> list[Any]:
        return [p for e in self.seen if isinstance(e, Piece) for p in e.logprobs]


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    with duoserve.load(None, predictor="none", sequences=3) as engine:
        yield engine


@pytest.fixture
def service(engine: Any) -> Iterator[Service]:
    service = Service(engine, Limits(active=3, queue=5, per_client=4))
    yield service
    service.close()
    assert engine.runtime.company is None
    engine.runtime.cache.check()


def ask(engine: Any, text: str, **options: Any) -> Request:
    return Request(engine.encode([{"role": "user", "content": text}])[0].tolist(), **options)


QUESTIONS = ["What is Git?", "How do I sort a list?", "What does ls do?", "Explain an index.", "What is Perl?"]


def test_concurrent_answers_are_the_model_s_own(engine: Any, service: Service) -> None:
    requests = [ask(engine, q, max_new=10 + n, sampling=GREEDY) for n, q in enumerate(QUESTIONS)]
    readers = [Reader(service, request) for request in requests]
    ends = [reader.end() for reader in readers]
    for request, reader, end in zip(requests, readers, ends, strict=True):
        ids = torch.tensor([request.ids])
        with torch.inference_mode():
            out = engine.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, repetition_penalty=1.0,
                max_new_tokens=request.max_new,
            )[0, ids.shape[1] :].tolist()  # fmt: skip
        eos = engine.model.generation_config.eos_token_id
        assert reader.tokens == [t for t in out if t != eos]
        assert reader.text == engine.tokenizer.decode(out, skip_special_tokens=True)
        assert end.new_tokens == len(out) and end.finish == ("stop" if out[-1] == eos else "length")
    assert service.active == service.queued == 0


def test_a_seed_repeats_an_answer_whoever_else_is_served(engine: Any, service: Service) -> None:
    request = ask(engine, QUESTIONS[0], max_new=12, sampling=Sampling(temperature=3.0, top_p=0.9, seed=7))
    alone = Reader(service, request)
    alone.end()
    others = [Reader(service, ask(engine, q, max_new=20)) for q in QUESTIONS[1:3]]
    again = Reader(service, request)
    assert again.end().finish and again.tokens == alone.tokens
    different = Reader(
        service, ask(engine, QUESTIONS[0], max_new=12, sampling=Sampling(temperature=3.0, top_p=0.9, seed=8))
    )
    different.end()
    assert different.tokens != alone.tokens
    for other in others:
        other.end()


def test_logprobs_are_the_model_s(engine: Any, service: Service) -> None:
    request = ask(
        engine,
        QUESTIONS[2],
        max_new=6,
        sampling=Sampling(temperature=0, logprobs=3),
        prompt_logprobs=2,
        ignore_eos=True,
    )
    reader = Reader(service, request)
    reader.end()
    prompt = next(e for e in reader.seen if isinstance(e, Prompt))
    ids = torch.tensor([request.ids + reader.tokens])
    with torch.inference_mode():
        want = engine.model(input_ids=ids).logits[0].float().log_softmax(-1)
        want[: len(request.ids) - 1] = (
            engine.model(input_ids=ids[:, : len(request.ids)]).logits[0, :-1].float().log_softmax(-1)
        )
    n = len(request.ids)
    assert len(prompt.logprobs) == n - 1 and len(reader.logprobs) == 6
    for at, found in enumerate([*prompt.logprobs, *reader.logprobs]):
        assert found.token == ids[0, at + 1]
        near = 1e-5 if at < n - 1 else 0.25  # one row at a time and all at once differ in bfloat16
        assert found.logprob == pytest.approx(float(want[at, found.token]), abs=near)
    assert [len(p.top) for p in reader.logprobs] == [3] * 6
    assert all(p.top[0] == (p.token, p.logprob) for p in reader.logprobs)  # greedy


def test_a_stop_string_ends_an_answer_and_is_not_told(engine: Any, service: Service) -> None:
    whole = Reader(service, ask(engine, QUESTIONS[0], max_new=30, sampling=GREEDY))
    whole.end()
    stop = whole.text[9:14]
    cut = Reader(service, ask(engine, QUESTIONS[0], max_new=30, sampling=GREEDY, stop=(stop,)))
    end = cut.end()
    assert (end.finish, end.stop_string) == ("stop", stop)
    assert cut.text == whole.text[: whole.text.index(stop)]


def test_a_bias_decides_and_a_penalty_counts(engine: Any, service: Service) -> None:
    request = ask(engine, QUESTIONS[0], max_new=4, sampling=Sampling(temperature=0, bias={77: 1000.0}), ignore_eos=True)
    biased = Reader(service, request)
    biased.end()
    assert biased.tokens == [77] * 4
    penalty = Sampling(temperature=0, bias={77: 1000.0, 78: 900.0}, presence_penalty=200.0)
    penalised = Reader(service, ask(engine, QUESTIONS[0], max_new=4, sampling=penalty, ignore_eos=True))
    penalised.end()
    assert penalised.tokens == [77, 78, 77, 77]


def test_a_cancel_frees_the_place(engine: Any, service: Service) -> None:
    long = [Reader(service, ask(engine, q, max_new=400, sampling=GREEDY, ignore_eos=True)) for q in QUESTIONS[:4]]
    for reader in long[:3]:
        reader.first()
    assert service.active == 3 and service.queued == 1
    for reader in long:
        reader.ticket.cancel()
    assert [reader.end().finish for reader in long] == ["cancelled"] * 4
    assert service.active == service.queued == 0
    again = Reader(service, ask(engine, QUESTIONS[0], max_new=3, sampling=GREEDY))
    assert again.end().new_tokens == 3


def test_a_full_queue_says_so_and_clients_take_turns(engine: Any, service: Service) -> None:
    long = {"max_new": 400, "sampling": GREEDY, "ignore_eos": True}
    running = [Reader(service, ask(engine, q, client="greedy", **long)) for q in QUESTIONS[:3]]
    for reader in running:
        reader.first()
    waiting = [Reader(service, ask(engine, QUESTIONS[3], client="greedy", max_new=1, sampling=GREEDY))]
    with pytest.raises(Busy, match="4 of your requests are under way, at most 4 may be") as busy:
        Reader(service, ask(engine, QUESTIONS[3], client="greedy"))
    assert busy.value.scope == "client"
    waiting += [Reader(service, ask(engine, "Hi", client=f"{n}", max_new=1, sampling=GREEDY)) for n in range(4)]
    with pytest.raises(Busy, match="5 requests wait, at most 5 may") as busy:
        Reader(service, ask(engine, "Hi", client="last"))
    assert busy.value.scope == "server" and busy.value.retry_s >= 1
    for reader in running:
        reader.ticket.cancel()
    assert all(reader.end().finish in ("length", "stop") for reader in waiting)


def test_too_long_a_prompt_is_refused_with_both_numbers(engine: Any, service: Service) -> None:
    ctx = engine.plan.ctx
    with pytest.raises(Refusal, match=f"the prompt has {ctx} tokens, the context {ctx}"):
        service.submit(Request([5] * ctx), lambda event: None)


def test_what_cannot_be_read_ends_one_request_with_its_error(tmp_path: Path) -> None:
    folder = toys.make(tmp_path / "model", "qwen3_moe")
    with duoserve.load(folder, budget="half", dtype="float32", cache_dir=str(tmp_path / "cache")) as engine:
        service, read, broken = Service(engine), engine.store.read_into, threading.Event()

        def failing(key: Any, into: Any) -> None:
            if broken.is_set():
                raise OSError("the disk is gone")
            read(key, into)

        engine.store.read_into = failing
        broken.set()
        end = Reader(service, Request([5, 6, 7], max_new=3, sampling=GREEDY)).end()
        assert end.finish == "error" and "the disk is gone" in str(end.error)
        broken.clear()
        assert Reader(service, Request([5, 6, 7], max_new=3, sampling=GREEDY, ignore_eos=True)).end().new_tokens == 3
        service.close()


def test_draining_lets_the_running_end_and_takes_no_more(engine: Any) -> None:
    service = Service(engine)
    reader = Reader(service, ask(engine, QUESTIONS[0], max_new=8, sampling=GREEDY))
    assert service.drain(60)
    assert reader.end().finish in ("length", "stop")
    with pytest.raises(Busy, match="shutting down"):
        Reader(service, ask(engine, QUESTIONS[0]))
    service.close()
