"""Policies as files: immutable snapshots, their weights and shapes, and where they come from."""
