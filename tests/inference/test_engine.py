import threading
import time

import pytest
import torch

from lalia.errors import UserError
from lalia.inference import context as context_module
from lalia.inference import engine as engine_module
from lalia.inference.engine import Engine, Request
from lalia.inference.sampling import SamplingParams
from lalia.tokenizer.stream import TextStream

NUM_TOKENS = 16
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
PROMPTS = [
    [5],
    [10, 20, 30],
    list(range(40, 140)),
    [7] * 30,
    list(range(200, 100, -3)),
    [99, 1, 2, 250, 251],
    list(range(0, 300, 3)),
]


def run(engine: Engine, prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[Request]:
    requests = [engine.submit(prompt, params) for prompt in prompts]
    for request in requests:
        request.wait()
    return requests


def tokens(requests: list[Request]) -> list[list[int]]:
    return [request.token_ids for request in requests]


@pytest.fixture(scope="module")
def expected(model, tokenizer) -> list[list[int]]:
    """Greedy tokens of PROMPTS by one full forward pass each."""
    never = Engine(model, tokenizer)._never
    assert never is not None
    answers = []
    for prompt in PROMPTS:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(NUM_TOKENS):
                logits = model.logits(model(torch.tensor([ids]))[0, -1]).masked_fill(never, float("-inf"))
                ids.append(int(logits.argmax()))
        answers.append(ids[len(prompt) :])
    assert len({tuple(ids) for ids in answers}) == len(PROMPTS)
    return answers


def idle(engine: Engine) -> bool:
    """Invariant after every test: all slots are free."""
    stats = engine.stats()
    return stats["running"] == stats["waiting"] == stats["cached_tokens"] == 0


@pytest.fixture
def make_engine(model, tokenizer):
    def make(**options) -> Engine:
        return Engine(model, tokenizer, **{"max_batch": 4, **options})

    return make


def test_greedy_alone_batched_streamed_and_in_pieces_are_the_same(expected, make_engine, monkeypatch):
    engine = make_engine()
    assert [tokens(run(engine, [prompt]))[0] for prompt in PROMPTS] == expected  # alone
    assert tokens(run(make_engine(max_batch=1), PROMPTS)) == expected  # queued
    batched = run(engine, PROMPTS)  # seven requests in four slots: they join and leave
    assert tokens(batched) == expected
    assert tokens(run(make_engine(max_batch=7), PROMPTS)) == expected
    request = engine.submit(PROMPTS[2], GREEDY)
    streamed = [token_id for delta in request for token_id in delta.token_ids]
    assert streamed == expected[2] and request.text == batched[2].text
    for size in (1, 3):
        monkeypatch.setattr(engine_module, "PREFILL_TOKENS_ALONE", size)
        monkeypatch.setattr(engine_module, "PREFILL_TOKENS_BESIDE_OTHERS", size)
        assert tokens(run(engine, PROMPTS)) == expected
    monkeypatch.setattr(context_module, "PADDED_BATCH_TOKENS", 0)
    assert tokens(run(engine, PROMPTS)) == expected
    assert idle(engine)


def staggered(engine: Engine) -> list[Request]:
    """Every two steps another request, each longer than the one before."""
    requests = []
    for number, prompt in enumerate(PROMPTS):
        limit = SamplingParams(temperature=0, max_tokens=4 + 2 * number, ignore_eos=True)
        requests.append(engine.submit(prompt, limit))
        engine.step()
        engine.step()
    while engine.step():
        pass
    assert idle(engine)
    return requests


def test_requests_join_and_leave_at_any_step(expected, make_engine):
    assert tokens(staggered(make_engine())) == [ids[: 4 + 2 * i] for i, ids in enumerate(expected)]


def test_the_comparison_notices_a_slot_that_is_not_moved(expected, make_engine, monkeypatch):
    engine = make_engine()

    def forget(source: int, target: int) -> None:
        engine.cache.lengths[target] = engine.cache.lengths[source]

    monkeypatch.setattr(engine.cache, "move", forget)
    assert tokens(staggered(engine)) != [ids[: 4 + 2 * i] for i, ids in enumerate(expected)]


def test_a_seed_gives_the_same_text_whatever_else_is_in_the_batch(make_engine):
    engine = make_engine()
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=3, max_tokens=20, ignore_eos=True)
    alone = run(engine, [PROMPTS[1]], params)[0]
    others = [engine.submit(prompt, SamplingParams(temperature=1.5, max_tokens=9)) for prompt in PROMPTS[2:4]]
    together = engine.submit(PROMPTS[1], params)
    greedy = engine.submit(PROMPTS[4], GREEDY)
    for request in (*others, together, greedy):
        request.wait()
    assert together.token_ids == alone.token_ids
    other_seed = run(engine, [PROMPTS[1]], params.model_copy(update={"seed": 4}))[0]
    assert other_seed.token_ids != alone.token_ids
    unseeded = run(engine, [PROMPTS[1]] * 2, params.model_copy(update={"seed": None}))
    assert unseeded[0].token_ids != unseeded[1].token_ids


