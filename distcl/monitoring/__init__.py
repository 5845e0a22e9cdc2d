"""Watching the stream: metrics of it, detectors, and what follows a detection."""
