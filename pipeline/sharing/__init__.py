"""Datasets given and taken: packaged, described, cut, exchanged with other forms, looked at."""
