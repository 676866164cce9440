"""From token ids to the text that clients see: incremental decoding and stop strings; imports no engine and no HTTP."""
