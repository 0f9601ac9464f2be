"""The rollout dataset itself: its schema, its store, its manifest, and whether it is sound."""
