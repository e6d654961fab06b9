"""A kiosk's bundle: artifact, wheels, scripts and notices, every file hashed, the list of hashes signed."""
