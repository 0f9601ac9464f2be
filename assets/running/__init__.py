"""What carries the assets: processes, Dagster's instance and web UI, rounds on the terminal."""
