"""An OpenAI-compatible HTTP server for one artifact. Needs the extra `serve`."""
