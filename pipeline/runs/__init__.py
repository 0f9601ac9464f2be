"""A run's folder: opened, continued, and kept at a URL."""
