"""Which responses are in the running batch, and what each forward pass feeds to the model.

A request (a prompt with n responses) passes through these states:
  waiting  - no keys cached. When rows and blocks are free its prompt is filled: fed once for all n responses, in chunks.
  held     - the prompt's keys are cached. Its responses, their first tokens drawn, enter one by one: each takes a row and
             forks the prompt's blocks. When the last one has entered, the request lets go of the blocks.
  running  - every response in a row feeds its newest token at each step and draws the next.
When blocks run out, the response that entered last goes back to waiting and its keys are dropped; it enters again by forking
the prompt, filled anew if need be, and filling what it had generated. Random numbers depend on (seed, sample id, position)
alone, so its further tokens are the same.

One forward pass mixes all running rows and as much filling as the token budget allows. Older requests go first, in entering
and in keeping their blocks, so the oldest one always makes progress.
"""

from dataclasses import dataclass

from .kv_cache import BlockAllocator, BlockCopy
from .requests import Request, Response


@dataclass(frozen=True)
class Chunk:
    """Consecutive pending tokens of one context: the next `count` after its cached ones."""

    owner: Request | Response
    count: int
    fills: bool
    """Nothing of the context is pending after this chunk: its last position says what comes next."""

    @property
    def drawing(self) -> list[Response]:
        """The responses whose next token is drawn at the chunk's last position: all of a new prompt's, or the re-entered one.
        A prompt that is filled again, for responses that have begun, draws nothing."""
        if not self.fills:
            return []
        if isinstance(self.owner, Response):
            return [self.owner]
        return [response for response in self.owner.waiting if response.num_tokens == 0]


@dataclass(frozen=True)
class Step:
    """One forward pass: a token for every running response, then the chunks."""

    running: list[Response]
    chunks: list[Chunk]
    copies: list[BlockCopy]
    """To be made before the pass."""


