"""New tokens for a batch of prompts, step by step, on the key-value cache that `prefill` filled.

Finished prompts leave the batch: whole groups are dropped and the others made narrower as soon as half of the rows are done.
On CUDA a step that occurs often is recorded as a CUDA graph, since at these batch sizes a step's kernels take less time than
their launches.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from surf.models.prefill import Layout, Prefill
from surf.models.prefix import BLOCK, FULL, coarse, wide
from surf.models.sampling import pick, uniforms

log = logging.getLogger("surf")
# [group][row] of a batch: group and row of the prompt at first, (-1, -1) where there is none or it is finished
Names = list[list[tuple[int, int]]]

STEPS = 8  # steps for which room is made at first; then twice as many each time
GRAPHS = 64  # recorded shapes that are kept
EAGER = 1  # steps of a shape that run before it is recorded: recording takes about as long as two


class Full(Exception):
    """Answers are longer than they were thought to be, and the batch needs more places than there are."""


def generate(
    prefill: Prefill,
    steps: "Steps",
    layout: Layout,
    hidden: Any,
    *,
    limit: int,
    ends: frozenset[int],
    temperature: float,
    seeds: Sequence[Sequence[int]],
    room: int,
) -> list[list[list[int]]]:
    """New tokens of every prompt, by group and row, without the end token.

    Args:
        prefill: has read the prompts of this batch.
        hidden: what `prefill.suffix` returned.
        limit: new tokens, at most.
        ends: tokens that end an answer.
        seeds: of each prompt, by group and row.
        room: places in the key-value cache, at most; one group may take more.

    Raises:
        Full: the room does not suffice.
    """
    import torch

    device = layout.lengths.device
    made: list[list[list[int]]] = [[[] for _ in own] for own in seeds]
    seed = np.zeros((layout.groups, layout.width), np.uint64)
    for number, own in enumerate(seeds):
        seed[number, : len(own)] = own
    names: Names = [[(g, r) if r < len(own) else (-1, -1) for r in range(layout.width)] for g, own in enumerate(seeds)]

    def uniform(first: int, count: int) -> Any:
        """float64 [groups, width, count]."""
        flat = uniforms(seed.reshape(-1), range(first, first + count)) if temperature else np.zeros((seed.size, count))
        return torch.from_numpy(flat).to(device).view(*seed.shape, count)

    last = layout.last[:, :, None].expand(-1, -1, hidden.shape[-1])
    ids = pick(prefill.head(hidden.gather(1, last)), temperature, uniform(0, 1)[:, :, 0])
    positions = layout.prefix_lengths[:, None] + layout.lengths
    mask = layout.prompt_mask(layout.end)
    alive = _keep(ids.tolist(), names, made, ends, limit)

    done, block, size = 1, STEPS, alive
    while alive:
        block = min(block, limit - done)
        rows, kept = _alive(names) if done > 1 or 2 * alive <= size else _all(names)
        names = [[names[g][r] if r >= 0 else (-1, -1) for r in own] for g, own in zip(kept, rows, strict=True)]
        index = np.maximum(np.array(rows), 0)
        seed = seed[kept[:, None], index]
        pair = torch.from_numpy(kept).to(device)[:, None], torch.from_numpy(index).to(device)
        used, length = mask.shape[-1], places(mask.shape[-1], index.shape[1], block)
        if len(kept) > 1 and len(kept) * length > room:
            raise Full
        prefill.slots.regroup(kept, used, length)
        mask = torch.nn.functional.pad(mask[pair], (0, length - used))
        run = steps.start(ids[pair], positions[pair], mask, used, temperature)
        numbers = uniform(done, block)
        size, first = alive, done
        while done - first < block and alive and (2 * alive > size or done - first < 2):
            run.step(numbers[:, :, done - first])
            done += 1
            alive = _keep(run.ids.tolist(), names, made, ends, limit)
        # places that were not used are cut off, so that the next block begins where this one stopped
        ids, positions, mask = run.ids.clone(), run.positions.clone(), run.mask[:, 0, :, : used + run.width * (done - first)]
        block *= 2
    return made


def places(used: int, width: int, steps: int) -> int:
    """Places of a group with room for some more steps."""
    return coarse(used + wide(width) * steps, BLOCK)


def _all(names: Names) -> tuple[list[list[int]], np.ndarray]:
    """See `_alive`: nothing changes."""
    fill = [-1] * (wide(len(names[0])) - len(names[0]))
    return [list(range(len(own))) + fill for own in names], np.arange(len(names))


def _alive(names: Names) -> tuple[list[list[int]], np.ndarray]:
    """(rows to keep of each group that is kept, −1 to fill up; the groups): as few and as narrow as the unfinished allow.

    Some finished groups stay, so that few numbers of groups occur, and shapes again.
    """
    rows = [[row for row, name in enumerate(own) if name != (-1, -1)] for own in names]
    order = sorted(range(len(rows)), key=lambda group: (not rows[group], group))
    kept = sorted(order[: coarse(sum(map(bool, rows)), FULL)])
    width = wide(max(map(len, rows)))
    return [rows[group] + [-1] * (width - len(rows[group])) for group in kept], np.array(kept)


def _keep(ids: Sequence[Sequence[int]], names: Names, made: list[list[list[int]]], ends: frozenset[int], limit: int) -> int:
    """Add a step's tokens to their prompts; finished ones lose their name. Returns how many are left."""
    alive = 0
    for own, tokens in zip(names, ids, strict=True):
        for row, ((g, r), token) in enumerate(zip(own, tokens, strict=True)):
            if g < 0:
                continue
            if token not in ends:
                made[g][r].append(token)
            if token in ends or len(made[g][r]) == limit:
                own[row] = (-1, -1)
            else:
                alive += 1
    return alive


