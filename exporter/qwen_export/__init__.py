"""checkpoint -> artifact: the streaming exporter. Never imported by the runtime."""
