"""A kiosk on the device: check a signed bundle, install it, keep it running, with no network."""
