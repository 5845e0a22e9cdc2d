"""Continual-learning methods, one short file each."""
