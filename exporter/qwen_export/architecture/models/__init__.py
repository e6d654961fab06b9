"""One file for each model_type of config.json, with its `CONFIG`; `registry` finds it by its name."""