class Scheduler:
    """Rows and blocks are the two things it gives out."""

    def __init__(self, allocator: BlockAllocator, max_rows: int, fill_tokens: int) -> None:
        self.allocator = allocator
        self.max_rows = max_rows
        self.fill_tokens = fill_tokens
        self.requests: dict[int, Request] = {}
        """Unfinished ones by id, oldest first."""
        self.running: list[Response] = []
        """In order of entering."""
        self.filling: list[Request | Response] = []
        """Prompts and re-entered responses with tokens still to be fed."""
        self.num_preemptions = 0

    def add(self, request: Request) -> None:
        assert request.id not in self.requests
        self.requests[request.id] = request

    def schedule(self) -> Step:
        """What to feed next. Empty only when there are no requests."""
        copies: list[BlockCopy] = []
        if self._extend_running():  # after a preemption blocks are scarce: nobody enters in the same step
            self._enter(copies)
        chunks, budget = [], self.fill_tokens
        for owner in self.filling:
            if budget == 0:
                break
            count = min(budget, owner.context.num_pending)
            chunks.append(Chunk(owner, count, fills=count == owner.context.num_pending))
            budget -= count
        assert self.running or chunks or not self.requests, "requests are waiting, but nothing can run"
        return Step(list(self.running), chunks, copies)

    def fed(self, step: Step) -> None:
        """Record that the step's tokens are in the cache; responses that are filled run from now on."""
        for response in step.running:
            response.context.num_cached += 1
        for chunk in step.chunks:
            chunk.owner.context.num_cached += chunk.count
            if chunk.fills:
                self.filling.remove(chunk.owner)
                if isinstance(chunk.owner, Response):
                    self.running.append(chunk.owner)

    def finish(self, responses: list[Response]) -> None:
        """Take responses out of the batch, or out of their request's queue, and free their blocks."""
        for response in responses:
            self.allocator.drop(response.context)
            request = response.request
            if response in request.waiting:
                request.waiting.remove(response)
                if not request.waiting:
                    self.allocator.drop(request.context)
        self.running = [response for response in self.running if response not in responses]

    def remove(self, request: Request) -> None:
        """Forget a request, finished or not."""
        del self.requests[request.id]
        self.filling = [owner for owner in self.filling if owner is not request]
        self.allocator.drop(request.context)
        for response in [r for r in self._in_batch() if r.request is request]:
            self._leave(response)

    def flush(self) -> None:
        """Drop every cached key: the weights changed, or the cache goes away. Responses keep their tokens and wait."""
        for response in reversed(self._in_batch()):
            self._leave(response)
        for request in self.requests.values():
            self.allocator.drop(request.context)
        self.filling = []

    def _in_batch(self) -> list[Response]:
        return self.running + [owner for owner in self.filling if isinstance(owner, Response)]

    def _leave(self, response: Response) -> None:
        """Back to waiting, before its siblings: it is the furthest on."""
        self.allocator.drop(response.context)
        self.running = [other for other in self.running if other is not response]
        self.filling = [other for other in self.filling if other is not response]
        response.request.waiting.appendleft(response)

    def _extend_running(self) -> bool:
        """A writable place for the next token of each running response. False when somebody had to leave for it."""
        nobody_left = True
        for response in list(self.running):
            end = len(response.context.tokens)
            while response in self.running and self.allocator.num_to_extend(response.context, end) > self.allocator.num_free:
                self._free_some_blocks()
                nobody_left = False
            if response in self.running:
                copies = self.allocator.extend(response.context, end)
                assert not copies, "a running response shares only full blocks"
        return nobody_left

    def _free_some_blocks(self) -> None:
        """Drop the youngest prompt that is cached, since prompts are cheap to fill again; else the newest response leaves."""
        for request in reversed(self.requests.values()):
            if request.context.blocks:
                self._drop_prompt(request)
                return
        last = self._in_batch()[-1]
        self.num_preemptions += 1
        self._leave(last)

    def _drop_prompt(self, request: Request) -> None:
        self.allocator.drop(request.context)
        self.filling = [owner for owner in self.filling if owner is not request]

    def _enter(self, copies: list[BlockCopy]) -> None:
        """Fill the free rows, oldest request first, until rows or blocks run out; and prompts a little ahead of the rows, so
        that a row that becomes free has a response to take it at once."""
        ready, most_ready = 0, self.max_rows + max(1, self.max_rows // 8)
        for request in list(self.requests.values()):
            while request.waiting and request.context.num_pending == 0 and len(self._in_batch()) < self.max_rows:
                if not self._enter_response(request, copies):
                    return
            is_due = request.waiting and not request.context.blocks
            if is_due and (len(self._in_batch()) + ready >= most_ready or not self._enter_prompt(request)):
                return
            ready += len(request.waiting)

    def _enter_prompt(self, request: Request) -> bool:
        end = len(request.context.tokens)
        if not self._make_room(request, self.allocator.num_to_extend(request.context, end)):
            return False
        self.allocator.extend(request.context, end)
        self.filling.append(request)
        return True

    def _enter_response(self, request: Request, copies: list[BlockCopy]) -> bool:
        response, end = request.waiting[0], len(request.waiting[0].context.tokens)
        self.allocator.fork(request.context, response.context)
        if not self._make_room(request, self.allocator.num_to_extend(response.context, end)):
            self.allocator.drop(response.context)
            return False
        request.waiting.popleft()
        if not request.waiting:  # before extending, so that the last response writes on in the prompt's own last block
            self.allocator.drop(request.context)
        copies += self.allocator.extend(response.context, end)
        (self.running if response.context.num_pending == 1 else self.filling).append(response)
        return True

    def _make_room(self, entering: Request, num_blocks: int) -> bool:
        """Whether `num_blocks` may be taken: every response in the batch must keep one block to grow into, else it would
        soon throw out the newcomer. With an empty batch, prompts held by younger requests make way."""
        in_batch = len(self._in_batch())
        while num_blocks + in_batch > self.allocator.num_free:
            other_prompts = [r for r in self.requests.values() if r.context.blocks and r is not entering]
            if in_batch or self.filling or not other_prompts:
                return False
            self._drop_prompt(other_prompts[-1])
        return True
