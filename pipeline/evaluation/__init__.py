"""How good a policy is: pass@k on held-out prompts, and what a run came to by rounds."""
