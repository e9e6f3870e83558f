"""Continuous batching: many requests, one model, one step at a time.

Every request has known tokens (prompt and what was generated) and computed ones (those in the cache). A step lets the
computed catch up with the known: prompts in pieces, until only the last token is left; then the last tokens of all
such requests together, which gives each its next token. Requests join and leave between any two steps.

The occupied slots of the cache are contiguous:

    slot      0 .. running - 1          running                running + 1 ..
    holds     requests generating       the one whose prompt   nothing
              (known = computed + 1)    is being computed
"""

import contextlib
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence

import torch

from lalia.errors import UserError
from lalia.inference.decoder import Decoder
from lalia.inference.request import Delta, FinishReason, Request, TokenLogprob
from lalia.inference.sampling import Sampler, SamplingParams, describe
from lalia.model.cache import KVCache
from lalia.model.transformer import Transformer
from lalia.tokenizer.bpe import Tokenizer

__all__ = ["Delta", "Engine", "FinishReason", "Request", "TokenLogprob"]

PREFILL_TOKENS_ALONE, PREFILL_TOKENS_BESIDE_OTHERS = 512, 128
"""Prompt tokens computed in one step: fewer while others generate, who wait for it."""

SINGLE_THREAD_BYTES, SINGLE_THREAD_ROWS = 64 << 20, 64
"""Where fewer bytes of weights and cache are read, fewer rows than this are computed on one thread. Such operations
take 30 to 400 microseconds each, too short to gain much from a second thread; and when another process has that core,
every operation waits for it, which made steps 10 to 30 times slower where we measured."""


