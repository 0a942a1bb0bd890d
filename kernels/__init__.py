"""Operations with several backends: one package an operation, plain torch as its meaning.

`iqmpc.kernels.backends` says which backends can run here and why the others cannot.
"""
