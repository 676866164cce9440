"""Bookkeeping of the KV cache: free slots, who holds them, cached prefixes; data structures that know no engine."""
