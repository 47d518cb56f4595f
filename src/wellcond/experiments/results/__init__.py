"""Finished runs, statistics over seeds, and tables as data."""
