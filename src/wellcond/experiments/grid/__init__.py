"""Many runs: in which process each is trained, what is done already, and what happens when one fails."""
