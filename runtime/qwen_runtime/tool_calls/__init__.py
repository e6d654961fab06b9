"""Calls of tools, as models write them: a module for each dialect, and what dialects share."""
