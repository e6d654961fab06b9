"""A kiosk's bundle: artifact, wheels, scripts and papers, every file hashed, the list of hashes signed."""
