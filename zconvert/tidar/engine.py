"""The decode loop, for one text or a batch of them: one forward verifies the drafts of the last and drafts anew.

A step's forward holds, for every row, `[next token, its drafts | a block of mask slots for each accepted count it plans
for]`. The drafts are verified; the block planned for the row's accepted count (or the nearest below) holds its next
drafts. Rows accept different numbers of tokens, end by themselves and make room for the next request. Plain AR decoding
is the same loop without drafts.

What a row does depends on its own text and random numbers alone, never on what shares the batch with it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .acceptance import Sampling, make_drafts, penalised, verify
from .cache import TidarCache
from .decoding import DecodePlan, Request, Result, Step
from .layout import decode_layout
from .model import LayoutModel
from .rows import Drafted, Row, batches, chosen

PREFILL_CHUNK = 2048  # tokens of one prompt in a forward, so that a long prompt does not hold up the texts beside it


@dataclass
class Counters:
    """What an engine has done since it was made."""

    forwards: int = 0
    prefills: int = 0
    """forwards that only read prompts"""
    tokens: int = 0
    """of new text"""
    requests: int = 0
    """finished, cancelled ones included"""
    verified: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    """how often so it went: the slot of its block that a text's first draft came from, how many drafts there were, and
    n, the tokens accepted"""

    @property
    def accepted(self) -> Counter[int]:
        """How often a forward gave a text so many tokens."""
        total: Counter[int] = Counter()
        for (_, _, accepted), count in self.verified.items():
            total[accepted] += count
        return total


class Engine:
    """Decodes requests together. `add` them, then `step` until `idle`."""

    def __init__(
        self,
        model: LayoutModel,
        plan: DecodePlan,
        *,
        max_batch: int = 8,
        prefill_chunk: int = PREFILL_CHUNK,
        replan: Callable[[Engine], None] | None = None,
        fixed_shapes: bool = False,
    ) -> None:
        """Makes an engine with an empty cache.

        Args:
            model: of a converted checkpoint (any supported one for plain AR decoding).
            plan: see DecodePlan; another may be set between steps.
            max_batch: texts decoded at a time; further requests wait.
            prefill_chunk: tokens of one prompt in a forward at most.
            replan: called before each forward over texts; may set another plan.
            fixed_shapes: forwards over texts are filled up to the shapes of those around them, which compiled code
                needs (`LayoutModel.compile`) and other code pays for.

        Raises:
            ValueError: max_batch or prefill_chunk below 1.
        """
        if max_batch < 1 or prefill_chunk < 1:
            raise ValueError(f"max_batch is {max_batch} and prefill_chunk {prefill_chunk}, expected at least 1 each")
        self.plan = plan
        self.replan = replan
        self.counters = Counters()
        self._queue: deque[tuple[Result, torch.Generator | None]] = deque()
        self.model = model
        self._max_batch = max_batch
        self._chunk = prefill_chunk
        self._fixed_shapes = fixed_shapes
        self._cache = TidarCache(max_batch)
        self._rows: list[Row] = []  # those that decode, then those that still read their prompts
        self._ended: deque[Result] = deque(maxlen=max(4, max_batch))

    @property
    def idle(self) -> bool:
        """There is nothing to do."""
        return not self._rows and not self._queue

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def room(self) -> int:
        """Requests that the next step can take in."""
        return self._max_batch - len(self._rows) - len(self._queue)

    @property
    def running(self) -> int:
        """Texts in the batch."""
        return len(self._rows)

    @property
    def texts(self) -> list[Result]:
        """Texts in the batch, and before them some that ended lately."""
        return [*self._ended, *(row.result for row in self._rows)]

    def add(self, request: Request, generator: torch.Generator | None = None) -> Result:
        """Queues a request.

        Args:
            request: what to decode.
            generator: of its random numbers, on the CPU, in place of one with the request's seed.
        """
        result = Result(request)
        self._queue.append((result, generator))
        return result

    def cancel(self, result: Result) -> None:
        """Ends a text where it is; its row is free with the next step. One that is done stays as it is."""
        if result.finish is None:
            result.finish = "cancelled"

    @torch.inference_mode()
    def step(self) -> list[tuple[Result, Step]]:
        """Reads prompts that wait, or a part of them, then runs a forward over all texts under way.

        Returns:
            What each text got, in order; one whose prompt was just read may get two steps.
        """
        self._sweep()
        events = self._read_step()
        self._sweep()
        if decoding := [row for row in self._rows if not row.prompt]:
            if self.replan is not None:
                self.replan(self)
            events += self._decode_step(decoding)
            self._sweep()
        return events

    def _sweep(self) -> None:
        """Takes out the texts that ended and takes in those that wait. Rows stay side by side in the cache."""
        for row in [row for row in self._rows if row.result.finish is not None]:
            self._exchange(self._rows.index(row), len(self._rows) - 1)
            self._rows.pop()
            self._cache.clear(len(self._rows))
            self._ended.append(row.result)
            self.counters.requests += 1
        self._readers_last()
        while self._queue and len(self._rows) < self._max_batch:
            # With two forwards in turn, a newcomer waits until it can take the same turns as the others.
            if self.plan.two_forwards and any(row.num_drafts for row in self._rows):
                return
            result, generator = self._queue.popleft()
            if result.finish is not None:
                self.counters.requests += 1
                continue
            self._rows.append(self._new_row(result, generator))

    def _new_row(self, result: Result, generator: torch.Generator | None) -> Row:
        request = result.request
        sampling = self.plan.sampling if request.sampling is None else request.sampling
        eos = self.plan.eos_token_ids if request.eos_token_ids is None else request.eos_token_ids
        if generator is None and not sampling.greedy and request.seed is not None:
            generator = torch.Generator().manual_seed(request.seed)
        return Row(result, sampling, eos, generator, list(request.prompt), request.max_new_tokens)

    def _readers_last(self) -> None:
        """Rows that decode stand in front of those that still read their prompts."""
        front = 0
        for index, row in enumerate(self._rows):
            if not row.prompt:
                self._exchange(front, index)
                front += 1

    def _exchange(self, index: int, other: int) -> None:
        if index != other:
            self._cache.exchange(index, other)
            self._rows[index], self._rows[other] = self._rows[other], self._rows[index]

    def _read_step(self) -> list[tuple[Result, Step]]:
        """Reads a chunk of each prompt; those that are read at once and are of like length go together."""
        events: list[tuple[Result, Step]] = []
        index = sum(not row.prompt for row in self._rows)
        while index < len(self._rows):
            size, end = len(self._rows[index].prompt), index + 1
            while end < len(self._rows) and self._alike(size, len(self._rows[end].prompt)):
                end += 1
            events += self._read(index, end)
            index = end
        return events

    def _alike(self, size: int, other: int) -> bool:
        """Filling a row up costs as much as text: no more than half of a forward shall be filling."""
        return max(size, other) <= min(self._chunk, 2 * min(size, other))

    def _read(self, first: int, end: int) -> list[tuple[Result, Step]]:
        """One forward over a chunk of some rows' prompts; where they end, a block of mask slots follows."""
        rows, plan = self._rows[first:end], self.plan
        chunks = [row.prompt[: self._chunk] for row in rows]
        counts = [len(chunk) for chunk in chunks]
        ends = len(rows[0].prompt) <= self._chunk
        drafting = ends and not plan.two_forwards and any(plan.blocks(0, row.left) for row in rows)
        self._cache.open(first, end)
        width = max(counts)
        # Filled up with any token that the model has, which a source's mask token need not be; nothing sees it.
        filled = [chunk + chunk[-1:] * (width - len(chunk)) for chunk in chunks]
        ids = torch.tensor(filled, device=self.model.device)
        hidden = self._forward(ids, [(count,) for count in counts] if drafting else ())
        self._cache.commit(counts)
        self.counters.prefills += 1
        for row in rows:
            row.prompt = row.prompt[self._chunk :]
        if not ends:
            return []
        place = torch.tensor(counts, device=hidden.device) - 1
        told = self._verify(rows, hidden[torch.arange(len(rows), device=hidden.device), place][:, None])
        events = [self._advance(row, tokens, 0, hidden.shape[1]) for row, (_, tokens) in zip(rows, told, strict=True)]
        slots = plan.block_size - 1 if drafting else 0
        self._draft(rows, hidden, [width + 1] * len(rows), [slots] * len(rows))
        return events

    def _decode_step(self, rows: list[Row]) -> list[tuple[Result, Step]]:
        """One forward that verifies and drafts."""
        plan, width = self.plan, max(row.num_drafts for row in rows)
        own = [plan.blocks(row.num_drafts, row.left) for row in rows]
        blocks = tuple(sorted(set().union(*own)))
        if self._fixed_shapes:
            width, planned = plan.shape(drafted=width > 0)
            blocks = tuple(sorted({*blocks, *planned}))
            filling = self._fix(len(rows), 1 + width + len(blocks) * plan.block_size)
        else:
            filling = 0
            self._cache.open(0, len(rows))
        causal = self._causal(rows, width)
        causal = torch.cat([causal, causal[:1].expand(filling, -1)])
        hidden = self._forward(causal, blocks)[: len(rows)]
        told = self._verify(rows, hidden[:, : 1 + width])
        kept = [accepted + 1 for accepted, _ in told]
        self._cache.commit(kept + [0] * filling)
        self.counters.forwards += 1
        events, starts, counts = [], [], []
        for row, (_, tokens), count, planned in zip(rows, told, kept, own, strict=True):
            events.append(self._advance(row, tokens, count, hidden.shape[1]))
            usable = [k for k in planned if k <= count]
            # The slot at the position of the token after the accepted ones is the anchor: that token is exact already,
            # so the slot's prediction is dropped. The slots after it are the next drafts.
            anchor = count - usable[-1] if usable else plan.block_size
            block = blocks.index(usable[-1]) if usable else 0
            starts.append(1 + width + block * plan.block_size + anchor + 1)
            counts.append(plan.block_size - 1 - anchor)
        self._draft(rows, hidden, starts, counts)
        return events

    def _fix(self, rows: int, num_tokens: int) -> int:
        """Opens the cache for a forward of fixed shapes; says how many rows fill it up, to a power of two.

        These are rows that read their prompts or are nobody's: what they write lies behind their borders.
        """
        filled = min(1 << (rows - 1).bit_length(), self._max_batch)
        self._cache.open(0, filled)
        self._cache.fix(num_tokens, self.model.device)
        return filled - rows

    def _forward(self, causal: Tensor, blocks: tuple[int, ...] | list[tuple[int, ...]]) -> Tensor:
        """(R, C) clean tokens -> (R, C + slots, hidden)."""
        plan, rows = self.plan, causal.shape[0]
        layout = decode_layout(self._cache.lengths, causal.shape[1], blocks, plan.block_size, causal.device)
        slots = causal.new_full((rows, layout.num_tokens - causal.shape[1]), plan.mask_token_id)
        return self.model.hidden_states(torch.cat([causal, slots], dim=1), layout, self._cache)

    def _causal(self, rows: list[Row], width: int) -> Tensor:
        """(R, 1 + width): each row's next token and its drafts, filled up with the next token."""
        following = torch.tensor([[row.next_token] for row in rows], device=self.model.device)
        if width == 0:
            return following
        drafts = following.repeat(1, width)  # as filling the mask token would not do: a virtual one has no embedding
        for batch, members, places in batches(rows):
            if batch is not None:
                count = min(width, batch.drafts.tokens.shape[1])
                drafts[members, :count] = batch.drafts.tokens[places, :count]
        return torch.cat([following, drafts], dim=1)

    def _verify(self, rows: list[Row], hidden: Tensor) -> list[tuple[int, list[int]]]:
        """(R, 1 + m, hidden) -> of each row how many drafts are accepted, and these with the token after them."""
        logits = self._text_logits(hidden)
        told: list[tuple[int, list[int]]] = [(0, [])] * len(rows)
        results, order = [], []
        for batch, members, places in batches(rows):
            group = [rows[i] for i in members]
            count = 0 if batch is None else min(hidden.shape[1] - 1, batch.drafts.tokens.shape[1])
            drafts = None if batch is None or count == 0 else chosen(batch.drafts, places, count)
            sampling, own = group[0].sampling, logits if len(group) == len(rows) else logits[members]
            accepted, following = verify(
                own[:, : count + 1],
                drafts,
                sampling,
                None if sampling.greedy else self._uniform(group, count, following=True),
                self._seen(group, logits.shape[-1]),
            )
            tokens = following.new_zeros((len(group), hidden.shape[1] - 1))
            if drafts is not None:
                tokens[:, :count] = drafts.tokens
            results.append(torch.cat([accepted[:, None], following[:, None], tokens], dim=1))
            order += members
        for index, (number, token, *drafted) in zip(order, torch.cat(results).tolist(), strict=True):
            told[index] = number, [*drafted[:number], token]
        return told

    def _advance(self, row: Row, tokens: list[int], accepted: int, tokens_in_forward: int) -> tuple[Result, Step]:
        """Adds a forward's tokens to a text, as far as it goes."""
        result = row.result
        tokens = tokens[: row.left]
        ends = [i for i, token in enumerate(tokens) if token in row.eos_token_ids]
        finish = "eos" if ends else "length" if len(tokens) == row.left else None
        if ends:
            tokens = tokens[: ends[0] + 1]
        before = len(result.tokens)
        result.tokens += tokens
        if result.request.stop is not None and (whole := result.request.stop(result.tokens)) is not None:
            finish = "stop"
            del result.tokens[max(whole, before) :]
            tokens = result.tokens[before:]
        if accepted:
            result.accepted.append(accepted)
            self.counters.verified[row.first_slot, row.num_drafts, accepted] += 1
        self.counters.tokens += len(tokens)
        row.left -= len(tokens)
        row.drafted, row.num_drafts = None, 0
        if finish is None:
            row.next_token = tokens[-1]
            if row.seen is not None:
                row.seen[tokens] = True
        elif result.finish is None:  # it may have been cancelled meanwhile
            result.finish = finish
        return result, Step(tuple(tokens), accepted, tokens_in_forward, finish)

    def _draft(self, rows: list[Row], hidden: Tensor, starts: list[int], counts: list[int]) -> None:
        """Draws drafts from the mask slots that begin at each row's `starts`, at most `counts` of them."""
        # A forward yields one token more than its accepted drafts: drafts past the length would be thrown away.
        wanted = [0 if r.result.finish else min(n, r.left - 1) for r, n in zip(rows, counts, strict=True)]
        groups: dict[Sampling, list[int]] = {}
        for index, row in enumerate(rows):
            if wanted[index] > 0:
                groups.setdefault(row.sampling, []).append(index)
        for sampling, members in groups.items():
            group, most = [rows[i] for i in members], max(wanted[i] for i in members)
            if len(rows) == 1:
                slots = hidden[:, starts[0] : starts[0] + most]
            else:
                first = torch.tensor([starts[i] for i in members], device=hidden.device)[:, None]
                place = (first + torch.arange(most, device=hidden.device)).clamp_max(hidden.shape[1] - 1)
                slots = hidden[torch.tensor(members, device=hidden.device)[:, None], place]
            logits = self._text_logits(slots)
            if (seen := self._seen(group, logits.shape[-1])) is not None:
                logits = penalised(logits, seen, sampling.repetition_penalty)
            number = torch.tensor([wanted[i] for i in members], device=hidden.device)
            uniform = None if sampling.greedy else self._uniform(group, most)
            bigrams = self.model.bigrams if self.plan.bigrams else None
            previous = torch.tensor([row.next_token for row in group], device=hidden.device)
            drafts = make_drafts(logits, number, self.plan.drafting(sampling), uniform, bigrams, previous)
            batch = Drafted(group, drafts)
            for place_in_batch, (row, index) in enumerate(zip(group, members, strict=True)):
                row.drafted, row.num_drafts = (batch, place_in_batch), wanted[index]
                row.first_slot = self.plan.block_size - counts[index]  # a block's last slots are the ones left

    def _text_logits(self, hidden: Tensor) -> Tensor:
        """(…, hidden) -> (…, V) float32 logits in which the mask token cannot be chosen."""
        logits = self.model.logits(hidden)
        mask = self.plan.mask_token_id
        logits[..., mask : mask + 1] = -torch.inf  # a virtual one has no column
        return logits

    def _uniform(self, rows: list[Row], count: int, *, following: bool = False) -> Tensor:
        """(R, count) numbers, or (R, count + 1) with one for the token that follows.

        Every row always draws a whole block of them: how many the others need must not change what it gets.
        """
        size = max(self.plan.block_size, count + 1)
        numbers = torch.stack([row.uniform(size) for row in rows])
        used = [*range(count), size - 1] if following else [*range(count)]
        return numbers[:, used].to(self.model.device, non_blocking=True)

    def _seen(self, rows: list[Row], width: int) -> Tensor | None:
        """(R, V) bool, the tokens of each row's text, where there is a repetition penalty."""
        if rows[0].sampling.repetition_penalty == 1:
            return None
        for row in rows:
            if row.seen is None:
                row.seen = torch.zeros(width, dtype=torch.bool, device=self.model.device)
                row.seen[row.result.request.prompt + row.result.tokens] = True
        return torch.stack([row.seen for row in rows if row.seen is not None])


