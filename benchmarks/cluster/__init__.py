"""The parts of cluster_simulation.py and cluster_check.py: traffic, replicas, policies, and the events between them."""
