"""Hardware profiles: one TOML per hardware class and the one schema that reads them.

The package's root stays free of pydantic so that the runtime can import `qwen_common.errors`
without paying for the schema.
"""
