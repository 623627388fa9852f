"""Other people's searches, each driven by ask and tell in the environment of benchmarks/requirements-peers.txt."""
