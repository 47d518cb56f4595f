"""Images from a name, a path or arrays, split into training, validation and test sets, and batched."""
