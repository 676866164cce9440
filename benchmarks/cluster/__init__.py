"""The parts of cluster_simulation.py: traffic, replicas, policies, and the events between them."""
