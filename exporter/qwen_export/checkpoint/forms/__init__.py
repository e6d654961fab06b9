"""The forms in which quantised checkpoints store weights: a module for each, which `registry` picks."""
