"""Priorities: what to score, how to score it on many ranks, and how weights become draws."""
