"""Speed and memory, measured: pytest-benchmark suites, a table a machine, the documentation's tables and figures."""
