"""What starts a kiosk: it checks the installed versions, chooses one and keeps it answering.

It is copied beside the versions as one file and run by the device's Python, so it needs nothing of a version
that may be damaged: no module here imports more than the standard library and `qwen_common`.
"""
