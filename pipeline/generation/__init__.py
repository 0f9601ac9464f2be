"""Completions from a frozen snapshot."""
