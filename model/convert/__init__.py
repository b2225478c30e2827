"""Models from and for others: Llama, GGUF, the hub, the authors' code, and vanilla models to start from."""
