"""Thin adapters to training frameworks; each is imported only by whoever uses that framework."""
