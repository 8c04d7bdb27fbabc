"""Speed and memory, measured: pytest-benchmark suites, one table a machine, README's tables and figures from them."""
