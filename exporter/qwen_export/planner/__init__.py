"""What an artifact will take and give, before anything but config.json was read."""
