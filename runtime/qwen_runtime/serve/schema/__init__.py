"""What requests may say: a module for each endpoint, and what they share in `base` and `messages`."""
