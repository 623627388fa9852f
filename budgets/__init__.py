"""Money: prices, the ledger that holds the cap, forecasts, the audit and the statement.

Imports neither sweep nor trainers.
"""
