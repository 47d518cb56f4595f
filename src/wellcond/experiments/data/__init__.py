"""Images from a name, a path or arrays, split for training, validation and testing, and in batches."""
