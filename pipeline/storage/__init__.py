"""Files that are whole or not there, on a disk or at a URL. Knows no snapshot, no rollout and no run."""
