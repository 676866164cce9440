"""What the deterministic mode has in place of torch's operations: results for a row don't depend on the batch."""
