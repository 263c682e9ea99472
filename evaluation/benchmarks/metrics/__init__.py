"""The metrics of the benchmarks, from answers or ranked candidates and the rows that they belong to."""
