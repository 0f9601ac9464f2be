"""Rollouts in the columns of other projects, in and out."""
