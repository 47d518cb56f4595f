"""Many runs: their configurations, where each is trained, what is done already, and what happens if one fails."""
