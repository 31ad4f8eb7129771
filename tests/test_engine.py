"""Prompts in, text and figures out, also while they come about."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
import transformers

from duoserve.api.live import snapshot
from duoserve.cache import ExpertCache
from duoserve.checkpoint import check_config
from duoserve.conversation import Conversation
from duoserve.core import Phase, Refusal, Step
from duoserve.device import WorkerStream
from duoserve.service import End, Request, Service
from duoserve.transfer import Transfer


@pytest.fixture(scope="module")
def engine(cache: Any) -> Any:
    import duoserve

    with duoserve.load(cache_dir=str(cache)) as engine:
        yield engine


@pytest.fixture
def service(engine: Any) -> Iterator[Service]:
    service = Service(engine)
    yield service
    service.close()


GREEDY = {"do_sample": False, "max_new_tokens": 12}


def test_the_demo_is_a_stock_model_half_of_whose_experts_fit(engine: Any) -> None:
    assert type(engine.model).__module__.startswith("transformers.models.")
    assert engine.plan.residency == 0.5


def test_generate_answers_texts_and_messages(engine: Any) -> None:
    for prompt in ("A list is", [{"role": "user", "content": "What is a list?"}]):
        answer = engine.generate(prompt, **GREEDY)
        assert str(answer) == answer.text and 1 <= answer.new_tokens <= 12
        assert answer.prompt_tokens == engine.encode(prompt).shape[1] and answer.ttft_s > 0


def test_stream_gives_the_text_of_generate(engine: Any) -> None:
    assert "".join(engine.stream("A list is", **GREEDY)) == engine.generate("A list is", **GREEDY).text


def test_closing_a_stream_stops_the_generation(engine: Any) -> None:
    before = engine.runtime.steps
    stream = engine.stream("A list is", do_sample=False, max_new_tokens=500, eos_token_id=-1)
    next(stream)
    stream.close()
    assert engine.runtime.steps - before < 400
    assert engine.generate("A list is", **GREEDY).new_tokens > 0


def test_cancelling_keeps_what_there_is(engine: Any) -> None:
    pieces: list[str] = []
    answer = engine.generate("A list is", on_text=pieces.append, cancelled=lambda: len(pieces) >= 2, do_sample=False,
                             max_new_tokens=200, eos_token_id=-1)  # fmt: skip
    assert answer.finish == "cancelled" and 0 < answer.new_tokens < 200
    assert engine.generate("A list is", cancelled=lambda: True, **GREEDY).new_tokens == 0
    engine.runtime.cache.check()


def test_the_reading_of_a_prompt_is_reported_layer_by_layer(engine: Any) -> None:
    seen: list[tuple[int, int]] = []
    engine.generate("A list is", on_layer=lambda done, n: seen.append((done, n)), **GREEDY)
    assert seen == [(i, 6) for i in range(6)]


def test_refusals_name_the_numbers(engine: Any) -> None:
    with pytest.raises(Refusal, match="the context 1024"):
        engine.generate("word " * 3000)
    with pytest.raises(Refusal, match="did you mean 'temperature'"):
        engine.generate("A list", temprature=1.0)


def test_beams_and_stop_strings_work_and_several_answers_are_refused(engine: Any) -> None:
    assert engine.generate("A list is", num_beams=2, **GREEDY).new_tokens > 0
    text = engine.generate("A list is", **GREEDY).text
    stopped = engine.generate("A list is", stop_strings=[text[2:5]], **GREEDY)
    assert stopped.new_tokens < 12 and text[2:5] in stopped.text and stopped.finish == "stop"
    with pytest.raises(Refusal, match="num_return_sequences=2"):
        engine.generate("A list is", num_return_sequences=2, **GREEDY)


def test_what_the_publisher_says_of_answers_is_followed_or_refused(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = engine.model.generation_config
    monkeypatch.setattr(said, "num_beams", 2)
    monkeypatch.setattr(said, "stop_strings", ["\n"])
    assert engine.generate("A list is", **GREEDY).new_tokens > 0
    monkeypatch.setattr(said, "num_beams", 1)
    with pytest.raises(Refusal, match=r"E_OPTION: transformers refuses .*temperature.*; correct"):
        engine.generate("A list is", do_sample=True, temperature=-1.0)


def test_an_answer_asked_for_within_an_answer_is_refused(engine: Any) -> None:
    said: list[BaseException] = []

    def again(piece: str) -> None:
        with pytest.raises(RuntimeError, match="answering on this thread") as error:
            engine.generate("A list is", **GREEDY)
        said.append(error.value)

    assert engine.generate("A list is", on_text=again, **GREEDY).new_tokens and said


def test_models_are_built_one_at_a_time(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    at_it: list[int] = []
    real = transformers.AutoModelForCausalLM.from_config

    def slow(*args: Any, **options: Any) -> Any:
        at_it.append(1)
        try:
            assert len(at_it) == 1, "two threads change torch's default dtype at once"
            time.sleep(0.05)
            return real(*args, **options)
        finally:
            at_it.pop()

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", slow)
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(check_config, [toy("mixtral")] * 3))
    assert torch.get_default_dtype() == torch.float32


INTERRUPTED = [
    (ExpertCache, "_close"),  # a slot loses its former expert
    (ExpertCache, "_at"),
    (Transfer, "fetch"),  # it has the new one, whose copy nobody ordered
    (WorkerStream, "_wake"),  # ordered, and nobody knows
    (Transfer, "release"),
]


@pytest.mark.parametrize(("owner", "name"), INTERRUPTED, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_ctrl_c_at_any_moment_leaves_the_right_tokens(
    toy: Any, load: Any, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    engine, ids = load(toy("mixtral"), budget="min"), toys.ids()
    want = engine.model(ids).logits
    for moment in (1, 2, 5, 9):
        real, left = getattr(owner, name), [moment]

        def struck(self: Any, *args: Any, real: Any = real, left: list[int] = left) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return real(self, *args)

        monkeypatch.setattr(owner, name, struck)
        with pytest.raises(KeyboardInterrupt):
            engine.model(ids)
        monkeypatch.setattr(owner, name, real)
        assert torch.equal(engine.model(ids).logits, want), moment
        engine.runtime.cache.check()


def test_a_fork_is_told_that_it_has_no_threads(toy: Any, load: Any) -> None:
    engine = load(toy("mixtral"), budget="min")
    child = os.fork()
    if not child:
        signal.alarm(20)  # a wait without end would end so
        try:
            engine.model(toys.ids())
        except RuntimeError as error:
            os._exit(7 if "open one here" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_closed_engine_says_so(toy: Any, load: Any) -> None:
    engine = load(toy("mixtral"))
    engine.close()
    with pytest.raises(RuntimeError, match="engine is closed"):
        engine.model(toys.ids())


def test_stats_are_json_and_add_up(engine: Any) -> None:
    before = engine.stats()
    answer = engine.generate("The interpreter", **GREEDY)
    after = json.loads(json.dumps(engine.stats()))
    assert after["new_tokens"] == answer.new_tokens
    assert after["bytes_moved"] == after["misses"] * 0 + (after["misses"] + after["guesses"]) * engine.store.slab_bytes
    asked = sum(after[k] - before[k] for k in ("hits", "in_flight", "misses"))
    assert asked >= 6 * 4 * (answer.new_tokens - 1), "six layers, four experts each, at every token"
    assert after["used_bytes"] <= after["planned_bytes"] <= after["budget_bytes"]


def test_observers_get_finished_steps(toy: Any, load: Any) -> None:
    engine, steps = load(toy("qwen3_moe"), budget="half"), []
    engine.runtime.observers.append(steps.append)
    ids = toys.ids(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    engine.model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    first, *rest = steps
    assert isinstance(first, Step) and first.phase is Phase.PREFILL and first.rows == 14
    assert torch.equal(first.ids_BS, ids) and torch.equal(first.padding_BS, mask == 0)
    assert [route.layer for route in first.routes] == [0, 1, 2] and first.routes[0].ids_TK.shape == (14, 2)
    assert [step.phase for step in rest] == [Phase.DECODE] * 2
    assert rest[0].positions_BS.tolist() == [[4], [7]]


def test_two_threads_share_one_engine(engine: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    prompts = ["A list is", "The interpreter", "To install", "A module"]
    alone = [engine.generate(p, **GREEDY).text for p in prompts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda p: engine.generate(p, **GREEDY).text, prompts)) == alone
    engine.runtime.cache.check()


def test_a_conversation_reads_only_what_is_new(engine: Any) -> None:
    chat = Conversation(engine)
    for text in ("What is a list?", "And a tuple?", "Why?"):
        answer = chat.say(text, **GREEDY)
    assert len(chat.messages) == 6 and chat.messages[-1]["content"] == answer.text
    assert chat.reused_tokens > 0.5 * answer.prompt_tokens
    fresh = Conversation(engine, reuse=False)
    fresh.messages = chat.messages[:4]
    assert fresh.say("Why?", **GREEDY).prompt_tokens == answer.prompt_tokens


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_a_prompt_cancelled_between_layers_leaves_the_conversation_whole(load: Any, layer: int) -> None:
    engine = load(dtype="float32", format="bf16", budget="half")
    chat, layers = Conversation(engine), []
    chat.say("What is a list?", **GREEDY)
    stopped = chat.say(
        "long " * 30, on_layer=lambda done, n: layers.append(done), cancelled=lambda: layers[-1:] == [layer], **GREEDY
    )
    assert stopped.new_tokens == 0 and stopped.finish == "cancelled"
    fresh = Conversation(engine, reuse=False)
    fresh.messages = [dict(m) for m in chat.messages]
    assert chat.say("Why?", **GREEDY).text == fresh.say("Why?", **GREEDY).text


def test_a_refused_retry_loses_nothing(engine: Any) -> None:
    chat = Conversation(engine)
    chat.say("What is a list?", **GREEDY)
    with pytest.raises(Refusal):
        chat.retry(temprature=1)
    assert len(chat.messages) == 2
    chat.say("And?", num_beams=2, **GREEDY)
    chat.say("Why?", **GREEDY)


def test_generate_takes_what_transformers_takes(engine: Any) -> None:
    import transformers

    ids = engine.encode("A list is")
    assert torch.equal(engine.generate(ids, **GREEDY), engine.generate(input_ids=ids, **GREEDY))
    config = transformers.GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=0)
    assert engine.generate("A list is", generation_config=config).new_tokens <= 3
    assert engine.generate("A list is", max_length=ids.shape[1] + 2, do_sample=False).new_tokens <= 2
    for wrong in ([], ["text"], [{"role": "user"}]):
        with pytest.raises(Refusal, match="E_TEMPLATE"):
            engine.generate(wrong)


def test_engines_that_fail_or_are_dropped_leak_nothing(toy: Any, load: Any, cache: Any) -> None:
    import gc
    import os
    import threading

    import duoserve

    folder = load(toy("mixtral"), budget="half").store.folder
    gc.collect()
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        with pytest.raises(Refusal):
            duoserve.load(folder, budget=1000)
        duoserve.load(folder, budget="half")
        gc.collect()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_retry_answers_the_same_question_again(engine: Any) -> None:
    chat = Conversation(engine)
    first = chat.say("What is a list?", **GREEDY)
    again = chat.retry(**GREEDY)
    assert again.prompt_tokens == first.prompt_tokens and len(chat.messages) == 2
    chat.clear()
    assert chat.retry() is None


def test_reusing_keys_and_values_gives_float32_the_same_tokens(load: Any) -> None:
    engine = load(dtype="float32", format="bf16", budget="half")
    answers = []
    for reuse in (True, False):
        chat = Conversation(engine, reuse=reuse)
        answers.append([chat.say(text, **GREEDY).text for text in ("What is a list?", "And a tuple?", "Why?")])
    assert answers[0] == answers[1]


def test_float16_checkpoints_stay_float16(toy: Any, load: Any) -> None:
    folder = toy("qwen3_moe", dtype=torch.float16)
    engine = load(folder, format="bf16", budget="half")
    with torch.no_grad():
        got, want = engine.model(toys.ids()).logits, toys.stock(folder, torch.float16)(toys.ids()).logits
    assert got.dtype == torch.float16 and ((got - want).norm() / want.norm()).item() < 0.02


def test_keys_and_values_are_planned_for_as_many_sequences_as_are_asked(tmp_path: Path) -> None:
    import duoserve

    folder, where = toys.make(tmp_path / "model", "mixtral"), {"cache_dir": str(tmp_path / "cache"), "budget": "half"}
    with duoserve.load(folder, ctx=64, **where) as one, duoserve.load(folder, ctx=64, sequences=3, **where) as three:
        assert three.plan.kv_bytes == 3 * one.plan.kv_bytes
        assert three.plan.slots == one.plan.slots
        assert three.plan.holds(3, 64) and not one.plan.holds(3, 64)


def test_a_look_is_what_the_engine_holds(engine: Any, service: Service) -> None:
    engine.generate([{"role": "user", "content": "What is Git?"}], max_new_tokens=8, do_sample=False)
    found = json.loads(json.dumps(snapshot(engine, service)))
    cache, store = engine.runtime.cache, engine.store
    assert found["experts_per_layer"] == [layer.n_experts for layer in store.layers]
    held = {(layer, e) for layer, row in enumerate(found["state"]) for e, letter in enumerate(row) if letter != "."}
    assert held == {tuple(key) for key in cache.keys()}
    assert set("".join(found["state"])) <= set(found["states"])
    assert set("".join(found["heat"])) <= set("0123456789") and "".join(found["heat"]).strip("0")
    stats = engine.stats()
    assert found["counts"]["hits"] == stats["hits"] and found["counts"]["misses"] == stats["misses"]
    moved = sum(found["lanes"][lane]["done"] for lane in ("demand", "ahead"))
    assert moved * store.slab_bytes == found["bytes_moved"] == stats["bytes_moved"]
    assert sum(part["used"] for part in found["memory"]["parts"]) == stats["used_bytes"]
    assert found["pass"] is None and found["requests"]["active"] == 0


def test_a_look_names_what_is_flying(engine: Any, service: Service) -> None:
    cache, store, read = engine.runtime.cache, engine.store, engine.store.read_into
    stopped, go_on = threading.Event(), threading.Event()

    def slow(key: Any, into: Any) -> None:
        stopped.set()
        assert go_on.wait(20)
        read(key, into)

    store.read_into = slow
    thread = threading.Thread(target=lambda: engine.generate("Hi", max_new_tokens=2, do_sample=False))
    try:
        before = snapshot(engine, service)
        thread.start()
        assert stopped.wait(20)
        found = snapshot(engine, service)
    finally:
        go_on.set()
        thread.join()
        store.read_into = read
    demand = found["lanes"]["demand"]
    flying = [*demand["flying"], *demand["next"]]
    assert demand["flying"] and demand["done"] == before["lanes"]["demand"]["done"]
    assert all(found["state"][layer][expert] == "a" for layer, expert in flying)
    assert found["pass"] == {"phase": "prefill", "rows": found["pass"]["rows"], "layer": flying[0][0]}
    after = snapshot(engine, service)
    assert "a" not in "".join(after["state"]) and not after["lanes"]["demand"]["flying"]
    cache.check()


def test_how_far_a_prompt_was_read_is_told(engine: Any, service: Service) -> None:
    ids, told = [5] * 600, []
    ticket = service.submit(Request(ids, max_new=1), told.append)
    seen = [(0, 600)]
    while not told or not isinstance(told[-1], End):
        seen += map(tuple, snapshot(engine, service)["requests"]["reading"])
        time.sleep(0.002)
    assert [all_ for _, all_ in seen] == [600] * len(seen) and ticket.read == 600
    reads = [read for read, _ in seen]
    assert reads == sorted(reads) and 0 < reads[-1] <= 600
