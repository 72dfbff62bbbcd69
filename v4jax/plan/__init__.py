"""Compiles a step for a TPU pod that is not there, and says what it would need and how fast it could be at best.

`topology` knows chips and pod sizes, `program` builds the step, `hlo` and `costs` read what the compiler made of it,
`analytic` predicts the same from the config alone, `compile` runs one compilation in a process of its own, `verb` is
the command line.
"""
