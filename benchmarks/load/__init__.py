"""A server under more load than it can take: what becomes of every single request."""
