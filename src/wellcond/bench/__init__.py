"""How fast, how lean and how accurate: every solver and layer beside autograd, the published iterations and peers."""
