"""A web page over the HTTP surface, offline and without a build step."""
