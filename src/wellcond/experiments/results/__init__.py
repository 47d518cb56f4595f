"""Finished runs, the table over seeds, and every table as data."""
