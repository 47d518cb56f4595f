"""What every other package builds on, none of it mathematics.

Argument checks and their messages, errors, solver events, precision, "did you mean", unwrapping of models, the meaning
of saved states, and all uses of PyTorch's private API. Imports nothing else of wellcond.
"""