class Engine:
    """Runs requests on a model. Safe to use from several threads; the steps themselves run one after the other.

    With `start` a thread of the engine's own makes the steps; without, whoever iterates over a request does.

    Args:
        max_batch: requests that generate at the same time; others wait.
        max_length: longest sequence in tokens, prompt and answer together; None means the model's context.
        stop_ids: tokens that end a generation.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        max_batch: int = 16,
        max_length: int | None = None,
        stop_ids: frozenset[int] = frozenset(),
    ) -> None:
        context = model.config.max_position_embeddings
        if max_batch < 1:
            raise UserError(f"max_batch = {max_batch}: expected at least 1")
        if max_length is not None and not 2 <= max_length <= context:
            raise UserError(f"max_length = {max_length}: expected 2 to {context}, the context of this model")
        self.tokenizer, self.stop_ids = tokenizer, stop_ids
        self.max_batch, self.max_length = max_batch, max_length or context
        self.vocab_size = model.config.vocab_size
        self.decoder = Decoder(model)
        self.cache = KVCache(model.config, max_batch, self.max_length, self.decoder.dtype, self.decoder.device)
        self._cache_bytes_per_token = model.config.cache_bytes_per_token(self.decoder.dtype.itemsize)
        self._never = _never_drawn(tokenizer, self.vocab_size, stop_ids)
        self._waiting: deque[Request] = deque()
        self._prefilling: Request | None = None
        self._running: list[Request] = []
        self._sampler: Sampler | None = None
        """For the requests running; None when they have changed."""
        self._counts: Counter[str] = Counter()
        self._stepping = threading.Lock()
        self._work = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams) -> Request:
        """Queue a prompt.

        Raises:
            UserError: if the prompt is empty or holds an id outside the vocabulary, or if it and max_tokens do not
                fit in the context.
        """
        prompt_ids = list(prompt_ids)
        request = Request(prompt_ids, params, self.check(prompt_ids, params), self.tokenizer, self.vocab_size, self)
        with self._work:
            self._waiting.append(request)
            self._counts["submitted"] += 1
            self._work.notify_all()
        return request

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> int:
        """Raise what `submit` would raise; otherwise return the largest number of tokens to generate."""
        length, room = len(prompt_ids), self.max_length - len(prompt_ids)
        if length == 0:
            raise UserError("the prompt is empty; give at least one token")
        if room < 1:
            raise UserError(
                f"the prompt has {length} tokens, but the context holds {self.max_length} and one must be left for "
                "the answer; shorten the prompt"
            )
        for token_id in prompt_ids:
            if not 0 <= token_id < self.vocab_size:
                raise UserError(f"token id {token_id} is outside the vocabulary, 0 to {self.vocab_size - 1}")
        if params.max_tokens is None:
            return room
        if params.max_tokens > room:
            raise UserError(
                f"the prompt's {length} tokens and max_tokens = {params.max_tokens} are more than the context of "
                f"{self.max_length}; set max_tokens to {room} or less, leave it out to generate as many as fit, or "
                "shorten the prompt"
            )
        return params.max_tokens

    def step(self) -> bool:
        """Compute a piece of the waiting prompts, then one token of every running request. False if all is done."""
        with self._stepping, torch.inference_mode():
            self._drop_cancelled()
            if not (self._running or self._prefilling or self._waiting):
                return False
            if not self._running and not self._prefilling:
                self.decoder.refresh()
            self._counts["steps"] += 1
            self._prefill()
            if self._running:
                with self._threads(len(self._running)):
                    self._generate(0, len(self._running))
                self._remove_finished()
            return True

    def advance(self, request: Request, given: int) -> None:
        """Let the engine go on until `request` may have more than `given` deltas."""
        if self._thread is None:
            self.step()
        else:
            request.sleep(given, timeout_seconds=0.1)  # then look again whether the thread still runs

    def sweep(self) -> None:
        """Remove cancelled requests, unless a step is under way, which will."""
        if self._stepping.acquire(blocking=False):
            try:
                with torch.inference_mode():
                    self._drop_cancelled()
            finally:
                self._stepping.release()

    def start(self) -> None:
        """Let a thread of the engine's own make the steps."""
        assert self._thread is None, "the engine runs already"
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="lalia-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its present step. Unfinished requests stay; iterating over them goes on with them."""
        thread = self._thread
        if thread is None:
            return
        with self._work:
            self._stopping = True
            self._work.notify_all()
        thread.join()
        self._thread = None

    def stats(self) -> dict[str, int]:
        """Counts since the start: submitted, steps, prompt_tokens and generated_tokens computed, requests by end
        (stop, length, cancelled, failed); and as of now: running, waiting, max_batch, cached_tokens."""
        occupied = len(self._running) + (self._prefilling is not None)
        keys = ("submitted", "steps", "prompt_tokens", "generated_tokens", "stop", "length", "cancelled", "failed")
        return {
            **{key: self._counts[key] for key in keys},
            "running": occupied,
            "waiting": len(self._waiting),
            "max_batch": self.max_batch,
            "cached_tokens": sum(self.cache.lengths[:occupied]),
        }

    def _run(self) -> None:
        while not self._stopping:
            try:
                busy = self.step()
            except Exception as error:  # noqa: BLE001 (requests here fail, the thread lives on for later ones)
                with self._stepping:
                    self._fail_all(error)
                continue
            if not busy:
                with self._work:
                    self._work.wait_for(lambda: self._stopping or bool(self._waiting), timeout=1.0)

    def _prefill(self) -> None:
        """Compute prompts, all but their last token, as far as this step's share goes."""
        share = PREFILL_TOKENS_BESIDE_OTHERS if self._running else PREFILL_TOKENS_ALONE
        while share > 0:
            slot = len(self._running)
            if self._prefilling is None:
                if not self._waiting or slot == self.max_batch:
                    return
                self._prefilling = self._waiting.popleft()
                self.cache.lengths[slot] = 0
            request, start = self._prefilling, self.cache.lengths[slot]
            end = min(len(request.prompt_ids) - 1, start + share)
            if end > start:
                try:
                    self._reserve(slot, request)
                    self.cache.first = slot
                    tokens = torch.tensor([request.prompt_ids[start:end]], device=self.decoder.device)
                    with self._threads(end - start):
                        self.decoder(tokens, self.cache)
                except Exception as error:  # noqa: BLE001 (whatever it is, it ends this request alone)
                    self._prefilling = None
                    self._end(request, None, error)
                    continue
            share -= end - start
            self._counts["prompt_tokens"] += end - start
            if end == len(request.prompt_ids) - 1:
                self._prefilling, self._sampler = None, None
                self._running.append(request)

    def _reserve(self, slot: int, request: Request) -> None:
        """Make room for a long prompt and its answer at once: growing with every piece would copy the cache often."""
        length = len(request.prompt_ids) + (request.params.max_tokens or 1) - 1
        if length > PREFILL_TOKENS_ALONE:
            self.cache.reserve(slot + 1, length, exact=True)

    def _generate(self, first: int, end: int) -> None:
        """Draw the next token of the requests in slots first .. end."""
        requests, slots = self._running[first:end], range(first, end)
        lengths = self.cache.lengths[first:end]
        try:
            self.cache.first = first
            tokens = torch.tensor([[request.next_id()] for request in requests], device=self.decoder.device)
            logits = self.decoder.logits(self.decoder(tokens, self.cache)).cpu()
            asked = [i for i, request in enumerate(requests) if request.params.logprobs is not None]
            log_probs = logits[asked].log_softmax(-1) if asked else None
            drawn = self._sampler_of(requests)(logits, [request.state for request in requests])
            described = {}
            if log_probs is not None:
                counts = [requests[i].params.logprobs or 0 for i in asked]
                described = dict(zip(asked, describe(log_probs, [drawn[i] for i in asked], counts), strict=True))
        except Exception as error:  # noqa: BLE001 (whatever it is, it ends the request that causes it)
            self.cache.lengths[first:end] = lengths
            if len(requests) == 1:
                self._end(requests[0], None, error)
                return
            for slot in slots:  # find out whose it is
                self._generate(slot, slot + 1)
            return
        self._counts["prompt_tokens"] += sum(not request.token_ids for request in requests)
        self._counts["generated_tokens"] += len(requests)
        for i, (request, token_id) in enumerate(zip(requests, drawn, strict=True)):
            try:
                request.add_token(token_id, self.stop_ids, described.get(i))
            except Exception as error:  # noqa: BLE001 (as above)
                self._end(request, None, error)

    def _threads(self, rows: int) -> contextlib.AbstractContextManager[None]:
        read = self.decoder.weight_bytes + max(self.cache.lengths) * self._cache_bytes_per_token
        small = read < SINGLE_THREAD_BYTES and rows < SINGLE_THREAD_ROWS
        return _at_most_threads(1 if small else torch.get_num_threads())

    def _sampler_of(self, requests: Sequence[Request]) -> Sampler:
        if len(requests) < len(self._running):
            return Sampler([request.params for request in requests], self._never)
        if self._sampler is None:
            self._sampler = Sampler([request.params for request in requests], self._never)
        return self._sampler

    def _remove_finished(self) -> None:
        for slot in reversed(range(len(self._running))):
            request = self._running[slot]
            if request.finished:
                if request.finish_reason is not None:  # errors were counted where they happened
                    self._counts[request.finish_reason] += 1
                self._free(slot)

    def _drop_cancelled(self) -> None:
        """End cancelled requests, wherever they are."""
        with self._work:
            cancelled = [request for request in self._waiting if request.cancelled]
            for request in cancelled:
                self._waiting.remove(request)
        for slot in reversed(range(len(self._running))):
            if self._running[slot].cancelled:
                cancelled.append(self._running[slot])
                self._free(slot)
        if self._prefilling is not None and self._prefilling.cancelled:
            cancelled.append(self._prefilling)
            self._prefilling = None
        for request in cancelled:
            self._end(request, "cancelled")

    def _free(self, slot: int) -> None:
        """Take the request of a slot out, and close the gap."""
        last = len(self._running) - 1
        if slot != last:
            self.cache.move(last, slot)
            self._running[slot] = self._running[last]
        self._running.pop()
        self._sampler = None
        if self._prefilling is not None:
            self.cache.move(last + 1, last)
            last += 1
        self.cache.lengths[last] = 0  # what it holds is not to be kept when the cache grows

    def _end(self, request: Request, reason: FinishReason | None, error: Exception | None = None) -> None:
        self._counts[reason or "failed"] += 1
        request.finish(reason, error)

    def _fail_all(self, error: Exception) -> None:
        with self._work:
            requests = [*self._running, *self._waiting]
            self._waiting.clear()
        if self._prefilling is not None:
            requests.append(self._prefilling)
        self._running, self._prefilling, self._sampler = [], None, None
        for request in requests:
            if not request.finished:
                self._end(request, None, error)


def _never_drawn(tokenizer: Tokenizer, vocab_size: int, stop_ids: frozenset[int]) -> torch.Tensor | None:
    """(vocab_size,) bool, True for ids without text (padding, reserved) that do not end a generation either."""
    known = tokenizer.token_bytes_table()[:vocab_size] > 0
    never = torch.ones(vocab_size, dtype=torch.bool)
    never[: len(known)] = ~torch.from_numpy(known)
    never[list(stop_ids)] = False
    return never if bool(never.any()) else None


@contextlib.contextmanager
def _at_most_threads(limit: int) -> Iterator[None]:
    """Run on at most so many threads; the caller's setting comes back afterwards."""
    before = torch.get_num_threads()
    if before <= limit:
        yield
        return
    torch.set_num_threads(limit)
    try:
        yield
    finally:
        torch.set_num_threads(before)
