"""Rollout datasets: their schema, their store, and how they travel."""
