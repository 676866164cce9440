"""The engine as its callers see it: in the engine process (remote), or in this one (local)."""
