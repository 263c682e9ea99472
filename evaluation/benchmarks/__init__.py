"""The paper's benchmarks through a server's public API: data, readers of official files, metrics, and the runner."""
