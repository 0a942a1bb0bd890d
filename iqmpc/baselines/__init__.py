"""Other methods as agents of the same trainer: a file a method, written from its paper.

A method is a `BaselineLearner` with the losses of its paper as functions; what acts is the same for
all (`iqmpc.baselines.agent`).
"""
