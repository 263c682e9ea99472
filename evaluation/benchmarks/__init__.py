"""The paper's benchmarks through a server's public API: sets as data, readers of their official files, metrics, a runner."""
