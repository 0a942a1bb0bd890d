"""Threads of the C++ library and torch's, as runs ask for them."""

import torch

from iqmpc import threads
from iqmpc.threads import leave_torch_idle, prepare_torch


def test_runs_of_one_process_do_not_take_threads_from_each_other(small_config, monkeypatch):
    """torch is left one thread where the C++ library does the work: that is nobody's default."""
    count = [6]
    monkeypatch.setattr(torch, "get_num_threads", lambda: count[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: count.__setitem__(0, n))
    for name in ("_threads", "_torchs", "_default"):
        monkeypatch.setattr(threads, name, None)
    for asked, library, idle in (
        (None, 6, True),
        (None, 6, True),
        (None, 6, False),
        (3, 3, True),
        (2, 2, False),
        (None, 6, True),
    ):
        prepare_torch(small_config.replace({"threads": asked}))
        if idle:
            leave_torch_idle()
        assert (threads.threads(), torch.get_num_threads()) == (library, 1 if idle else library)
    torch.set_num_threads(4)  # by who uses iqmpc
    prepare_torch(small_config)
    assert (threads.threads(), torch.get_num_threads()) == (4, 4)
