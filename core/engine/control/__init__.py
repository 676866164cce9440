"""What changes a lane while it serves: its weights, and their labels."""
