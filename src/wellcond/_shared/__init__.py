"""The ground floor: what every package of the library stands on, and that is no mathematics.

Checks at the public door and their messages, errors, solver events, precisions, names and what they were meant to be,
models inside their wrappers, and everything that PyTorch has no public name for. It imports nothing else of ours.
"""
