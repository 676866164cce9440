"""The replica's side: forwards requests and calls of fronts to its engine, and their results back. Knows no Ray."""
