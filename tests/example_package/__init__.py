"""One file for each thing that a stranger may add: what CONTRIBUTING shows, and ``test_example_package`` runs."""
