"""Ray Serve: replicas on many machines, engines from shared storage."""
