"""Slice replay: whole episodes in, batches of H-step slices out, resident on one device."""

from __future__ import annotations

import torch
from torch import Tensor

from iqmpc.episode import Episode
from iqmpc.kernels.iq_update import Rows
from iqmpc.losses import Batch
from iqmpc.observation import STACK, ObservationSpec
from iqmpc.scaling import ObservationScaling


class SliceReplay:
    """A ring of episodes of which slices of `horizon` steps are drawn uniformly.

    An episode of T steps takes T+1 rows (its last row holds an observation alone) and offers
    T-H+1 slices, none of which crosses into another episode. When the ring is full the oldest
    episodes make room. Memory grows with use, up to `capacity` rows, by doubling: `allocations`
    counts how often. In between the tensors that `sample` reads stay where they are. `overwritten`
    counts the times at which older episodes made room: until it changes, what `state_dict` gave
    stays as it was.

    One that `grows` past its capacity instead, and so loses nothing, is for demonstrations.

    `obs_shape` is what an `ObservationSpec` is made of. Images are kept as an `Episode` has them,
    each frame once, and stacked when they are drawn. A row of RGB frames takes 12,288 bytes, so
    1,000,000 rows 12.3 GB. `scaling` is applied to flat observations as they come in: they are
    kept, and drawn, as the encoder takes them.
    """

    def __init__(
        self,
        obs_shape: ObservationSpec | tuple[int, ...] | int,
        action_dim: int,
        *,
        horizon: int,
        capacity: int,
        grows: bool = False,
        device: torch.device | str = "cpu",
        scaling: ObservationScaling | None = None,
    ):
        self._grows, self.scaling = grows, None if scaling is None else scaling.to(device)
        self.horizon, self.capacity, self.device = horizon, capacity, torch.device(device)
        self.observation_spec = spec = ObservationSpec.of(obs_shape)
        self._images = spec.images
        self._dims = {
            "obs": spec.row_shape,
            "action": (action_dim,),
            "reward": (),
            "terminated": (),
        }
        if self._images:
            self._dims["age"] = ()  # how many frames of its episode stand before a row, at most 2
        self._rows: dict[str, Tensor] = {}
        self._episodes: list[tuple[int, int]] = []  # (first row, steps), oldest first
        self._next = 0  # the row where the next episode begins
        self._count = torch.zeros((), dtype=torch.float64, device=self.device)  # slices
        # On a CPU a draw's range is a host number; elsewhere it is read on the device, so that a
        # captured draw follows the replay.
        self._range_on_device = self.device.type != "cpu"
        self.allocations = self.overwritten = 0
        self._allocate(min(capacity, 4096))
        self._index()

    def __len__(self) -> int:
        """Steps held."""
        return sum(steps for _, steps in self._episodes)

    @property
    def slices(self) -> int:
        return len(self._starts)

    def add(self, episode: Episode) -> None:
        """Append a finished episode; its rewards are zeros where it has none.

        A terminal last row marks the last step as one whose value is not bootstrapped. An episode
        shorter than the horizon is kept out, since it offers no slice.
        Raises `ValueError` for shapes that do not fit or an episode larger than the capacity.
        """
        obs, action = torch.as_tensor(episode.observations), torch.as_tensor(episode.actions)
        reward, steps = episode.rewards, len(action)
        self.observation_spec.check_rows(obs, steps + 1)
        expected = [steps, *self._dims["action"]]
        if list(action.shape) != expected:
            raise ValueError(f"action must be {expected}, got {list(action.shape)}")
        self._fit(self._next + steps + 1)
        if steps + 1 > self.capacity:
            raise ValueError(
                f"an episode of {steps} steps does not fit a replay of {self.capacity} rows"
            )
        if steps < self.horizon:
            return
        first = self._make_room(steps + 1)
        rows = slice(first, first + steps)
        obs = obs.to(self.device)
        self._rows["obs"][first : first + steps + 1] = self.scaling(obs) if self.scaling else obs
        self._rows["action"][rows] = action.to(self.device)
        self._rows["reward"][rows] = 0 if reward is None else torch.as_tensor(reward)
        self._rows["terminated"][rows] = 0
        self._rows["terminated"][first + steps - 1] = float(episode.terminated)
        if self._images:
            age = torch.arange(steps + 1).clamp(max=STACK - 1)
            self._rows["age"][first : first + steps + 1] = age
        self._episodes.append((first, steps))
        self._next = first + steps + 1
        self._index()

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        """`batch` slices, drawn uniformly with replacement; `Batch.experts` is 0."""
        self.require_slices()
        steps = torch.arange(self.horizon + 1, device=self.device)
        rows = self._draw(batch, generator) + steps.unsqueeze(1)  # [H+1, B]
        inner = rows[:-1]
        r = self._rows
        return Batch(
            self._stacked(rows) if self._images else r["obs"][rows],
            r["action"][inner],
            r["reward"][inner],
            r["terminated"][inner],
            0,
        )

    def rows(self) -> Rows:
        """The memory that slices are drawn from, of flat observations; valid until an episode is
        added. Raises `ValueError` where there is nothing to draw."""
        self.require_slices()
        r = self._rows
        return Rows(r["obs"], r["action"], r["reward"], r["terminated"], self._starts)

    def _stacked(self, rows: Tensor) -> Tensor:
        """What was observed at rows [H+1, B]: uint8 [H+1, B, 3C, 64, 64]."""
        back = torch.arange(STACK - 1, -1, -1, device=self.device)
        back = torch.minimum(back, self._rows["age"][rows].unsqueeze(-1))
        return self._rows["obs"][rows.unsqueeze(-1) - back].flatten(2, 3)

    def require_slices(self) -> None:
        """Raises `ValueError` where there is nothing to sample."""
        if not self.slices:
            raise ValueError(f"the replay holds no episode of at least {self.horizon} steps")

    def _draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """The first rows of `batch` slices, [B]."""
        if not self._range_on_device:
            return self._starts[torch.randint(self.slices, (batch,), generator=generator)]
        # 53 bits on at most 2^31 slices: none is likelier than another by more than 2^-22.
        uniform = torch.rand(batch, dtype=torch.float64, generator=generator, device=self.device)
        return self._line[(uniform * self._count).long()]

    def _allocate(self, rows: int) -> None:
        self.allocations += 1
        self._line = torch.zeros(rows, dtype=torch.int64, device=self.device)  # slices' first rows
        for name, shape in self._dims.items():
            dtype = torch.uint8 if self._images and name in ("obs", "age") else torch.float32
            grown = torch.zeros(rows, *shape, dtype=dtype, device=self.device)
            if name in self._rows:
                grown[: len(self._rows[name])] = self._rows[name]
            self._rows[name] = grown

    def _fit(self, rows: int) -> None:
        """Raise the capacity, where it grows, so that these fit and some more."""
        if self._grows and rows > self.capacity:
            self.capacity = 2 * rows

    def _make_room(self, rows: int) -> int:
        """The first of `rows` free rows: at the end, or at the start over the oldest episodes."""
        first, before = self._next, len(self._episodes)
        if first + rows > self.capacity:
            self._episodes = [e for e in self._episodes if e[0] < first]  # drop the old tail
            first = 0
        end = first + rows
        held = len(self._rows["obs"])
        if end > held:
            self._allocate(min(self.capacity, max(end, 2 * held)))
        self._episodes = [
            (at, steps) for at, steps in self._episodes if at + steps < first or at >= end
        ]
        self.overwritten += len(self._episodes) < before
        return first

    def _index(self) -> None:
        first, steps = torch.tensor(self._episodes, dtype=torch.int64).reshape(-1, 2).unbind(1)
        count = steps - self.horizon + 1
        skipped = first - (count.cumsum(0) - count)  # from a slice's place in line to its row
        line = torch.arange(int(count.sum()))
        self._starts = self._line[: len(line)]
        self._starts.copy_(line + skipped.repeat_interleave(count))
        self._count.fill_(len(line))

    def state_dict(self) -> dict[str, Tensor]:
        """The rows in use and where the episodes lie."""
        used = max((first + steps + 1 for first, steps in self._episodes), default=0)
        return {
            **{name: rows[:used] for name, rows in self._rows.items()},
            "episodes": torch.tensor(self._episodes, dtype=torch.int64).reshape(-1, 2),
            "next": torch.tensor(self._next),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        used = len(state["obs"])
        self._fit(used)
        if used > self.capacity:
            raise ValueError(f"{used} rows do not fit a replay of {self.capacity}")
        episodes = [(first, steps) for first, steps in state["episodes"].tolist()]
        end = 0
        for first, steps in sorted(episodes):
            if first < end or steps < self.horizon or first + steps >= used:
                raise ValueError(
                    "the episodes of a replay lie in its rows, one behind the other, got "
                    f"{steps} steps from row {first} of {used}"
                )
            end = first + steps + 1
        if not 0 <= int(state["next"]) <= self.capacity:
            raise ValueError(
                "the episodes of a replay lie in its rows, got the next one at row "
                f"{int(state['next'])} of {self.capacity}"
            )
        if used > len(self._rows["obs"]):
            self._allocate(used)
        for name in self._rows:
            self._rows[name][:used] = state[name].to(self.device)
        self._episodes = episodes
        self._next = int(state["next"])
        self._index()


def join(expert: Batch, behaviour: Batch) -> Batch:
    """One batch, the demonstrations in the leading columns."""
    columns = [torch.cat([a, b], dim=1) for a, b in zip(expert[:4], behaviour[:4], strict=True)]
    return Batch(*columns, experts=expert.action.shape[1])
