"""Seeds of the independent random streams of a run."""

from __future__ import annotations

import numpy as np


def stream_seed(seed: int, stream: str, index: int = 0) -> int:
    """A seed for the stream of that name, such as the planner's draws or an episode's reset.

    Episodes are reset by a seed of their own, so a run needs no environment state to be continued
    exactly.
    """
    return int(np.random.SeedSequence([seed, *stream.encode(), index]).generate_state(1)[0])