def test_text_is_the_decoded_tokens_and_never_splits_a_character(make_engine, tokenizer):
    engine = make_engine()
    params = SamplingParams(temperature=5.0, seed=1, max_tokens=200, ignore_eos=True)
    request = engine.submit([3], params)
    deltas = list(request)
    assert request.text == "".join(delta.text for delta in deltas) == tokenizer.decode(request.token_ids)
    assert any(delta.text == "" for delta in deltas)  # bytes were held back
    alone = "".join(tokenizer.decode(delta.token_ids) for delta in deltas)
    assert alone != request.text  # control: token by token, characters break


def test_padding_and_reserved_ids_are_never_drawn(make_engine, tokenizer):
    engine = make_engine(stop_ids=frozenset({tokenizer.end_of_text_id}))
    params = SamplingParams(temperature=5.0, seed=0, max_tokens=250, ignore_eos=True)
    drawn = {token_id for request in run(engine, [[i] for i in range(8)], params) for token_id in request.token_ids}
    without_text = set(range(320, 352)) | set(tokenizer.special.values())
    assert drawn & without_text == {tokenizer.end_of_text_id}
    assert len(drawn) > 250


def test_stop_tokens_end_without_text(model, make_engine, tokenizer):
    plain = run(make_engine(), [PROMPTS[1]])[0]
    end = plain.token_ids[4]
    first = plain.token_ids.index(end)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    engine = make_engine(stop_ids=frozenset({end}))
    request = run(engine, [PROMPTS[1]], params)[0]
    assert request.finish_reason == "stop" and request.token_ids == plain.token_ids[: first + 1]
    assert request.text == tokenizer.decode(plain.token_ids[:first])
    assert request.num_completion_tokens == first + 1
    ignoring = run(engine, [PROMPTS[1]])[0]
    assert ignoring.token_ids == plain.token_ids and ignoring.finish_reason == "length"


def test_stop_strings_are_found_across_tokens_and_cut_off(make_engine, tokenizer):
    engine = make_engine()
    plain = run(engine, [PROMPTS[1]])[0]
    pieces = [tokenizer.decode([token_id]) for token_id in plain.token_ids]
    windows = [plain.text[i : i + 3] for i in range(2, len(plain.text) - 3)]
    cut = next(w for w in windows if all(w not in piece for piece in pieces))  # it spans tokens
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, stop=("\u2603", cut))
    request = engine.submit(PROMPTS[1], params)
    deltas = list(request)
    assert request.finish_reason == "stop"
    assert request.text == plain.text[: plain.text.index(cut)]
    assert request.num_completion_tokens < NUM_TOKENS
    so_far = ""
    for delta in deltas:  # nothing given out was the beginning of a stop string
        so_far += delta.text
        assert plain.text.startswith(so_far) and len(so_far) <= plain.text.index(cut)
    unmet = run(engine, [PROMPTS[1]], SamplingParams(temperature=0, max_tokens=NUM_TOKENS, stop=(plain.text + "!",)))[0]
    assert unmet.finish_reason == "length" and unmet.text == plain.text  # what was held back comes at the end


