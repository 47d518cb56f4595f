"""How fast, how frugal and how exact: every solver and layer beside autograd, the published iterations and peers."""
