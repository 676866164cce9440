"""From token ids to the text that clients see, as it grows."""
