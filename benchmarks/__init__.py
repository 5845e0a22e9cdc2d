"""Measurements that are no part of the package: found in a checkout only."""
