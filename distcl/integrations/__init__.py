"""Prioritized draws in other people's trainers, one module each, imported where it is wanted."""
