"""What the script stands on. Nothing here imports it, nor more than the seven packages."""
