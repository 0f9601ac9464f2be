"""What Dagster sees: assets, checks, jobs, automation."""