def test_log_probabilities_are_the_models_own(model, make_engine, tokenizer):
    engine = make_engine()
    params = SamplingParams(
        temperature=1.7, top_k=3, repetition_penalty=1.3, seed=2, max_tokens=12, logprobs=4, ignore_eos=True
    )
    request = engine.submit(PROMPTS[3], params)
    beside = engine.submit(PROMPTS[1], GREEDY)  # asks for none
    request.wait()
    beside.wait()
    ids = [*PROMPTS[3], *request.token_ids]
    with torch.no_grad():
        expected = model.logits(model(torch.tensor([ids]))[0]).log_softmax(-1)
    for i, (entry, others) in enumerate(zip(request.logprobs, request.alternatives, strict=True)):
        row = expected[len(PROMPTS[3]) + i - 1]
        assert entry.token_id == request.token_ids[i]
        assert entry.bytes == tokenizer.token_bytes(entry.token_id)
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
        values, best = row.topk(4)
        assert [other.token_id for other in others] == best.tolist()
        assert [other.logprob for other in others] == pytest.approx(values.tolist(), abs=1e-4)
    assert len(request.logprobs) == 12
    assert beside.logprobs == () and beside.alternatives == ()
    tempered = expected[len(PROMPTS[3]) - 1].div(1.7).log_softmax(-1)  # control: the sampler's would differ
    assert request.logprobs[0].logprob != pytest.approx(tempered[request.token_ids[0]].item(), abs=1e-3)


def test_max_tokens_and_the_context(make_engine):
    engine = make_engine(max_length=50)
    request = run(engine, [[1] * 45], SamplingParams(temperature=0, ignore_eos=True))[0]
    assert request.num_completion_tokens == 5 and request.finish_reason == "length"
    exact = run(engine, [[1] * 49], SamplingParams(max_tokens=1, ignore_eos=True))[0]
    assert exact.num_completion_tokens == 1
    for prompt, params, words in (
        ([], GREEDY, ("empty",)),
        ([1] * 50, SamplingParams(), ("50 tokens", "context holds 50", "shorten")),
        ([1] * 70, SamplingParams(), ("70 tokens", "context holds 50")),
        ([1] * 40, SamplingParams(max_tokens=11), ("40 tokens", "max_tokens = 11", "context of 50", "to 10 or less")),
        ([1, 352], SamplingParams(max_tokens=1), ("352", "0 to 351")),
        ([-1], SamplingParams(max_tokens=1), ("-1", "0 to 351")),
    ):
        with pytest.raises(UserError) as error:
            engine.submit(prompt, params)
        assert all(word in str(error.value) for word in words), str(error.value)
    assert idle(engine)


@pytest.mark.parametrize("options", [{"max_batch": 0}, {"max_length": 301}, {"max_length": 1}])
def test_impossible_engines_are_refused(make_engine, options):
    with pytest.raises(UserError, match=next(iter(options))):
        make_engine(**options)


def test_cancelling_frees_the_slot_wherever_the_request_is(make_engine, monkeypatch):
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS_BESIDE_OTHERS", 4)
    engine = make_engine(max_batch=3)
    running = engine.submit([1, 2], GREEDY)
    stays = engine.submit([3, 4], GREEDY)
    engine.step()
    prefilling = engine.submit(list(range(60)), GREEDY)
    waiting = engine.submit([5], GREEDY)
    engine.step()
    assert engine.stats()["running"] == 3 and engine.stats()["waiting"] == 1
    for request in (running, prefilling, waiting):
        request.cancel()
        assert request.finish_reason == "cancelled"
        request.cancel()  # harmless
    assert engine.stats()["running"] == 1 and engine.stats()["cancelled"] == 3
    assert [len(delta.token_ids) for delta in running] == [1, 1, 0]
    stays.wait()
    assert stays.finish_reason == "length"
    assert stays.token_ids == run(make_engine(), [[3, 4]])[0].token_ids
    stays.cancel()
    assert stays.finish_reason == "length"
    assert idle(engine)


@pytest.mark.parametrize("where", ["text", "decode", "prefill"])
def test_a_failing_request_takes_no_other_along(make_engine, monkeypatch, where):
    expected = tokens(run(make_engine(), [PROMPTS[1], PROMPTS[3]]))
    engine = make_engine()
    bad_prompt = [111, 112, 113]
    if where == "text":
        push = TextStream.push

        def failing_push(self, token_id):
            if self is bad._stream and len(bad.token_ids) == 3:
                raise RuntimeError("broken")
            return push(self, token_id)

        monkeypatch.setattr(TextStream, "push", failing_push)
    else:

        class Failing:
            def __getattr__(self, name):
                return getattr(inner, name)

            def __call__(self, token_ids, cache):
                if (113 if where == "decode" else 111) in token_ids:  # its last token, or its first
                    raise RuntimeError("broken")
                return inner(token_ids, cache)

        inner, engine.decoder = engine.decoder, Failing()  # pyright: ignore[reportAttributeAccessIssue]
    first = engine.submit(PROMPTS[1], GREEDY)
    bad = engine.submit(bad_prompt, GREEDY)
    second = engine.submit(PROMPTS[3], GREEDY)
    first.wait()
    second.wait()
    assert [first.token_ids, second.token_ids] == expected
    assert bad.finished and bad.finish_reason is None and str(bad.error) == "broken"
    with pytest.raises(RuntimeError, match="broken"):
        list(bad)
    assert engine.stats()["failed"] == 1 and idle(engine)
    assert run(engine, [PROMPTS[1]])[0].token_ids == expected[0]


