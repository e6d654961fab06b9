"""What exporter, runtime and profiles share. Needs the standard library only."""