def run(engine: Engine, requests: Iterable[Request]) -> Iterator[Result]:
    """Decodes requests as rows of the batch become free, and yields each text when it ends.

    Args:
        engine: that has nothing else to do.
        requests: taken as they are needed, so that they may be made as one goes.
    """
    source = iter(requests)
    exhausted = False
    while True:
        while not exhausted and engine.room > 0:
            request = next(source, None)
            exhausted = request is None
            if request is not None:
                engine.add(request)
        if engine.idle:
            return
        for result, step in engine.step():
            if step.finish is not None:
                yield result


def decode(
    model: LayoutModel,
    prompt: list[int],
    plan: DecodePlan,
    max_new_tokens: int,
    generator: torch.Generator | None = None,
) -> Iterator[Step]:
    """Decodes one text.

    Args:
        model: of a converted checkpoint (any supported one for plain AR decoding).
        prompt: token ids, at least one.
        plan: see DecodePlan.
        max_new_tokens: at most so many tokens; at least 1.
        generator: of the random numbers, on the CPU; None uses torch's global one.

    Yields:
        The prefill's step, then one for each forward, until an end token or the length.

    Raises:
        ValueError: empty prompt, or max_new_tokens below 1.
    """
    engine = Engine(model, plan, max_batch=1)
    engine.add(Request(prompt, max_new_tokens), generator)
    while not engine.idle:
        for _, step in engine.step():
            yield step
