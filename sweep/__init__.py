"""Decides: what is tried, how long, for how much. Never imports torch."""
