"""How a policy learns: torch and DeepSpeed, in a process of its own."""
