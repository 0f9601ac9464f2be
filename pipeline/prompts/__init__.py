"""Prompt sets: people's files, public problem sets, embedded tasks, and what a round takes of them."""