class Steps:
    """Decoding steps by shape; recorded as CUDA graphs where that is possible.

    Args:
        record: whether to record; on CUDA only.
    """

    def __init__(self, prefill: Prefill, record: bool) -> None:
        self.prefill, self.record = prefill, record
        self.shapes: OrderedDict[tuple[Any, ...], _Step] = OrderedDict()
        self.pool: Any = None
        self.moves = prefill.slots.moves

    def start(self, ids: Any, positions: Any, mask: Any, where: int, temperature: float) -> "_Step":
        """A step whose first new token goes to place `where`. ids, positions: [groups, width]; mask [groups, width, length]."""
        if self.moves != self.prefill.slots.moves:  # recorded steps would read what is no longer there
            self.clear()
            self.moves = self.prefill.slots.moves
        key = (*mask.shape, temperature)
        step = self.shapes.pop(key, None) or _Step(self, ids, mask, temperature)
        self.shapes[key] = step
        while len(self.shapes) > GRAPHS:
            self.shapes.popitem(last=False)
        step.load(ids, positions, mask, where)
        return step

    def clear(self) -> None:
        """Forget all shapes."""
        self.shapes.clear()
        self.pool = None

    def capture(self, work: Callable[[], None]) -> Any:
        """A CUDA graph of `work`, or None, after which nothing is recorded any more."""
        import torch

        try:
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            torch.cuda.synchronize()
            # by hand: `torch.cuda.graph` empties the allocator's caches first, which costs more than many steps
            with torch.cuda.stream(side):
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    work()
                finally:
                    graph.capture_end()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError) as error:  # AssertionError: a PyTorch without CUDA
            self.record = False
            log.warning(
                "decoding steps are not recorded as CUDA graphs (%s): slower, equal results", str(error).splitlines()[0]
            )
            return None
        return graph


class _Step:
    """One shape: its tensors stay where they are."""

    def __init__(self, owner: Steps, ids: Any, mask: Any, temperature: float) -> None:
        import torch

        self.owner, self.temperature = owner, temperature
        self.ids, self.positions = torch.empty_like(ids), torch.empty_like(ids)
        self.mask = torch.empty_like(mask)[:, None]
        self.where = torch.empty(ids.shape[1], dtype=torch.int64, device=ids.device)
        self.rows = torch.arange(ids.shape[1], device=ids.device)
        self.uniform = torch.empty(ids.shape, dtype=torch.float64, device=ids.device)
        self.width, self.runs, self.graph = ids.shape[1], 0, None

    def load(self, ids: Any, positions: Any, mask: Any, where: int) -> None:
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        self.mask.copy_(mask[:, None])
        self.where.copy_(self.rows + where)

    def step(self, uniform: Any) -> None:
        """Read the newest tokens `ids` and put the next ones in their place."""
        self.uniform.copy_(uniform)
        self.runs += 1
        if self.graph is None and self.owner.record and self.runs > EAGER:
            self.graph = self.owner.capture(self._work)
        if self.graph is not None:
            self.graph.replay()
        else:
            self._work()

    def _work(self) -> None:
        prefill = self.owner.prefill
        prefill.slots.span, prefill.slots.where = None, self.where
        own = self.where[None, :, None].expand(len(self.ids), -1, 1)
        self.mask[:, 0].scatter_(2, own, True)  # each prompt sees its own newest token
        hidden = prefill.forward(self.ids, self.positions, self.mask)
        self.ids.copy_(pick(prefill.head(hidden), self.temperature, self.uniform))
        self.positions += 1
        self.where += len(self.rows)
