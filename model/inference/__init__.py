"""Serving: continuous depth-wise batching over a bounded pool of keys and values, a command line and an HTTP server."""
