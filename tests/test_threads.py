"""Threads of the C++ library and torch's, as runs ask for them."""

import torch

from iqmpc import threads
from iqmpc.threads import prepare_torch


def test_runs_of_one_process_do_not_take_threads_from_each_other(small_config, monkeypatch):
    """torch is left one thread where the C++ library does the work: that is nobody's default."""
    count = [6]
    monkeypatch.setattr(torch, "get_num_threads", lambda: count[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: count.__setitem__(0, n))
    for name in ("_threads", "_torchs", "_default"):
        monkeypatch.setattr(threads, name, None)
    fused = small_config.replace({"learner.mode": "fused"})
    for config, library, own in (
        (fused, 6, 1),
        (fused, 6, 1),
        (small_config, 6, 6),
        (fused.replace({"threads": 3}), 3, 1),
        (small_config.replace({"threads": 2}), 2, 2),
        (fused, 6, 1),
    ):
        prepare_torch(config)
        assert (threads.threads(), torch.get_num_threads()) == (library, own)
    torch.set_num_threads(4)  # by who uses iqmpc
    prepare_torch(fused)
    assert (threads.threads(), torch.get_num_threads()) == (4, 1)
