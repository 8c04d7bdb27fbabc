"""Speed and memory, measured: pytest-benchmark suites, one table a machine, the documentation's tables and figures from them."""