def test_broken_weights_are_an_error_not_text(model_factory, tokenizer):
    model = model_factory()
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    request = Engine(model, tokenizer).submit([1, 2], SamplingParams())
    with pytest.raises(FloatingPointError, match="weights are broken"):
        request.wait()
    assert request.token_ids == []


def test_a_thread_serves_many_clients(expected, make_engine):
    engine, found = make_engine(), {}
    engine.start()
    try:

        def client(number: int) -> None:
            request = engine.submit(PROMPTS[number % 7], GREEDY)
            found[number] = [token_id for delta in request for token_id in delta.token_ids]

        threads = [threading.Thread(target=client, args=(number,)) for number in range(21)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        assert [found[number] for number in range(21)] == expected * 3
        late = engine.submit(PROMPTS[0], GREEDY)  # after a rest
        late.wait()
        assert late.token_ids == expected[0]
    finally:
        engine.stop()
    assert idle(engine) and engine.stats()["length"] == 22


def test_the_thread_survives_a_defect(make_engine, monkeypatch):
    engine = make_engine()
    refresh, calls = engine.decoder.refresh, []

    def failing():
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("defect")
        return refresh()

    monkeypatch.setattr(engine.decoder, "refresh", failing)
    engine.start()
    try:
        with pytest.raises(RuntimeError, match="defect"):
            engine.submit([1], GREEDY).wait()
        assert run(engine, [[1]])[0].finish_reason == "length"
    finally:
        engine.stop()
    assert idle(engine)


def test_without_its_thread_the_iterator_goes_on(make_engine):
    engine = make_engine()
    expected = run(engine, [PROMPTS[1]], SamplingParams(temperature=0, ignore_eos=True))[0].token_ids
    engine.start()
    request = engine.submit(PROMPTS[1], SamplingParams(temperature=0, ignore_eos=True))
    deltas = iter(request)
    next(deltas)
    engine.stop()
    started = time.monotonic()
    rest = [token_id for delta in deltas for token_id in delta.token_ids]
    assert [request.token_ids[0], *rest] == expected and time.monotonic() - started < 20
    engine.stop()  # harmless


def test_iterating_again_gives_the_same(make_engine):
    request = make_engine().submit(PROMPTS[1], GREEDY)
    assert list(request) == list(request) and len(list(request)) == NUM_TOKENS


def test_thread_settings_come_back(make_engine):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen = []
    engine = make_engine()
    sampler_of = engine._sampler_of
    engine._sampler_of = lambda requests: (seen.append(torch.get_num_threads()), sampler_of(requests))[1]
    try:
        run(engine, PROMPTS[:2])
        assert torch.get_num_threads() == 2
        assert set(seen) == {1}  # small models generate on one thread
    finally:
        torch.set_num_threads(before)


def test_stats(make_engine):
    engine = make_engine()
    run(engine, PROMPTS[:2])
    stats = engine.stats()
    assert stats["prompt_tokens"] == 4 and stats["generated_tokens"] == 2 * NUM_TOKENS
    assert stats["submitted"] == stats["length"] == 2 and stats["steps"] >= NUM_TOKENS


def test_new_weights_are_taken_over_between_requests(model_factory, tokenizer):
    model, other = model_factory(seed=0), model_factory(seed=1)
    engine = Engine(model, tokenizer)
    expected = tokens(run(Engine(other, tokenizer), [PROMPTS[1]]))
    assert tokens(run(engine, [PROMPTS[1]])) != expected
    model.load_state_dict(other.state_dict())
    assert tokens(run(engine, [PROMPTS[1]])) == expected
