"""Starts workers and talks to them. One module a kind of machine, all of the shape in base.py."""
