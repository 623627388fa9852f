"""Trains what it is told. Knows neither studies nor dollars; imports neither sweep nor budgets."""
