"""What every other package builds on.

Argument checks and their messages, errors, solver events, precision, "did you mean", unwrapping of models, the meaning
of saved states, products and convolutions that several packages need, and all uses of PyTorch's private API. Imports
nothing else of wellcond.
"""
